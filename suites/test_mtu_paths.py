"""MTU: what passes between pods and nodes, in every size that there is."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import ExitStack

from testbed.checks import check
from testbed.fixtures import Facts, Figures, Path, Paths
from testbed.labs.base import Node
from testbed.nodes.deploy import Cluster
from testbed.nodes.hostpods import host_pod
from testbed.parallel import each
from testbed.probes.capture import Window
from testbed.probes.flows import HTTP_PORT, Nonce, http_get, ping
from testbed.probes.sized import small_hops, unanswered
from testbed.probes.transfers import MIB, Transfer, fetch, post

TCP_HEADERS = 40
SMALL, LARGE = MIB, 100 * MIB
FLOWS = 16
"""So many flows take each of a few equal ways, but for one time in some thousands."""


@check("MTU-04")
def test_segments_leave_room_for_the_headers(path: Path, facts: Facts, window: Window) -> None:
    """SYN and SYN-ACK say FLANNEL_MTU less 40, and nothing on the way changes that. Source: S1."""
    source, target = path.pods
    answer, control = http_get(source, target.address), Nonce.new()
    assert not answer.error, answer.error
    assert ping(source, target.address, nonce=control).lost == 0
    wanted = {"S": facts.mtu(source.node.name) - TCP_HEADERS, "SA": facts.mtu(target.node.name) - TCP_HEADERS}
    for place in (f"{source.name}:eth0", f"{target.name}:eth0"):
        window.packets(place, control, at_least=2)
        both = [struct.pack("!HH", *ports) for ports in ((answer.sport, HTTP_PORT), (HTTP_PORT, answer.sport))]
        seen = [packet.tcp for ports in both for packet in window.everything(place, ports) if packet.tcp]
        found = {tcp.flags: tcp.mss for tcp in seen if tcp.mss is not None}
        assert found == wanted, f"{place}: segments of {found}, not {wanted}"


@check("MTU-05")
def test_large_transfers_arrive_as_they_were_sent(path: Path, cluster: Cluster) -> None:
    """1 MiB each way and 100 MiB have equal digests at both ends, unlike "ping ok, TLS hangs". Source: S4, #1614."""
    here, there, address = path.source, path.target, path.address
    ways: list[tuple[str, Callable[[], Transfer]]] = [
        (f"{here.name} to {there.name}", lambda: post(here, address, SMALL)),
        (f"{there.name} to {here.name}", lambda: fetch(here, address, SMALL)),
        (f"{here.name} to {there.name}", lambda: post(here, address, LARGE)),
    ]
    if there is not path.target_node and cluster.flannel.backend.type != "ipsec":  # whose policies are about pods alone
        ways.append((f"{path.source_node.name} to {there.name}", lambda: post(path.source_node, address, SMALL)))
    with ExitStack() as stack:
        if there in cluster.members:
            stack.enter_context(host_pod(path.target_node))
        for way, transfer in ways:
            done = transfer()
            assert not done.error, f"{way}: {done.error}"
            assert done.whole, f"{way}: {done.size} bytes arrived as others than were sent"


@check("MTU-06")
def test_the_fabric_passes_what_nodes_may_send(cluster: Cluster) -> None:
    """Packets of the underlay's MTU, unfragmented, between any two nodes by every way. Source: S4, #463."""
    spec = cluster.lab.spec

    def probe(node: Node) -> dict[str, int]:
        lost = {}
        for peer in (member.spec for member in cluster.members if member.name != node.name):
            size = min(node.spec.underlay.mtu, peer.underlay.mtu)
            if silent := unanswered(node, peer.ip, packet=size, flows=FLOWS):
                lost[f"{node.name} to {peer.name}"] = len(silent)
        return lost

    try:
        with host_pod(*cluster.members):
            lost = {pair: count for found in each(probe, cluster.members) for pair, count in found.items()}
    finally:  # what they have learnt of a small hop would outlive it
        each(lambda node: node.run(["ip", "route", "flush", "cache"]), cluster.members)
    where = small_hops(cluster, spec.mtu)
    assert not lost, (
        f"of {FLOWS} packets of the underlay's MTU {lost} are lost: {', '.join(where) or 'no port is small'}"
    )
    assert not where, f"smaller than the underlay's {spec.mtu}: {', '.join(where)}"


@check("MTU-10")
def test_the_tunnel_is_no_slower_for_large_packets(paths: Paths, cluster: Cluster, figures: Figures) -> None:
    """wireguard has its 80 bytes; with a wrong MTU TCP crawls where small segments do not. Source: #1567, k3s#5101."""
    for node in cluster.members:
        mtu, underlay = int(cluster.subnet_env(node.name)["FLANNEL_MTU"]), node.spec.underlay.mtu
        assert mtu <= underlay - cluster.flannel.backend.overhead, f"{node.name}: {mtu} on an underlay of {underlay}"
    path = paths.take("XS")
    small = post(path.source, path.address, 4 * MIB, segment=1000)
    assert not small.error, f"by small segments: {small.error}"
    best = max((post(path.source, path.address, 8 * MIB) for _ in range(3)), key=lambda one: one.rate)
    assert not best.error, f"by segments of any size: {best.error}"
    figures.add("TCP by wireguard, against segments of 1000 bytes", best.rate / small.rate, "times", 0.5)
    assert best.rate > small.rate / 2, f"{best.rate / MIB:.1f} MiB/s, and {small.rate / MIB:.1f} by small segments"
