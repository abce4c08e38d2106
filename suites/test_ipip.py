"""IPIP: the ipip device, its routes, and its packets on the wire."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import IPv4Interface

from testbed.checks import check, inconclusive
from testbed.fixtures import Facts, Path, Paths
from testbed.labs.base import Node
from testbed.nodes.deploy import Cluster
from testbed.probes.capture import Window
from testbed.probes.flows import Nonce, http_get, ping
from testbed.probes.packets import Decoded

IPIP_PROTOCOL = 4
KERNEL_S_OWN = "tunl0"


@check("IPIP-01")
def test_device_is_one_tunnel_to_all(cluster: Cluster, facts: Facts) -> None:
    """Any remote, the node's address as local, TTL and DF from inside; no ARP, up. Source: S0, S4."""
    for node in cluster.members:
        device = facts.link(node.name, str(cluster.flannel.tunnel_device))
        assert device.kind == "ipip", f"{node.name}: {device.name} is a {device.kind or 'plain device'}"
        found = {key: device.data.get(key) for key in ("remote", "local", "ttl", "pmtudisc")}
        wanted = {"remote": "any", "local": str(node.spec.ip), "ttl": 0, "pmtudisc": False}
        assert found == wanted, f"{node.name}: {found}"
        assert {"NOARP", "UP"} <= device.flags, f"{node.name}: {sorted(device.flags)}"


@check("IPIP-02")
def test_one_mtu_from_the_device_to_the_pod(cluster: Cluster, facts: Facts) -> None:
    """The underlay's MTU less 20 on the device, the bridge, the veths and in the pods. Source: S0, S3, S4."""
    for pod in cluster.pods.values():
        node = pod.node.name
        wanted = cluster.lab.spec.node(node).underlay.mtu - cluster.flannel.backend.overhead
        device = facts.link(node, str(cluster.flannel.tunnel_device)).mtu
        assert (device, *facts.mtus(pod)) == (wanted,) * 4, f"{pod.name}: {device}, {facts.mtus(pod)}"


@check("IPIP-03")
def test_device_has_the_subnet_s_base_address(cluster: Cluster, facts: Facts) -> None:
    """The podCIDR's base address as /32. Source: S4."""
    for node, cidr in facts.pod_cidrs().items():
        device = facts.link(node, str(cluster.flannel.tunnel_device))
        assert device.addresses == (IPv4Interface((cidr[0], 32)),), f"{node}: {device.addresses}"


@check("IPIP-05")
def test_one_onlink_route_a_tunnelled_peer(cluster: Cluster, facts: Facts) -> None:
    """Each such peer by its node's own address through the device, onlink; nothing else there. Source: S0, S4."""
    device = str(cluster.flannel.tunnel_device)

    def look() -> None:
        for node in cluster.members:
            routes = [r for r in facts.node(node.name).routes if r.dev == device]
            found = {(r.dst, r.gateway, "onlink" in r.flags) for r in routes}
            peers = facts.tunnelled_peers(node.name).items()
            wanted = {(cidr, cluster.lab.spec.node(peer).ip, True) for peer, cidr in peers}
            assert found == wanted, f"{node.name}: {found}"
            assert len(routes) == len(wanted), f"{node.name}: {routes}"

    facts.eventually(look)


@check("IPIP-06", encapsulated=True)
def test_outer_header_is_node_to_node(path: Path, window: Window) -> None:
    """Protocol 4 between the nodes' addresses, the pods' packet inside and nothing in between. Source: S0, S4."""
    source, target = path.pods
    nonce = Nonce.new()
    answer = ping(source, target.address, nonce=nonce, count=2)
    assert answer.lost == 0, answer.output
    here, there = path.source_node.spec.ip, path.target_node.spec.ip
    seen = window.packets(path.source_nic, nonce, at_least=4)
    outer = [(p.ip.src, p.ip.dst, p.ip.proto) for p in seen if p.ip]
    assert outer == [(here, there, IPIP_PROTOCOL), (there, here, IPIP_PROTOCOL)] * 2
    inner = [(p.inner.ip.src, p.inner.ip.dst) for p in seen if p.inner and p.inner.ip]
    assert inner == [(source.address, target.address), (target.address, source.address)] * 2


