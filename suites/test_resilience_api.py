"""RES: what goes on while the Kubernetes API is away, and what happens once it is back."""

from __future__ import annotations

from contextlib import ExitStack

from testbed.checks import check
from testbed.deadline import Deadline
from testbed.fixtures import Facts, Path, Paths
from testbed.nodes.apiaway import api_away
from testbed.nodes.deploy import Cluster
from testbed.nodes.madeup import Stranger, random_mac
from testbed.nodes.madeuppeer import made_up_peer
from testbed.nodes.otherwise import await_ready
from testbed.nodes.scratch import scratch_pod
from testbed.probes.flows import ping
from testbed.probes.stream import streaming

FOLLOWED_SECONDS = 60.0
"""How long flanneld may wait between two tries to reach an API that was away."""
PATIENT_SECONDS = 3.0
"""So long a flanneld that finds no API has to stay for the check to call it patient."""
PEER_ROUTES = ("vxlan", "host-gw", "ipip")
"""The backends that have a route for each peer."""


def pids(cluster: Cluster) -> dict[str, int | None]:
    """The pid of each node's flanneld; None where it has ended."""
    return {node.name: cluster.flanneld_pid(node.name) for node in cluster.members}


@check("RES-05", disruptive=True)
def test_nothing_stops_while_the_api_is_away(paths: Paths, cluster: Cluster, facts: Facts) -> None:
    """Paths carry, new pods get addresses, no flanneld ends, and all follow again behind it. Source: #1244, #1450."""
    before = pids(cluster)
    taken = [paths.take(kind) for kind in ("SS", "XS") if not paths.specs[kind].reason]
    try:
        with ExitStack() as flowing:
            flows = [flowing.enter_context(streaming(path.source, path.address)) for path in taken]
            with api_away(cluster):
                a_new_pod(cluster, taken[0])
                for flow in flows:
                    flow.end()
                assert pids(cluster) == before, f"flanneld was {before}, and is {pids(cluster)}"
        for path, flow in zip(taken, flows, strict=True):
            assert not flow.error, f"{path.kind}: {flow.error}"
            assert flow.lost == 0, f"{path.kind}: {flow.lost} of {flow.sent} datagrams were lost"
        if cluster.flannel.backend.type in PEER_ROUTES:
            a_new_peer(cluster, facts)
        assert pids(cluster) == before, f"flanneld was {before}, and is {pids(cluster)}"
    finally:
        running_again(cluster)


def running_again(cluster: Cluster) -> None:
    """Start the flannelds that have ended, for the rows behind this one."""
    for name, pid in pids(cluster).items():
        if pid is None:
            cluster.start_flanneld(name)
            await_ready(cluster, name)


def a_new_pod(cluster: Cluster, path: Path) -> None:
    """Make a pod on the path's source node, which has to reach the path's target."""
    with scratch_pod(cluster, path.source_node.name) as pod:
        answer = ping(pod, path.address)
        assert answer.lost == 0, f"a pod that was made meanwhile: {answer.output}"


def a_new_peer(cluster: Cluster, facts: Facts) -> None:
    """Make a node, and wait until every member leads to it; then remove it, and wait until none does."""
    with made_up_peer(cluster) as peer:
        stranger = Stranger(peer.subnet, cluster.members[0].spec.ip + 100, random_mac())
        peer.publish(stranger.address, stranger.lease(cluster).get("BackendData"))
        facts.forget()
        facts.eventually(lambda: led_to(cluster, facts, stranger), seconds=FOLLOWED_SECONDS)
    facts.forget()
    facts.eventually(lambda: unknown(cluster, facts, stranger), seconds=FOLLOWED_SECONDS)


def led_to(cluster: Cluster, facts: Facts, stranger: Stranger) -> None:
    """Assert that every member that can reach it has a route to the peer."""
    for node in cluster.members:
        own = node.spec.underlay.address
        if cluster.flannel.backend.tunnels or (own is not None and stranger.address in own.network):
            routes = facts.node(node.name).routes_to(stranger.subnet)
            assert routes, f"{node.name} has no route to a node that is new since the API is back"


def unknown(cluster: Cluster, facts: Facts, stranger: Stranger) -> None:
    """Assert that no member has a route to the peer any more."""
    for node in cluster.members:
        assert not facts.node(node.name).routes_to(stranger.subnet), f"{node.name} has a route to a node that is gone"


@check("RES-06", disruptive=True)
def test_flanneld_waits_for_the_api(paths: Paths, cluster: Cluster) -> None:
    """Started while it is away it neither ends nor takes anything away, and gets ready once it is back. Source: src."""
    path = paths.remote()
    name = path.source_node.name
    cluster.stop_flanneld(name)
    try:
        with api_away(cluster):
            cluster.start_flanneld(name)
            patient = Deadline(PATIENT_SECONDS)
            ended = patient.poll(lambda: cluster.flanneld_pid(name) is None)
            said = f"flanneld ended {patient.elapsed:.1f} s after it was started\n{cluster.flanneld_log(name)}"
            assert not ended, said
            if cluster.flannel.backend.type in PEER_ROUTES:
                answer = ping(path.source, path.address, count=2)
                assert answer.lost == 0, f"with what was there before: {answer.output}"
        await_ready(cluster, name)
    finally:
        running_again(cluster)
    answer = ping(path.source, path.address, count=2)
    assert answer.lost == 0, answer.output
