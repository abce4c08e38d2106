"""UDP: what is in the packets that flanneld copies, and what it does with those that are for nobody."""

from __future__ import annotations

import pytest

from testbed.checks import check
from testbed.fixtures import Facts, Path, Paths
from testbed.nodes.deploy import Cluster
from testbed.nodes.madeup import free_subnets
from testbed.probes.capture import Window
from testbed.probes.flows import Nonce, ping, pinged
from testbed.probes.iproute import route_get
from testbed.probes.packets import Decoded

PINGS = 2
FRAME = 98
"""Bytes of a ping's frame: Ethernet, IPv4, ICMP, and 56 of payload."""


def requests(packets: list[Decoded]) -> list[Decoded]:
    """The requests among pings."""
    return [p for p in packets if p.icmp and p.icmp.type == 8]


@check("UDP-06")
def test_payload_is_a_bare_ip_packet(path: Path, cluster: Cluster, window: Window) -> None:
    """No inner frame: one of 98 bytes becomes one of 126. Source: S0, S1."""
    nonce = Nonce.new()
    ping(path.source, path.address, nonce=nonce, count=PINGS)
    seen = window.packets(path.source_nic, nonce, at_least=PINGS)
    assert len(seen) >= PINGS, f"{len(seen)} packets on the wire"
    for packet in seen:
        assert packet.udp, f"not UDP: {packet}"
        assert packet.inner, f"no bare IP packet in UDP: {packet.payload[:20].hex()}"
        assert packet.inner.ether is None, f"a frame in UDP: {packet.inner}"
        assert packet.length == FRAME + cluster.flannel.backend.overhead, f"{packet.length} bytes on the wire"


@check("UDP-07")
def test_device_carries_ip_alone(path: Path, cluster: Cluster, window: Window) -> None:
    """No MACs on the device, and the ping on it is the pod's own. Source: S1."""
    nonce = Nonce.new()
    ping(path.source, path.address, nonce=nonce, count=PINGS)
    sent = requests(window.packets(f"{path.source.name}:eth0", nonce, at_least=2 * PINGS))
    original = [(p.icmp, p.payload) for p in sent[:PINGS]]
    for node in (path.source_node, path.target_node):
        place = f"{node.name}:{cluster.flannel.tunnel_device}"
        seen = window.packets(place, nonce, at_least=2 * PINGS)
        assert all(p.ether is None for p in seen), f"{place}: a frame, not an IP packet"
        found = [(p.icmp, p.payload) for p in requests(seen)]
        assert found == original, f"{place}: not the ping that the pod sent: {found}"


@check("UDP-10")
def test_peers_of_every_subnet_are_treated_alike(path: Path, cluster: Cluster, window: Window) -> None:
    """By the Network's route and in UDP, also to a peer of the node's own subnet. Source: S0, S1."""
    device, network = str(cluster.flannel.tunnel_device), cluster.flannel.network
    for node, address in ((path.source_node, path.address), (path.target_node, path.source.address)):
        (route,) = route_get(node, address)
        found = (route.dst, route.gateway, route.dev) if route else None
        assert found == (network, None, device), f"{node.name}: {address} by {found}"
    nonce = pinged(path.source, path.address, PINGS)
    for nic in (path.source_nic, path.target_nic):
        seen = window.packets(nic, nonce, at_least=2 * PINGS)
        assert [p.encapsulated for p in seen] == [True] * 2 * PINGS, f"{nic}: {seen}"


@check("UDP-12")
def test_macs_end_where_the_device_begins(path: Path, cluster: Cluster, facts: Facts, window: Window) -> None:
    """Each hop has MACs of its own, the device none; the addresses are the pods' all the way. Source: S1."""
    source, target = path.pods
    nonce = Nonce.new()
    ping(source, target.address, nonce=nonce, count=PINGS)
    near, far = (facts.link(node.name, cluster.flannel.bridge).mac for node in (path.source_node, path.target_node))
    device = cluster.flannel.tunnel_device
    hops = [
        (f"{source.name}:eth0", (source.mac, near)),
        (f"{path.source_node.name}:{device}", None),
        (f"{path.target_node.name}:{device}", None),
        (f"{path.target_node.name}:{facts.host_veth(target).name}", (far, target.mac)),
    ]
    for place, macs in hops:
        seen = requests(window.select(place, nonce, lambda p: bool(p.icmp and p.icmp.type == 8), at_least=PINGS))
        found = [(p.ip.src, p.ip.dst) for p in seen if p.ip]
        assert found == [(source.address, target.address)] * PINGS, f"{place}: addresses {found}"
        assert {(p.ether.src, p.ether.dst) if p.ether else None for p in seen} == {macs}, f"{place}: other MACs"


@check("UDP-13")
def test_an_address_without_a_lease_is_unreachable(cluster: Cluster, paths: Paths) -> None:
    """The sender is told so at once, by ICMP. Source: src."""
    path = paths.remote()
    subnets = free_subnets(cluster, 1)
    if not subnets:
        pytest.skip("every subnet of the Network is leased")
    answer = ping(path.source, subnets[0][2], wait=1)
    assert answer.received == 0, answer.output
    assert "Destination Net Unreachable" in answer.output, f"not told: {answer.output}"
