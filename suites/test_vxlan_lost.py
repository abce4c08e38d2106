"""VXE: packets that are lost on the way, and the segment in which they are."""

from __future__ import annotations

from itertools import pairwise

from testbed.checks import check, inconclusive
from testbed.fixtures import Facts, Path
from testbed.nodes.deploy import Cluster
from testbed.probes.capture import Selector, Window
from testbed.probes.fabric import port_filter
from testbed.probes.flows import Nonce, http_get, ping, pinged, udp_flows
from testbed.probes.packets import Decoded

PINGS = 3


def last_seen(path: Path, cluster: Cluster, window: Window, wanted: Selector) -> tuple[str, str]:
    """The segment behind which what the path's source sent is lost: its two ends, as captures name them.

    It does not wait: what is looked for has to have been sent some time ago.
    """
    device, (source, target) = cluster.flannel.tunnel_device, path.pods
    places = [f"{source.name}:eth0", f"{path.source_node.name}:{device}", path.source_nic]
    places += [path.target_nic, f"{path.target_node.name}:{device}", f"{target.name}:eth0"]
    ends = source.address.packed + target.address.packed
    seen = ["nowhere", *(name for name in places if any(wanted(p.inner or p) for p in window.everything(name, ends)))]
    behind = {"nowhere": places[0], places[-1]: "nowhere"} | dict(pairwise(places))
    return seen[-1], behind[seen[-1]]


def is_request(packet: Decoded) -> bool:
    """Whether it is a ping's request."""
    return packet.icmp is not None and packet.icmp.type == 8


def is_syn(packet: Decoded) -> bool:
    """Whether it asks for a TCP connection."""
    return packet.tcp is not None and packet.tcp.flags == "S"


@check("VXE-15", encapsulated=True, disruptive=True)
def test_a_blocked_port_is_found(path: Path, cluster: Cluster, facts: Facts, window: Window) -> None:
    """The sender's device counts, the receiver's does not, and the loss is between their cards. Source: S4, #1085."""
    source, target, device = path.source_node, path.target_node, str(cluster.flannel.tunnel_device)
    port, control = int(cluster.flannel.port or 0), Nonce.new()
    facts.forget()
    sent, received = facts.link(source.name, device).tx_packets, facts.link(target.name, device).rx_packets
    with port_filter(cluster.lab, source.name, "udp", "dport", str(port)):
        answer = ping(path.source, path.address, count=PINGS, wait=1)
        udp_flows(source, target.spec.ip, count=1, nonce=control, port=port + 1, wait=0.2)
        if not window.packets(path.target_nic, control):
            inconclusive(f"{path.target_nic}: UDP to port {port + 1} did not arrive either")
        facts.forget()
        sent = facts.link(source.name, device).tx_packets - sent
        received = facts.link(target.name, device).rx_packets - received
    assert answer.received == 0, f"a fabric without UDP port {port} answers: {answer.output}"
    segment = last_seen(path, cluster, window, is_request)
    assert segment == (path.source_nic, path.target_nic), f"lost between {segment[0]} and {segment[1]}"
    assert (sent >= PINGS, received) == (True, 0), f"{device}: {sent} sent, {received} received"
    restored = ping(path.source, path.address)
    assert restored.lost == 0, restored.output


@check("VXE-16", encapsulated=True)
def test_tcp_is_not_lost_where_pings_are_answered(path: Path, cluster: Cluster, window: Window) -> None:
    """A connection is made where pings are; where not, the segment says whose fault it is. Source: S4, #2388."""
    answer = ping(path.source, path.address)
    assert answer.lost == 0, answer.output
    reply = http_get(path.source, path.address)
    last, behind = last_seen(path, cluster, window, is_syn)
    lost = f"the SYN was seen at {last} and not at {behind}"
    if reply.error and (last, behind) == (path.target_nic, f"{path.target_node.name}:{cluster.flannel.tunnel_device}"):
        lost += ": the node's card or kernel drops it, or another program has the port"
    assert not reply.error, f"pings are answered, TCP is not: {lost}"
    ends = path.source.address.packed + path.address.packed
    window.packets(path.target_nic, pinged(path.source, path.address))  # what came before it is captured, too
    syns = [p for p in window.everything(path.target_nic, ends) if p.inner and is_syn(p.inner)]
    assert syns, f"{path.target_nic}: no SYN"
    wrong = [p.udp for p in syns if p.udp and p.udp.wrong]
    assert not wrong, f"{path.target_nic}: wrong checksums: {wrong}"
