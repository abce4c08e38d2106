"""MTU: from the underlay's to the pods'."""

from __future__ import annotations

from testbed.checks import check
from testbed.fixtures import Facts, Path
from testbed.nodes.deploy import Cluster
from testbed.probes.capture import Window
from testbed.probes.flows import ICMP_HEADERS, Nonce, ping
from testbed.probes.iproute import counters
from testbed.probes.packets import Decoded

ETHERNET_HEADER = 14
WIREGUARD_OVERHEAD4 = 60
"""What wireguard adds with IPv4 outside: IPv4 20, UDP 8, its own header 16 and tag 16 bytes."""


@check("MTU-01")
def test_flannel_mtu_is_the_underlay_s_less_the_overhead(cluster: Cluster, facts: Facts) -> None:
    """FLANNEL_MTU follows from the underlay's MTU, and the device has it too. Source: S0 to S4, #841, #897."""
    for node in cluster.members:
        underlay = facts.link(node.name, node.spec.underlay.name).mtu
        wanted = cluster.flannel.mtu_of(underlay)
        assert cluster.subnet_env(node.name)["FLANNEL_MTU"] == str(wanted), f"{node.name}: underlay {underlay}"
        device = facts.link(node.name, cluster.flannel.tunnel_device or node.spec.underlay.name)
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


def outer_packets(cluster: Cluster, path: Path, window: Window, nic: str, nonce: Nonce) -> list[Decoded]:
    """The packets that carried a ping with that nonce; where they are encrypted, the longest ones between the nodes."""
    if cluster.flannel.backend.type != "wireguard":
        return window.packets(nic, nonce, at_least=4)
    # A plain packet that follows shows that the capture has come as far.
    control = Nonce.new()
    ping(path.source_node, path.target_node.spec.ip, nonce=control)
    window.packets(nic, control, at_least=2)
    port, between = cluster.flannel.port, {path.source_node.spec.ip, path.target_node.spec.ip}
    seen = window.everything(nic, path.source_node.spec.ip.packed)
    data = [p for p in seen if p.ip and {p.ip.src, p.ip.dst} == between and (p.ip.fragment or p.udp)]
    data = [p for p in data if not p.udp or p.udp.dport == port]
    return sorted(data, key=lambda p: p.length)[-4:]


@check("MTU-03", encapsulated=True)
def test_largest_packet_fills_the_underlay_unfragmented(path: Path, cluster: Cluster, window: Window) -> None:
    """At FLANNEL_MTU the outer frame has exactly the underlay's size; nothing is fragmented. Source: talos#13457."""
    machines = [cluster.lab.node(machine.name) for machine in cluster.lab.spec.nodes]
    before = {machine.name: counters(machine, "IpFragCreates") for machine in machines}
    nonce, mtu = Nonce.new(), int(cluster.subnet_env(path.source_node.name)["FLANNEL_MTU"])
    answer = ping(path.source, path.address, nonce=nonce, size=mtu - ICMP_HEADERS, count=2, dont_fragment=True)
    assert answer.lost == 0, answer.output
    for nic, node in ((path.source_nic, path.source_node), (path.target_nic, path.target_node)):
        seen = outer_packets(cluster, path, window, nic, nonce)
        assert not [p for p in seen if p.ip and p.ip.fragment], f"{nic}: fragments"
        full = node.spec.underlay.mtu + ETHERNET_HEADER
        if cluster.flannel.backend.type == "wireguard":
            full = mtu + WIREGUARD_OVERHEAD4 + ETHERNET_HEADER  # FLANNEL_MTU leaves room for IPv6 outside
        assert [p.length for p in seen] == [full] * 4, f"{nic}: {[p.length for p in seen]}, not {full}"
    after = {machine.name: counters(machine, "IpFragCreates") for machine in machines}
    assert after == before, "a machine of the lab fragmented packets"
