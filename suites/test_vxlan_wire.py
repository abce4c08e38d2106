"""VXE: vxlan on the wire."""

from __future__ import annotations

from testbed.checks import check
from testbed.fixtures import Facts, Path
from testbed.nodes.deploy import Cluster
from testbed.probes.capture import Window
from testbed.probes.flows import Nonce, ping, pinged, udp_flows
from testbed.probes.packets import Decoded, Ether, Icmp, Ip

PINGS = 3
VALID = 0x08
"""The I flag: the VNI counts. Every other bit is 0 unless a policy is configured."""


def ether_of(packet: Decoded) -> Ether:
    """The Ethernet header, which has to be there."""
    assert packet.ether is not None, f"no Ethernet header: {packet}"
    return packet.ether


def ip_of(packet: Decoded) -> Ip:
    """The IPv4 header, which has to be there."""
    assert packet.ip is not None, f"no IPv4 header: {packet}"
    return packet.ip


def icmp_of(packet: Decoded) -> Icmp:
    """The ICMP header, which has to be there."""
    assert packet.icmp is not None, f"no ICMP header: {packet}"
    return packet.icmp


def inner_of(packet: Decoded) -> Decoded:
    """What the packet carries; it has to carry something."""
    assert packet.inner is not None, f"not encapsulated: {packet}"
    return packet.inner


@check("VXE-01", encapsulated=True)
def test_outer_headers_are_flannel_s(path: Path, cluster: Cluster, window: Window) -> None:
    """Node to node by UDP to the Port, a VXLAN header with the VNI and nothing else. Source: S0, S2, S4."""
    nonce = pinged(path.source, path.address, PINGS)
    source, target = path.source_node.spec.ip, path.target_node.spec.ip
    seen = window.packets(path.source_nic, nonce, at_least=2 * PINGS)
    assert [(ip_of(p).src, ip_of(p).dst) for p in seen] == [(source, target), (target, source)] * PINGS
    for packet in seen:
        assert packet.udp, f"not UDP: {packet}"
        assert packet.udp.dport == cluster.flannel.port, f"outer port {packet.udp.dport}"
        assert packet.vxlan, f"no VXLAN header: {packet}"
        assert packet.vxlan.vni == cluster.flannel.vni, f"VNI {packet.vxlan.vni}"
        assert (packet.vxlan.flags, packet.vxlan.reserved) == (VALID, 0), f"{packet.vxlan}"


@check("VXE-02", encapsulated=True)
def test_outer_frames_go_to_the_next_hop(path: Path, facts: Facts, window: Window) -> None:
    """To the leaf where the peer is in another subnet, to the peer's own MAC where it is not. Source: S0, S2."""
    nonce = pinged(path.source, path.address, PINGS)
    source, target = path.source_node.spec, path.target_node.spec
    away, arrived = target.underlay.mac, source.underlay.mac
    if path.kind == "XS":
        away, arrived = gateway_mac(facts, path.source_node.name), gateway_mac(facts, path.target_node.name)
    sent = window.select(path.source_nic, nonce, lambda p: ip_of(p).src == source.ip, at_least=PINGS)
    assert [(ether_of(p).src, ether_of(p).dst) for p in sent] == [(source.underlay.mac, away)] * PINGS
    got = window.select(path.target_nic, nonce, lambda p: ip_of(p).src == source.ip, at_least=PINGS)
    assert [(ether_of(p).src, ether_of(p).dst) for p in got] == [(arrived, target.underlay.mac)] * PINGS


def gateway_mac(facts: Facts, node: str) -> str:
    """The MAC of a node's gateway: its leaf's interface with the gateway's address."""
    spec = facts.cluster.lab.spec.node(node)
    links = facts.node(str(spec.rack)).links
    return next(link.mac for link in links if spec.gateway in {address.ip for address in link.addresses})


@check("VXE-03", encapsulated=True)
def test_inner_frame_is_between_the_devices(path: Path, cluster: Cluster, facts: Facts, window: Window) -> None:
    """The inner MACs are the vxlan devices', not the pods'. Source: S0, S2."""
    nonce = pinged(path.source, path.address, PINGS)
    device = str(cluster.flannel.tunnel_device)
    here, there = (facts.link(node.name, device).mac for node in (path.source_node, path.target_node))
    seen = window.packets(path.source_nic, nonce, at_least=2 * PINGS)
    found = [(ether_of(inner_of(p)).src, ether_of(inner_of(p)).dst) for p in seen]
    assert found == [(here, there), (there, here)] * PINGS


