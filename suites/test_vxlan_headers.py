"""VXE: the outer headers one by one, and what a tunnel hides from the pods."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from testbed.checks import check
from testbed.fixtures import Facts, Path
from testbed.labs.base import Node
from testbed.nodes.deploy import Cluster
from testbed.probes.capture import Window
from testbed.probes.flows import Nonce, ping, pinged, udp_flows
from testbed.probes.hops import hops
from testbed.probes.packets import Decoded

PINGS, FLOWS = 2, 16
PORT_RANGE = "net.ipv4.ip_local_port_range"
NARROW = range(40000, 41000)


def sent(path: Path, window: Window, name: str, nonce: Nonce, count: int) -> list[Decoded]:
    """What the path's source node sent through the tunnel, as an interface saw it; all of it has to be there."""
    source = path.source_node.spec.ip
    seen = window.select(name, nonce, lambda p: p.ip is not None and p.ip.src == source, at_least=count)
    assert len(seen) == count, f"{len(seen)} packets at {name}, {count} were sent"
    return seen


@check("VXE-07", encapsulated=True)
def test_outer_checksum_is_as_the_device_says(path: Path, cluster: Cluster, facts: Facts, window: Window) -> None:
    """At the receiver: there and right where the device's flag says so, else none. Source: S2, measured."""
    nonce = pinged(path.source, path.address, PINGS)
    flag = bool(facts.link(path.source_node.name, str(cluster.flannel.tunnel_device)).data["udp_csum"])
    for packet in sent(path, window, path.target_nic, nonce, PINGS):
        assert packet.udp, f"not UDP: {packet}"
        found = packet.udp.checksum
        assert bool(found) is flag, f"checksum {found:#06x}, the device's flag is {flag}"
        assert not packet.udp.wrong, f"checksum {found:#06x} is wrong"


@check("VXE-08", encapsulated=True)
def test_outer_header_is_a_fresh_one(path: Path, window: Window) -> None:
    """TTL 64, no type of service, and DF clear, although the pods' packets have it set. Source: measured."""
    nonce = Nonce.new()
    answer = ping(path.source, path.address, nonce=nonce, count=PINGS, dont_fragment=True)
    assert answer.lost == 0, answer.output
    for packet in sent(path, window, path.source_nic, nonce, PINGS):
        assert packet.ip
        found = (packet.ip.ttl, packet.ip.tos, packet.ip.dont_fragment)
        assert found == (64, 0, False), f"outer TTL, TOS and DF: {found}"
        assert packet.inner, f"not encapsulated: {packet}"
        assert packet.inner.ip, f"no IPv4 inside: {packet}"
        assert packet.inner.ip.dont_fragment, "the pod's own DF is gone"


@check("VXE-11", encapsulated=True)
def test_source_ports_are_local_ports(path: Path, window: Window) -> None:
    """In the sender's range of local ports, also once that is another one. Source: S0, measured."""
    node = path.source_node
    low, high = (int(word) for word in node.run(["sysctl", "-n", PORT_RANGE]).stdout.split())
    ports = outer_ports(path, window)
    assert ports <= set(range(low, high + 1)), f"outer source ports {sorted(ports)}, the range is {low}-{high}"
    with local_ports(node, NARROW, range(low, high + 1)):
        ports = outer_ports(path, window)
    assert ports <= set(NARROW), f"outer source ports {sorted(ports)}, the range was {NARROW}"
    assert len(ports) > 1, f"one outer source port for {FLOWS} flows"


def outer_ports(path: Path, window: Window) -> set[int]:
    """The outer source ports of some flows."""
    nonce = Nonce.new()
    flows = udp_flows(path.source, path.address, count=FLOWS, nonce=nonce)
    assert all(flow.reply for flow in flows), "not every flow was answered"
    return {packet.udp.sport for packet in sent(path, window, path.source_nic, nonce, FLOWS) if packet.udp}


@contextmanager
def local_ports(node: Node, ports: range, before: range) -> Iterator[None]:
    """A node with another range of local ports."""

    def change(to: range) -> None:
        node.run(["sysctl", "-q", "-w", f"{PORT_RANGE}={to.start} {to.stop - 1}"])

    change(ports)
    try:
        yield
    finally:
        change(before)


@check("VXE-14", encapsulated=True)
def test_pods_see_three_hops(path: Path, cluster: Cluster) -> None:
    """The bridge, the peer's tunnel, the pod: none of the fabric's routers. Source: derived from S0."""
    near, far = (cluster.pod_cidr(node.name) for node in (path.source_node, path.target_node))
    found = hops(path.source, path.address)
    assert found == (near[1], far[0], path.address), f"hops: {', '.join(map(str, found))}"
