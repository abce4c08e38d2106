"""V6: pods that speak IPv6 to each other, as the wire carries it."""

from __future__ import annotations

from testbed.checks import check
from testbed.fixtures import Facts, Path
from testbed.fixtures6 import Facts6, ends6
from testbed.flannelspec import OVERHEAD6
from testbed.nodes.deploy import Cluster
from testbed.probes.capture import Window
from testbed.probes.flows import ICMP6_HEADERS, Nonce, http_get, ping, pinged, udp_flows
from testbed.probes.iproute import counters
from testbed.probes.packets import Decoded, Ip6

PINGS = 3
ETHERNET_HEADER = 14
ECHO_REQUEST, UDP = 128, 17
VALID = 0x08
"""The I flag of a VXLAN header: the VNI counts."""


def ip6_of(packet: Decoded) -> Ip6:
    """The IPv6 header, which has to be there."""
    assert packet.ip6 is not None, f"no IPv6 header: {packet}"
    return packet.ip6


def inner_of(packet: Decoded) -> Decoded:
    """What the packet carries; it has to carry something."""
    assert packet.inner is not None, f"not encapsulated: {packet}"
    return packet.inner


@check("V6-01")
def test_pods_reach_each_other_by_ipv6(path: Path, cluster: Cluster, facts: Facts, facts6: Facts6) -> None:
    """Ping, HTTP and UDP between two nodes' pods, one route there, both addresses as they are. Source: #2536."""
    source, target = ends6(path)
    near, far = path.source_node.name, path.target_node.name
    cidr = cluster.pod_cidr6(far)
    assert (source in cluster.pod_cidr6(near), target in cidr) == (True, True), f"{source}, {target}"

    def one_route() -> None:
        routes = facts6.node(near).routes_to(cidr)
        if cluster.flannel.backend.type == "wireguard":  # the whole IPv6Network by one route
            routes = facts6.node(near).routes_to(facts6.network)
        device = cluster.flannel.tunnel_device6 if facts.tunnelled(near, far) else path.source_node.spec.underlay.name
        assert [route.dev for route in routes] == [device], f"{near}: {routes}"

    facts6.eventually(one_route)
    answer = ping(path.source, target, count=2)
    assert (answer.lost, answer.ttls) == (0, (62, 62)), answer.output
    reply = http_get(path.source, target)
    assert not reply.error, reply.error
    assert (reply.pod, reply.peer) == (path.pods[1].pod_name, source), f"{reply.facts}"
    flows = udp_flows(path.source, target, count=4, nonce=Nonce.new())
    assert all(flow.reply for flow in flows), f"{flows}"


@check("V6-10", encapsulated=True)
def test_outer_headers_are_ipv6_with_the_vni(path: Path, cluster: Cluster, facts: Facts, window: Window) -> None:
    """Node to node by IPv6 and UDP with a checksum, VXLAN with the VNI, between the second devices. Source: src."""
    nonce = pinged(path.source, ends6(path)[1], PINGS)
    here, there = path.source_node.spec.ip6, path.target_node.spec.ip6
    device = str(cluster.flannel.tunnel_device6)
    macs = [facts.link(node.name, device).mac for node in (path.source_node, path.target_node)]
    seen = window.packets(path.source_nic, nonce, at_least=2 * PINGS)
    assert [(ip6_of(p).src, ip6_of(p).dst) for p in seen] == [(here, there), (there, here)] * PINGS
    for packet in seen:
        assert packet.ip is None, f"IPv4 outside: {packet}"
        assert packet.udp, f"not UDP: {packet}"
        assert (ip6_of(packet).next, packet.udp.dport) == (UDP, cluster.flannel.port), f"{packet}"
        assert packet.udp.checksum != 0, "no UDP checksum, which IPv6 asks for"
        assert packet.vxlan, f"no VXLAN header: {packet}"
        found = (packet.vxlan.vni, packet.vxlan.flags, packet.vxlan.reserved)
        assert found == (cluster.flannel.vni, VALID, 0), f"{packet.vxlan}"
    inner = [inner_of(p).ether for p in seen]
    assert [(e.src, e.dst) for e in inner if e] == [(macs[0], macs[1]), (macs[1], macs[0])] * PINGS