@check("VXE-04", encapsulated=True)
def test_inner_packet_is_the_pod_s(path: Path, window: Window) -> None:
    """Addresses, ICMP and payload as the pod sent them, one hop older on the wire, two at the receiver. Source: S0."""
    source, target = path.pods
    nonce = pinged(path.source, path.address, PINGS)

    def requests(packets: list[Decoded]) -> list[Decoded]:
        return [p for p in packets if icmp_of(p).type == 8]

    sent = requests(window.packets(f"{source.name}:eth0", nonce, at_least=2 * PINGS))
    wire = requests([inner_of(p) for p in window.packets(path.source_nic, nonce, at_least=2 * PINGS)])
    got = requests(window.packets(f"{target.name}:eth0", nonce, at_least=2 * PINGS))
    original = [(ip_of(p).src, ip_of(p).dst, p.icmp, p.payload) for p in sent]
    assert len(original) == PINGS
    assert {(p[0], p[1]) for p in original} == {(source.address, target.address)}
    for place, packets, ttl in (("on the wire", wire, 63), ("at the receiver", got, 62)):
        assert [(ip_of(p).src, ip_of(p).dst, p.icmp, p.payload) for p in packets] == original, place
        assert {ip_of(p).ttl for p in packets} == {ttl}, place


@check("VXE-05")
def test_pods_speak_to_their_bridge(path: Path, cluster: Cluster, facts: Facts, window: Window) -> None:
    """The first hop is the bridge's MAC, which the pod knows by ARP; so is the last. Source: S0, S1, S3."""
    source, target = path.pods
    nonce = pinged(path.source, path.address, PINGS)
    near, far = (facts.link(node.name, cluster.flannel.bridge) for node in (path.source_node, path.target_node))
    facts.forget()  # the ping has just made the pod ask for its gateway
    gateway = facts.address(path.source_node.name, cluster.flannel.bridge)
    known = {n.address: n.mac for n in facts.pod(source).neighbours}
    assert known.get(gateway) == near.mac, f"{source.name} has {known} for its gateway {gateway}"
    sent = window.select(f"{source.name}:eth0", nonce, lambda p: ip_of(p).src == source.address, at_least=PINGS)
    assert [(ether_of(p).src, ether_of(p).dst) for p in sent] == [(source.mac, near.mac)] * PINGS
    veth = f"{path.target_node.name}:{facts.host_veth(target).name}"
    got = window.select(veth, nonce, lambda p: ip_of(p).src == source.address, at_least=PINGS)
    assert [(ether_of(p).src, ether_of(p).dst) for p in got] == [(far.mac, target.mac)] * PINGS


@check("VXE-06", encapsulated=True)
def test_overhead_is_fifty_bytes(path: Path, cluster: Cluster, window: Window) -> None:
    """A frame of 98 bytes becomes one of 148. Source: S2, S4."""
    nonce = pinged(path.source, path.address, PINGS)
    seen = window.packets(path.source_nic, nonce, at_least=2 * PINGS)
    found = [(inner_of(p).length, p.length) for p in seen]
    wanted = [(98, 98 + cluster.flannel.backend.overhead)] * 2 * PINGS
    assert found == wanted, f"inner and outer lengths: {found}"


@check("VXE-09", encapsulated=True)
def test_one_source_port_for_the_pings_of_a_pair(path: Path, window: Window) -> None:
    """ICMP ids are not part of the hash: several pings, one outer source port. Source: S0."""
    nonces = [pinged(path.source, path.address, PINGS) for _ in range(4)]
    ports = {port for nonce in nonces for port in outer_ports(path, window, nonce, PINGS)}
    assert len(ports) == 1, f"outer source ports {sorted(ports)}"


def outer_ports(path: Path, window: Window, nonce: Nonce, count: int) -> list[int]:
    """The outer source ports of what the path's source sent."""
    source = path.source_node.spec.ip
    seen = window.select(path.source_nic, nonce, lambda p: ip_of(p).src == source, at_least=count)
    assert len(seen) >= count, f"{len(seen)} packets left {path.source_nic}, {count} were sent"
    return [p.udp.sport for p in seen if p.udp]


@check("VXE-10", encapsulated=True)
def test_flows_have_source_ports_of_their_own(path: Path, cluster: Cluster, window: Window) -> None:
    """At least 45 outer ports for 50 UDP flows; another pod's ping has another port. Source: S0."""
    nonce = Nonce.new()
    flows = udp_flows(path.source, path.address, count=50, nonce=nonce)
    assert all(flow.reply for flow in flows), f"{sum(not flow.reply for flow in flows)} of 50 flows had no answer"
    ports = set(outer_ports(path, window, nonce, 50))
    assert len(ports) >= 45, f"{len(ports)} outer source ports for 50 flows"
    neighbour = next(p for p in cluster.pods.values() if p.node.name == path.source_node.name and p is not path.source)
    other = Nonce.new()
    ping(neighbour, path.address, nonce=other)
    pair = outer_ports(path, window, pinged(path.source, path.address), 1)
    assert set(outer_ports(path, window, other, 1)) != set(pair), "two pods, one outer source port"


@check("VXE-12")
def test_forwarding_needs_no_flanneld(path: Path, cluster: Cluster) -> None:
    """Two seconds without any flanneld that runs lose no packet: the kernel forwards by itself. Source: S4."""
    for node in cluster.members:
        cluster.signal_flanneld(node.name, "STOP")
    try:
        answer = ping(path.source, path.address, count=40)
    finally:
        for node in cluster.members:
            cluster.signal_flanneld(node.name, "CONT")
    assert answer.lost == 0, f"{answer.lost} of {answer.sent} lost while flanneld was stopped"
