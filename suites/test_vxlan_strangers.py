"""VXC, VXE: nothing is learnt, nothing is flooded, and nothing is taken from another overlay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from testbed.checks import check, inconclusive
from testbed.deadline import Deadline
from testbed.fixtures import Facts, Path
from testbed.nodes.deploy import Cluster
from testbed.probes.capture import Window
from testbed.probes.flows import Nonce, ping
from testbed.probes.frames import Ends, ping_frame, send_frames, vxlan_frame
from testbed.probes.packets import BROADCAST

EVERYBODY = "00:00:00:00:00:00"
"""The MAC of forwarding entries that say where to send what is for nobody known."""
ARP = bytes.fromhex("0806000108000604")
"""Ethernet type, and how an ARP packet for IPv4 on Ethernet begins."""
RESTORED_SECONDS = 15.0


@check("VXC-05", encapsulated=True, disruptive=True)
def test_neighbours_are_not_asked_for(path: Path, cluster: Cluster, facts: Facts, window: Window) -> None:
    """No ARP on the device; without its neighbour a peer is out of reach until flanneld puts it back. Source: S0."""
    node, device = path.source_node, str(cluster.flannel.tunnel_device)
    base = str(cluster.pod_cidr(path.target_node.name)[0])
    nonce = Nonce.new()
    answer = ping(path.source, path.address, nonce=nonce, count=2)
    assert answer.lost == 0, answer.output
    for end in (node, path.target_node):
        place = f"{end.name}:{device}"
        if len(window.packets(place, nonce, at_least=4)) < 4:
            inconclusive(f"{place}: the pings themselves were not seen")
        arps = [p.arp for p in window.everything(place, ARP) if p.arp]
        assert not arps, f"{place}: ARP on the device: {arps}"
    with stopped(cluster):
        node.run(["ip", "neighbour", "delete", base, "dev", device])
        alone = ping(path.source, path.address, wait=1)
    assert alone.received == 0, f"{node.name} found {base} without flanneld"
    restored = Deadline(RESTORED_SECONDS).poll(lambda: ping(path.source, path.address, wait=1).received == 1)
    facts.forget()
    if not restored:  # so that the rows behind this one can say their own
        mac = facts.link(path.target_node.name, device).mac
        node.run(["ip", "neighbour", "replace", base, "lladdr", mac, "dev", device, "nud", "permanent"])
    assert restored, f"flanneld did not put the neighbour {base} back within {RESTORED_SECONDS:.0f} s"


@contextmanager
def stopped(cluster: Cluster) -> Iterator[None]:
    """Every flanneld does nothing."""
    for node in cluster.members:
        cluster.signal_flanneld(node.name, "STOP")
    try:
        yield
    finally:
        for node in cluster.members:
            cluster.signal_flanneld(node.name, "CONT")


@check("VXC-06")
def test_broadcasts_stay_on_their_node(path: Path, cluster: Cluster, facts: Facts, window: Window) -> None:
    """No forwarding entry for nobody known; neither a pod's nor the node's broadcast leaves the node. Source: S0."""
    source, device = path.source_node, facts.link(path.source_node.name, str(cluster.flannel.tunnel_device))
    cidr = cluster.pod_cidr(source.name)
    by_pod, by_node, control = Nonce.new(), Nonce.new(), Nonce.new()
    broadcast = ["ping", "-n", "-b", "-c", "1", "-W", "1", "-p", by_pod.hex, str(cidr.broadcast_address)]
    path.source.run(broadcast, check=False)
    frame = ping_frame(Ends(device.mac, BROADCAST, cidr[0], cluster.flannel.network.broadcast_address), by_node)
    send_frames(source, device.name, [frame])
    answer = ping(path.source, path.address, nonce=control)
    assert answer.lost == 0, answer.output
    for nonce, name in ((by_pod, f"{path.source.name}:eth0"), (by_node, f"{source.name}:{device.name}")):
        if not window.packets(name, nonce):
            inconclusive(f"{name}: the broadcast itself was not seen")
        window.absent(path.source_nic, nonce, control=control)
    for node in cluster.members:
        everybody = [e for e in facts.node(node.name).fdb if e.dev == device.name and e.mac == EVERYBODY]
        assert not everybody, f"{node.name}: {everybody}"


@check("VXE-13", encapsulated=True)
def test_packets_of_another_vni_are_dropped(path: Path, cluster: Cluster, facts: Facts, window: Window) -> None:
    """One with the right VNI made by hand reaches the pod, the same with the next VNI does not. Source: derived."""
    source, target, device = path.source_node, path.target_node, str(cluster.flannel.tunnel_device)
    here, there = facts.link(source.name, device).mac, facts.link(target.name, device).mac
    inside = Ends(here, there, path.source.address, path.address)
    outside = Ends(source.spec.underlay.mac, facts.next_hop_mac(path), source.spec.ip, target.spec.ip)
    wrong, right = Nonce.new(), Nonce.new()
    vni, port = int(cluster.flannel.vni or 0), int(cluster.flannel.port or 0)
    ping(path.source, path.address)  # so that every neighbour on the way is known
    frames = [vxlan_frame(outside, ping_frame(inside, wrong), port=port, vni=vni + 1)]
    frames += [vxlan_frame(outside, ping_frame(inside, right), port=port, vni=vni)]
    send_frames(source, source.spec.underlay.name, frames)
    arrived = window.packets(path.target_nic, wrong)
    if not arrived:
        inconclusive(f"{path.target_nic}: the packet with VNI {vni + 1} was lost on the way")
    window.absent(f"{path.pods[1].name}:eth0", wrong, control=right)
