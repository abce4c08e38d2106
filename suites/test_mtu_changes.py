"""MTU: another one than before, on one node or by the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from testbed.checks import check
from testbed.fixtures import Facts, Paths
from testbed.labs.base import Node
from testbed.nodes.deploy import Cluster
from testbed.nodes.otherwise import flanneld_as, restart_flanneld
from testbed.nodes.scratch import scratch_pod
from testbed.probes.fabric import port_of
from testbed.probes.flows import ICMP_HEADERS, ping, pinged

LESS = 40
"""By how many bytes the other MTU is smaller: IPv6 fits in any tunnel still, whatever a run's own is."""
WELL_SECONDS = 30.0


def mtus(cluster: Cluster, facts: Facts, node: str) -> dict[str, int]:
    """What subnet.env and the tunnel's device say."""
    facts.forget()
    found = {"subnet.env": int(cluster.subnet_env(node)["FLANNEL_MTU"])}
    if cluster.flannel.tunnel_device:
        found["device"] = facts.link(node, cluster.flannel.tunnel_device).mtu
    return found


def expected(cluster: Cluster, underlay: int) -> dict[str, int]:
    """What they have to say."""
    mtu = cluster.flannel.mtu_of(underlay)
    return {"subnet.env": mtu, **({"device": mtu} if cluster.flannel.tunnel_device else {})}


@check("MTU-07", disruptive=True)
def test_the_configured_mtu_is_the_underlay_s(paths: Paths, cluster: Cluster, facts: Facts) -> None:
    """Backend.MTU stands in for the underlay's, so what the tunnel takes goes off it. Source: S0, talos#13457."""
    path = paths.remote()
    node, conf = path.target_node.name, cluster.flannel.net_conf
    assumed = path.target_node.spec.underlay.mtu - LESS
    backend: dict[str, Any] = {**conf["Backend"], "MTU": assumed}

    def look(underlay: int) -> None:
        found, wanted = mtus(cluster, facts, node), expected(cluster, underlay)
        assert found == wanted, f"{node}, underlay {underlay}: {found}, FLANNEL_MTU has to be {wanted}"

    with flanneld_as(cluster, node, net_conf={**conf, "Backend": backend}):
        facts.eventually(lambda: look(assumed))
    facts.eventually(lambda: look(path.target_node.spec.underlay.mtu), seconds=WELL_SECONDS)
    facts.eventually(lambda: pinged(path.source, path.address, wait=1), seconds=WELL_SECONDS)


@contextmanager
def small_link(cluster: Cluster, node: Node, mtu: int) -> Iterator[None]:
    """A node, and the switch's port before it, with a smaller MTU, and flanneld started anew on it."""
    own, port = node.spec.underlay, port_of(cluster.lab, node.name)
    ends = [(node, own.name), (cluster.lab.node(port.node), port.iface)]
    try:
        for machine, iface in ends:
            machine.run(["ip", "link", "set", "dev", iface, "mtu", str(mtu)])
        restart_flanneld(cluster, node.name)
        yield
    finally:
        for machine, iface in ends:
            machine.run(["ip", "link", "set", "dev", iface, "mtu", str(own.mtu)])
        restart_flanneld(cluster, node.name)


@check("MTU-08", disruptive=True)
def test_another_mtu_reaches_the_device_and_new_pods(paths: Paths, cluster: Cluster, facts: Facts) -> None:
    """subnet.env, device, bridge and new pods have it; pods that were there keep theirs. Source: #1011, #1736."""
    path = paths.remote()
    node = path.target_node
    before = {pod.name: facts.mtus(pod)[1:] for pod in cluster.pods.values() if pod.node.name == node.name}
    underlay = node.spec.underlay.mtu - LESS
    mtu = cluster.flannel.mtu_of(underlay)

    def look(wanted: dict[str, int]) -> None:
        found = mtus(cluster, facts, node.name)
        assert found == wanted, f"{node.name}: {found}, not {wanted}"

    with ExitStack() as stack:
        stack.enter_context(small_link(cluster, node, underlay))
        facts.eventually(lambda: look(expected(cluster, underlay)))
        pod = stack.enter_context(scratch_pod(cluster, node.name))
        facts.forget()
        new = facts.mtus(pod)
        assert new == (mtu, mtu, mtu), f"{node.name}: bridge, veth and a new pod have {new}, not {mtu}"
        found = {one.name: facts.mtus(one)[1:] for one in cluster.pods.values() if one.name in before}
        kept = sorted(name for name, values in found.items() if values == before[name])
        assert kept == sorted(before), f"of {sorted(before)} only {kept} kept their MTU: {found}"
        fits = ping(path.source, pod.address, size=mtu - ICMP_HEADERS, dont_fragment=True)
        assert fits.lost == 0, fits.output
    facts.eventually(lambda: look(expected(cluster, node.spec.underlay.mtu)), seconds=WELL_SECONDS)
    facts.eventually(lambda: pinged(path.source, path.address, wait=1), seconds=WELL_SECONDS)


@check("MTU-09", disruptive=True)
def test_of_two_mtus_the_smaller_one_passes_and_more_is_told(paths: Paths, cluster: Cluster, facts: Facts) -> None:
    """Between nodes of different MTUs the smaller FLANNEL_MTU passes; for more the sender is told so. Source: #463."""
    path = paths.remote()
    node = path.target_node
    smaller = node.spec.underlay.mtu - LESS
    mtu = cluster.flannel.mtu_of(smaller)
    with ExitStack() as stack:
        # What the pod learns of a path would outlive it.
        stack.callback(path.source.run, ["ip", "route", "flush", "cache"])
        stack.enter_context(small_link(cluster, node, smaller))
        pod = stack.enter_context(scratch_pod(cluster, node.name))
        facts.eventually(lambda: pinged(path.source, pod.address, wait=1), seconds=WELL_SECONDS)
        for source, target in ((path.source, pod), (pod, path.source)):
            size = mtu - ICMP_HEADERS
            fits = ping(source, target.address, size=size, count=2, dont_fragment=True)
            assert fits.lost == 0, f"{source.name} to {target.name}, {mtu} bytes: {fits.output}"
            over = ping(source, target.address, size=size + 1, count=2, dont_fragment=True, wait=1)
            assert over.received == 0, f"{source.name} to {target.name}, a byte more: {over.output}"
            told = mtu in (over.local_mtu, over.path_mtu)
            assert told, f"silence: {source.name} sends a byte more than {target.name} can take, and is not told so"
    facts.eventually(lambda: pinged(path.source, path.address, wait=1), seconds=WELL_SECONDS)
