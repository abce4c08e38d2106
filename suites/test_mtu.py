"""MTU: from the underlay's to the pods'."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from testbed.checks import check
from testbed.fixtures import Facts, Path
from testbed.flannelspec import UDP_ENCAP_OVERHEAD
from testbed.nodes.deploy import Cluster
from testbed.probes.capture import Window
from testbed.probes.encrypted import encrypted
from testbed.probes.flows import ICMP_HEADERS, Nonce, ping
from testbed.probes.iproute import counters
from testbed.probes.packets import Decoded

ETHERNET_HEADER = 14

#: What encrypting backends make of an inner packet, in bytes, with IPv4 outside and their default ciphers. wireguard:
#: IPv4 20, UDP 8, its header 16 and tag 16. ESP: IPv4 20, its header 8, IV 8 and tag 16, two bytes and padding to four.
ENCRYPTED: Mapping[str, Callable[[int], int]] = {
    "wireguard": lambda inner: inner + 60,
    "ipsec": lambda inner: 52 + (inner + 2 + 3) // 4 * 4,
}


@check("MTU-01")
def test_flannel_mtu_is_the_underlay_s_less_the_overhead(cluster: Cluster, facts: Facts) -> None:
    """FLANNEL_MTU follows from the underlay's MTU, and the device has it too. Source: S0 to S4, #841, #897."""
    for node in cluster.members:
        underlay = facts.link(node.name, node.spec.underlay.name).mtu
        wanted = cluster.flannel.mtu_of(underlay)
        assert cluster.subnet_env(node.name)["FLANNEL_MTU"] == str(wanted), f"{node.name}: underlay {underlay}"
        name = cluster.flannel.tunnel_device or node.spec.underlay.name
        if cluster.flannel.backend.tunnels and not cluster.flannel.tunnel_device:
            continue  # ipsec has no device; that pods have this MTU is POD-09's matter
        device = facts.link(node.name, name)
        assert device.mtu == wanted, f"{node.name}: {device.name} has {device.mtu}, FLANNEL_MTU is {wanted}"


@check("MTU-02")
def test_largest_packet_passes_and_one_byte_more_does_not(path: Path, facts: Facts) -> None:
    """With DF set, FLANNEL_MTU bytes are answered, and one more is refused locally. Source: S0, S4."""
    mtu = facts.mtu(path.source_node.name)
    fits = ping(path.source, path.address, size=mtu - ICMP_HEADERS, count=2, dont_fragment=True)
    assert fits.lost == 0, fits.output
    over = ping(path.source, path.address, size=mtu - ICMP_HEADERS + 1, dont_fragment=True, wait=1)
    assert over.received == 0, over.output
    assert (over.errors, over.local_mtu) == (1, mtu), over.output


def outer_packets(cluster: Cluster, path: Path, window: Window, wire: str, nonce: Nonce) -> list[Decoded]:
    """The packets that carried a ping with that nonce; where they are encrypted, the longest ones between the nodes."""
    if not ENCRYPTED.get(cluster.flannel.backend.type):
        return window.packets(wire, nonce, at_least=4)
    # A plain packet that follows shows that the capture has come as far.
    control = Nonce.new()
    ping(path.source_node, path.target_node.spec.ip, nonce=control)
    window.packets(wire, control, at_least=2)
    return sorted(encrypted(cluster, path, window, wire), key=lambda p: p.length)[-4:]


def outer_length(cluster: Cluster, mtu: int, underlay: int) -> int:
    """The bytes of the outer IP packet for an inner one of FLANNEL_MTU."""
    added = ENCRYPTED.get(cluster.flannel.backend.type)
    if added is None:
        return underlay
    # FLANNEL_MTU leaves room for IPv6 outside (wireguard), and for the ciphers that take most (ipsec).
    return added(mtu) + (UDP_ENCAP_OVERHEAD if cluster.flannel.backend_keys.get("UDPEncap") else 0)


@check("MTU-03", encapsulated=True)
def test_largest_packet_fills_the_underlay_unfragmented(path: Path, cluster: Cluster, window: Window) -> None:
    """At FLANNEL_MTU the outer frame has exactly the underlay's size; nothing is fragmented. Source: talos#13457."""
    machines = [cluster.lab.node(machine.name) for machine in cluster.lab.spec.nodes]
    before = {machine.name: counters(machine, "IpFragCreates") for machine in machines}
    nonce, mtu = Nonce.new(), int(cluster.subnet_env(path.source_node.name)["FLANNEL_MTU"])
    answer = ping(path.source, path.address, nonce=nonce, size=mtu - ICMP_HEADERS, count=2, dont_fragment=True)
    assert answer.lost == 0, answer.output
    for wire, node in zip(path.wires, (path.source_node, path.target_node), strict=True):
        seen = outer_packets(cluster, path, window, wire, nonce)
        assert not [p for p in seen if p.ip and p.ip.fragment], f"{wire}: fragments"
        full = outer_length(cluster, mtu, node.spec.underlay.mtu) + ETHERNET_HEADER
        assert [p.length for p in seen] == [full] * 4, f"{wire}: {[p.length for p in seen]}, not {full}"
    after = {machine.name: counters(machine, "IpFragCreates") for machine in machines}
    assert after == before, "a machine of the lab fragmented packets"