@check("IPIP-04")
def test_the_kernel_s_own_tunnel_carries_nothing(paths: Paths, cluster: Cluster, facts: Facts) -> None:
    """tunl0 comes with the module, and is made here where it does not; no packet goes by it. Source: S0."""
    path = paths.take("XS")
    nodes = (path.source_node, path.target_node)

    def counted(device: str) -> list[tuple[int, int]]:
        facts.forget()
        links = [facts.link(node.name, device) for node in nodes]
        return [(link.rx_packets, link.tx_packets) for link in links]

    device = str(cluster.flannel.tunnel_device)
    with ExitStack() as stack:
        for node in nodes:
            stack.enter_context(kernel_s_tunnel(node))
        before, used = counted(KERNEL_S_OWN), counted(device)
        answer = ping(path.source, path.address, count=3)
        assert answer.lost == 0, answer.output
        after, carried = counted(KERNEL_S_OWN), counted(device)
    assert after == before, f"{KERNEL_S_OWN} carried packets: {before} before, {after} after"
    for (received, sent), (now_received, now_sent) in zip(used, carried, strict=True):
        if min(now_received - received, now_sent - sent) < 3:
            inconclusive(f"{device} did not carry all three pings, so this proves nothing")


@contextmanager
def kernel_s_tunnel(node: Node) -> Iterator[None]:
    """The node has a tunl0, up, for as long as the block lasts."""
    if node.run(["ip", "link", "show", KERNEL_S_OWN], check=False).ok:
        yield
        return
    node.run(["ip", "link", "add", KERNEL_S_OWN, "type", "ipip", "remote", "any", "local", "any"])
    try:
        node.run(["ip", "link", "set", "dev", KERNEL_S_OWN, "up"])
        yield
    finally:
        node.run(["ip", "link", "delete", KERNEL_S_OWN])


@check("IPIP-07")
def test_nothing_stands_between_the_headers(paths: Paths, facts: Facts, window: Window) -> None:
    """Ethernet to and from the leaf, 20 bytes of IPv4, then the pod's IPv4 packet. Source: S0, S4."""
    path, nonce = paths.take("XS"), Nonce.new()
    answer = ping(path.source, path.address, nonce=nonce)
    assert answer.lost == 0, answer.output
    here, there = path.source_node.spec, path.target_node.spec
    for nic, ends in (
        (path.source_nic, (here.underlay.mac, facts.leaf_mac(here.name))),
        (path.target_nic, (facts.leaf_mac(there.name), there.underlay.mac)),
    ):
        seen = window.select(nic, nonce, lambda p: bool(p.ip and p.ip.src == here.ip), at_least=1)
        assert [(p.ether.src, p.ether.dst) for p in seen if p.ether] == [ends], f"{nic}: {seen}"
        inside = [p.inner for p in seen if p.inner]
        assert [(one.ether, one.ip.length if one.ip else 0) for one in inside] == [(None, seen[0].length - 20 - 14)]


@check("IPIP-10")
def test_a_node_speaks_to_remote_pods_by_its_tunnel_s_address(cluster: Cluster, facts: Facts) -> None:
    """The podCIDR's base address is what such a pod sees. Source: S4."""
    for node in cluster.members:
        for peer in facts.tunnelled_peers(node.name):
            pod = cluster.pods[f"{peer}/testapp"]
            answer = http_get(node, pod.address)
            assert not answer.error, f"{node.name} to {pod.name}: {answer.error}"
            assert answer.peer == cluster.pod_cidr(node.name)[0], f"{pod.name} saw {answer.peer}"


@check("IPIP-12")
def test_ttl_and_df_come_from_inside(paths: Paths, window: Window) -> None:
    """The outer header has the inner one's, with and without DF. Source: S4."""
    path = paths.take("XS")
    for whole in (True, None):
        nonce = Nonce.new()
        answer = ping(path.source, path.address, nonce=nonce, dont_fragment=whole)
        assert answer.lost == 0, answer.output
        seen = window.select(path.source_nic, nonce, lambda p: bool(p.icmp is None and p.inner), at_least=2)
        asked = [p for p in seen if p.ip and p.ip.src == path.source_node.spec.ip]
        found = [((p.ip.ttl, p.ip.dont_fragment), _ttl_and_df(p.inner)) for p in asked if p.ip]
        assert len(found) == 1, f"{len(found)} requests"
        assert found[0][0] == found[0][1], f"outside {found[0][0]}, inside {found[0][1]}"
        assert found[0][1][1] == bool(whole)


def _ttl_and_df(packet: Decoded | None) -> tuple[int, bool]:
    return (packet.ip.ttl, packet.ip.dont_fragment) if packet and packet.ip else (0, False)
