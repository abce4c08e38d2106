"""DR: neighbours, forwarding entries and MTUs of peers that are reached without a tunnel."""

from __future__ import annotations

from testbed.checks import check
from testbed.deadline import Deadline
from testbed.fixtures import Facts, Path
from testbed.nodes.deploy import Cluster
from testbed.probes.capture import Window
from testbed.probes.flows import ICMP_HEADERS, Nonce, ping

ASKED_SECONDS = 15.0
LEARNT = {"REACHABLE", "STALE", "DELAY", "PROBE"}
ARP_REQUEST = bytes.fromhex("0806000108000604")
"""Ethernet type, and how an ARP packet for IPv4 on Ethernet begins."""


@check("DR-03", direct=True)
def test_direct_peers_are_found_by_arp(path: Path, cluster: Cluster, facts: Facts, window: Window) -> None:
    """The peer's node is an ordinary neighbour; its bridge asks for the pod. Source: S0."""
    source, target = path.source_node, path.target_node
    bridge = facts.link(target.name, cluster.flannel.bridge)
    # The pod may ask for its gateway just now, and need not be asked for then.
    asked = Deadline(ASKED_SECONDS).poll(lambda: asked_for(path, bridge.name, window))
    assert asked == {bridge.mac}, f"{path.address} was asked for by {asked or 'nobody'}, not {bridge.mac}"
    facts.forget()
    known = [n for n in facts.node(source.name).neighbours if n.address == target.spec.ip]
    states = [(n.dev, n.mac) for n in known if n.state <= LEARNT]
    assert states == [(source.spec.underlay.name, target.spec.underlay.mac)], f"{source.name} has {known}"


def asked_for(path: Path, bridge: str, window: Window) -> set[str] | None:
    """Who asks for the path's target once its node knows it no more and a ping comes; None for nobody."""
    target, nonce = path.target_node, Nonce.new()
    target.run(["ip", "neighbour", "flush", "to", str(path.address), "dev", bridge])
    answer = ping(path.source, path.address, nonce=nonce)
    assert answer.lost == 0, answer.output
    place = f"{target.name}:{bridge}"
    window.packets(place, nonce)  # a capture keeps the order: what was asked before is there by now
    arps = [p.arp for p in window.everything(place, ARP_REQUEST) if p.arp]
    return {arp.sender_mac for arp in arps if arp.op == 1 and arp.target == path.address} or None


@check("DR-04")
def test_direct_peers_are_not_in_the_tunnel(cluster: Cluster, facts: Facts) -> None:
    """No neighbour and no forwarding entry of the device leads to one. Source: src."""
    device = str(cluster.flannel.tunnel_device)

    def look() -> None:
        for node in cluster.members:
            state = facts.node(node.name)
            for peer, cidr in facts.direct_peers(node.name).items():
                ip = cluster.lab.spec.node(peer).ip
                near = [n for n in state.neighbours if n.dev == device and n.address == cidr[0]]
                assert not near, f"{node.name}: {device} has a neighbour for {peer}: {near}"
                entries = [e for e in state.fdb if e.dev == device and e.dst == ip]
                assert not entries, f"{node.name}: {device} forwards to {peer}: {entries}"

    facts.eventually(look)


@check("DR-07", direct=True)
def test_direct_peers_have_the_tunnel_s_mtu(path: Path, facts: Facts) -> None:
    """One MTU a node: what fits a tunnel fits a direct peer, and one byte more leaves no pod. Source: src."""
    mtu = facts.mtu(path.source_node.name)
    for pod in path.pods:
        assert facts.mtus(pod) == (facts.mtu(pod.node.name),) * 3, f"{pod.name}: {facts.mtus(pod)}"
    fits = ping(path.source, path.address, size=mtu - ICMP_HEADERS, dont_fragment=True)
    assert (fits.lost, fits.path_mtu) == (0, 0), fits.output
    larger = ping(path.source, path.address, size=mtu - ICMP_HEADERS + 1, dont_fragment=True)
    assert (larger.received, larger.local_mtu) == (0, mtu), larger.output