@check("V6-11", encapsulated=True)
def test_inner_packet_is_the_pod_s(path: Path, window: Window) -> None:
    """Addresses, ICMPv6 and payload as sent, a hop older on the wire and two at the end, 70 bytes more. Source: src."""
    source, target = ends6(path)
    nonce = pinged(path.source, ends6(path)[1], PINGS)

    def requests(packets: list[Decoded]) -> list[Decoded]:
        return [p for p in packets if p.icmp and p.icmp.type == ECHO_REQUEST]

    sent = requests(window.packets(f"{path.source.name}:eth0", nonce, at_least=2 * PINGS))
    outer = window.packets(path.source_nic, nonce, at_least=2 * PINGS)
    got = requests(window.packets(f"{path.target.name}:eth0", nonce, at_least=2 * PINGS))
    original = [(source, target, p.icmp, p.payload) for p in sent]
    assert len(original) == PINGS
    wire = requests([inner_of(p) for p in outer])
    for place, packets, hops in (("the pod", sent, 64), ("the wire", wire, 63), ("the receiver", got, 62)):
        assert [(ip6_of(p).src, ip6_of(p).dst, p.icmp, p.payload) for p in packets] == original, place
        assert {ip6_of(p).hops for p in packets} == {hops}, place
    assert [p.length - inner_of(p).length for p in outer] == [OVERHEAD6["vxlan"]] * 2 * PINGS


@check("V6-12", direct=True)
def test_direct_packets_are_plain(path: Path, window: Window) -> None:
    """Between nodes of one subnet the pods' IPv6 packets go as they are, from NIC to NIC. Source: S0."""
    nonce = pinged(path.source, ends6(path)[1], PINGS)
    seen = window.packets(path.source_nic, nonce, at_least=2 * PINGS)
    here, there = path.source_node.spec.underlay.mac, path.target_node.spec.underlay.mac
    found = [(p.ether.src, p.ether.dst, ip6_of(p).src, ip6_of(p).dst, bool(p.icmp)) for p in seen if p.ether]
    pods = ends6(path)
    assert found == [(here, there, *pods, True), (there, here, *reversed(pods), True)] * PINGS


@check("V6-02")
def test_largest_packet_passes_and_one_byte_more_does_not(
    path: Path, cluster: Cluster, facts6: Facts6, window: Window
) -> None:
    """The largest is told to the sender, and fills the tunnel without fragments. Source: #1781, calico's tests."""
    target = ends6(path)[1]
    mtu = facts6.path_mtu(path.source_node.name, path.target_node.name)
    tunnelled = facts6.facts.tunnelled(path.source_node.name, path.target_node.name)
    machines = [cluster.lab.node(machine.name) for machine in cluster.lab.spec.nodes]
    before = {machine.name: counters(machine, "Ip6FragCreates") for machine in machines}
    path.source.run(["ip", "-6", "route", "flush", "cache"])  # the pod is to learn now how much passes
    nonce = Nonce.new()
    fits = ping(path.source, target, nonce=nonce, size=mtu - ICMP6_HEADERS, count=2, dont_fragment=True)
    assert fits.lost == 0, fits.output
    over = ping(path.source, target, size=mtu - ICMP6_HEADERS + 1, dont_fragment=True, wait=1)
    assert over.received == 0, over.output
    assert mtu in (over.local_mtu, over.path_mtu), over.output
    after = {machine.name: counters(machine, "Ip6FragCreates") for machine in machines}
    assert after == before, "a machine of the lab fragmented packets"
    if cluster.flannel.backend.type != "wireguard":  # there nothing can be recognised on the wire
        seen = window.packets(path.source_nic, nonce, at_least=4)
        full = (path.source_node.spec.underlay.mtu if tunnelled else mtu) + ETHERNET_HEADER
        assert [p.length for p in seen] == [full] * 4, f"{[p.length for p in seen]}, not {full}"
