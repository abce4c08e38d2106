"""LSE: what a flanneld makes of its lease when it starts, and how many pods a lease has room for."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest

from testbed.checks import check
from testbed.deadline import Deadline
from testbed.fixtures import Facts, Paths
from testbed.labs.base import Node
from testbed.nodes.cni import CniError
from testbed.nodes.deploy import Cluster
from testbed.nodes.kubernetes import PREFIX, Call
from testbed.nodes.otherwise import restart_flanneld
from testbed.nodes.scratch import discard, scratch_pod
from testbed.probes.cnifiles import NETWORKS, read_cni_files
from testbed.probes.flows import ping
from testbed.probes.health import http_status

READY_SECONDS = 20.0
END_SECONDS = 45.0
"""A store that answers, but not with what is needed, is asked for 30 s."""
AT_ONCE_SECONDS = 15.0
NOBODY = "nobody"
LARGE = 22


@check("LSE-06", disruptive=True)
def test_another_public_address_is_published_and_used(paths: Paths, cluster: Cluster, facts: Facts) -> None:
    """Peers send to what an operator wrote, and the node's own end stays its interface's address. Source: S4, src."""
    node, api = cluster.members[-1], cluster.kubernetes
    local, public = str(node.spec.ip), node.spec.ip + 100
    nic, device = node.spec.underlay.name, str(cluster.flannel.tunnel_device)
    key = f"{PREFIX}public-ip-overwrite"

    def sent_to(address: str) -> None:
        said = api.nodes()[node.name]["metadata"]["annotations"].get(f"{PREFIX}public-ip")
        assert said == address, f"{node.name} publishes {said}, not {address}"
        for peer in cluster.members[:-1]:
            if cluster.flannel.backend.type == "vxlan" and facts.tunnelled(peer.name, node.name):
                found = destinations(cluster, facts, peer, node)
                assert found == [address], f"{peer.name} sends {node.name}'s packets to {found}, not {address}"

    node.run(["ip", "address", "add", f"{public}/32", "dev", nic])
    try:
        api.annotate(node.name, {key: str(public)})
        restart_flanneld(cluster, node.name)
        facts.forget()
        facts.eventually(lambda: sent_to(str(public)))
        if cluster.flannel.backend.type == "vxlan":
            found = facts.link(node.name, device).data.get("local")
            assert found == local, f"{node.name}: {device} is local to {found}, not {local}"
        path = paths.take("XS")
        assert Deadline(READY_SECONDS).poll(lambda: ping(path.source, path.address).lost == 0 or None)
    finally:
        api.annotate(node.name, {key: None})
        restart_flanneld(cluster, node.name)
        node.run(["ip", "address", "delete", f"{public}/32", "dev", nic])
        facts.forget()
    facts.eventually(lambda: sent_to(local))


def destinations(cluster: Cluster, facts: Facts, peer: Node, node: Node) -> list[str]:
    """Where a peer sends what it encapsulates for a node."""
    device, base = cluster.flannel.tunnel_device, cluster.pod_cidr(node.name)[0]
    state = facts.node(peer.name)
    macs = [one.mac for one in state.neighbours if (one.address, one.dev) == (base, device)]
    return [str(one.dst) for one in state.fdb if one.dev == device and one.mac in macs]


@check("LSE-08", disruptive=True)
def test_a_node_without_its_own_subnet_ends_flanneld(cluster: Cluster) -> None:
    """No podCIDR, or one outside the Network: the error names what is wrong. Source: src, S4."""
    node, api = cluster.members[-1], cluster.kubernetes
    conf = "/run/other-net-conf.json"
    away = "192.168.0.0/16"
    text = node.read("/etc/kube-flannel/net-conf.json").decode()
    node.write(conf, text.replace(str(cluster.flannel.network), away))
    controllers = "/run/kube-controller-manager.pid"
    signal = ["sh", "-c", 'kill -s "$1" "$(cat "$2")"', "signal"]
    cluster.stop_flanneld(node.name)
    try:
        said = ends(cluster, node, {}, f"--net-config-path={conf}", seconds=AT_ONCE_SECONDS)
        missing = [word for word in (str(cluster.pod_cidr(node.name)), away) if word not in said]
        assert not missing, f"the error does not name {missing}: {said}"
        api.node.run([*signal, "STOP", controllers])  # they would give the node a podCIDR
        try:
            api.ask(Call("POST", "/api/v1/nodes", {"metadata": {"name": NOBODY, "annotations": {"a": "b"}}}))
            said = ends(cluster, node, {"NODE_NAME": NOBODY})
        finally:
            api.try_delete(NOBODY)
            api.node.run([*signal, "CONT", controllers])
        assert "cidr not assigned" in said, f"the error does not say that there is no podCIDR: {said}"
    finally:
        restart_flanneld(cluster, node.name)


def ends(cluster: Cluster, node: Node, env: dict[str, str], *args: str, seconds: float = END_SECONDS) -> str:
    """How a flanneld that cannot go on ends: the last it said. It is an assertion that it does."""
    argv = ["timeout", f"{seconds:g}", *cluster.flanneld_argv(node.name), *args]
    given = {**cluster.flannel.env, **cluster.store.environment(node.name), **env}
    ended = node.run(argv, check=False, env=given, timeout=seconds + 20)
    said = (ended.stdout + ended.stderr)[-3000:]
    assert ended.rc not in (0, 124), f"flanneld goes on (exit {ended.rc}): {said}"
    return said


@check("LSE-09")
def test_a_subnet_has_room_for_all_its_hosts_but_the_bridge(cluster: Cluster) -> None:
    """From the second host address to the last; the next pod is refused, and leaves nothing. Source: S4."""
    node = cluster.members[-1]
    cidr = cluster.pod_cidr(node.name)
    if cidr.prefixlen < LARGE:
        pytest.skip(f"a /{cidr.prefixlen} has more addresses than can be filled in a moment")
    network = str(cluster.flannel.cni_conf["name"])
    before = read_cni_files(node, network)
    hosts = [host for host in cidr.hosts() if host != cidr[1] and host not in before.reserved]
    kept, filled = [hosts[0], hosts[-1]], hosts[1:-1]
    names = " ".join(f"{NETWORKS}/{network}/{host}" for host in filled)
    node.run(["sh", "-c", f"for file in {names}; do echo filled > $file; done"])
    pods, given = [], list[IPv4Address]()
    try:
        refused = ""
        for number in range(len(kept) + 1):
            try:
                pods.append(cluster.add_pod(node.name, f"room{number}"))
                given.append(pods[-1].address)
            except CniError as error:
                refused = str(error)
                break
        assert sorted(given) == kept, f"of {kept} pods got {given}, then: {refused}"
        assert "no IP addresses available" in refused, f"a full subnet is refused by: {refused}"
        after = read_cni_files(node, network)
        more = set(after.reserved.values()) - set(before.reserved.values()) - {"filled"}
        assert more == {pod.container_id for pod in pods}, f"the pod that was refused leaves {more}"
    finally:
        node.run(["sh", "-c", f"rm -f {names}"])
        for pod in pods:
            discard(cluster, pod)
    with scratch_pod(cluster, node.name):
        pass


@check("LSE-10", disruptive=True)
def test_a_restart_changes_nothing(cluster: Cluster, facts: Facts) -> None:
    """The same podCIDR, tunnel's MAC and subnet.env, byte for byte. Source: flannel's own tests, #1850."""
    port = cluster.flannel.healthz_port
    if port is None:
        pytest.skip("without --healthz-port nobody can tell when flanneld has started")
    node = cluster.members[-1]
    facts.forget()
    before = identity(cluster, facts, node)
    cluster.stop_flanneld(node.name)
    cluster.start_flanneld(node.name)
    ready = Deadline(READY_SECONDS).poll(lambda: http_status(node, port, "/readyz") == 200 or None)
    assert ready, f"{node.name} is not ready again\n{cluster.flanneld_log(node.name)}"
    facts.forget()
    after = identity(cluster, facts, node)
    assert after == before, f"{node.name} had {before}, and has {after}"


def identity(cluster: Cluster, facts: Facts, node: Node) -> dict[str, str]:
    """What pods and peers know a node by."""
    device = cluster.flannel.tunnel_device
    return {
        "subnet.env": node.read(cluster.flannel.subnet_file).decode(),
        "lease": str(cluster.leases()[node.name]["key"]),
        "MAC": facts.link(node.name, device).mac if device else "",
    }
