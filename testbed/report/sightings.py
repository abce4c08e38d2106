"""Where the flows of a check were seen, on the interfaces that they have to come through and on all others.

A flow is told by the bytes that the check put into it, so nothing is decoded here: that would cost more than the check.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING, Any

from testbed import journal
from testbed.deadline import Deadline
from testbed.errors import LabError
from testbed.flannelspec import ENCRYPTED
from testbed.probes.capture import Window
from testbed.probes.packets import decode
from testbed.probes.pcap import Packet
from testbed.report.page.layers import layers_of

if TYPE_CHECKING:
    from testbed.nodes.deploy import Cluster

MOST_PACKETS, MOST_PACKETS_THOROUGH = 12, 24
"""How many packets are told of a check that held, and of one that did not."""

LATE_SECONDS = 0.05
"""How long captures may be late with what a check has just sent."""

Address = IPv4Address | IPv6Address

PROTOCOLS = (1, 4, 6, 17)
"""What lab traffic carries behind an IPv4 header: ICMP, IP in IP, TCP, UDP."""

ERRORS = {4: (3, 4, 5, 11, 12), 6: (1, 2, 3, 4)}
"""ICMP types that are errors about another packet."""


@dataclass(slots=True)
class Seen:
    """How often a flow was seen on an interface: on its way there, its answers, and errors about it."""

    at: str
    there: int = 0
    back: int = 0
    errors: int = 0
    tunnelled: bool = False
    times: list[float] = field(default_factory=list)

    def to_json(self, began: float) -> dict[str, Any]:
        """The same as plain data."""
        first = round(min(self.times) - began, 6) if self.times else 0.0
        return {
            "at": self.at,
            "there": self.there,
            "back": self.back,
            "errors": self.errors,
            "tunnelled": self.tunnelled,
            "first": first,
        }


def header_of(data: bytes, address: Address) -> tuple[int, str]:
    """Where the innermost IP header with this address begins, and which way the packet goes: there, back or errors.

    `address` is the flow's target, which no NAT on the way there changes.  (-1, "there") where there is none.
    """
    packed, version = address.packed, address.version
    offsets = ((16, "there"), (12, "back")) if version == 4 else ((24, "there"), (8, "back"))
    at, found = -1, (-1, "there")
    while (at := data.find(packed, at + 1)) >= 0:
        for offset, way in offsets:
            start = at - offset
            if _is_header(data, start, version):
                if _is_error(data, start, version):
                    return start, "errors"
                found = start, way
    return found


def _is_header(data: bytes, start: int, version: int) -> bool:
    """Whether an IP header can begin there: what stands in its place by chance has no length that fits."""
    size = 20 if version == 4 else 40
    if start < 0 or len(data) < start + size or data[start] >> 4 != version:
        return False
    if version == 6:
        return int.from_bytes(data[start + 4 : start + 6], "big") + size <= len(data) - start
    length = int.from_bytes(data[start + 2 : start + 4], "big")
    return data[start] & 15 == 5 and size <= length and data[start + 9] in PROTOCOLS


def _is_error(data: bytes, start: int, version: int) -> bool:
    """Whether the header that begins there is quoted by an ICMP error before it."""
    outer = start - (28 if version == 4 else 48)
    if outer < 0 or data[outer] >> 4 != version:
        return False
    protocol = data[outer + (9 if version == 4 else 6)]
    return protocol == (1 if version == 4 else 58) and data[start - 8] in ERRORS[version]


def count(name: str, packets: Sequence[Packet], target: Address, link_header: int) -> Seen:
    """How often a flow to that target was seen among an interface's packets."""
    seen = Seen(name)
    for packet in packets:
        start, way = header_of(packet.data, target)
        setattr(seen, way, getattr(seen, way) + 1)
        seen.tunnelled |= start > link_header
        seen.times.append(packet.time)
    return seen


def of(notes: journal.Journal, window: Window, cluster: Cluster, *, thorough: bool) -> dict[str, Any]:
    """The flows of a check with where they were seen, and the packets that it looked at."""
    flows = []
    first_lost: dict[str, list[Packet]] = {}
    if thorough:
        with suppress(LabError):  # what tcpdump has not passed on yet must not look as if it was lost
            window.captures.drops()
    for flow in notes.flows:
        target = ip_address(flow.target)
        way = route(cluster, window, flow.source, target)
        found = _sighted(window, flow.marks, way)
        links = {name: _link_header(window, name) for name in found}
        seen = [count(name, packets, target, links[name]) for name, packets in found.items()]
        if not first_lost:
            first_lost = found
        flows.append(
            {
                "what": flow.what,
                "source": flow.source,
                "target": flow.target,
                "answered": flow.answered,
                "marked": bool(flow.marks),
                "route": way,
                "seen": [one.to_json(window.began) for one in seen],
            }
        )
    packets = _packets(window, first_lost if thorough else {}, MOST_PACKETS_THOROUGH if thorough else MOST_PACKETS)
    return {"flows": flows, **packets}


def _sighted(window: Window, marks: Sequence[bytes], way: Sequence[Mapping[str, Any]]) -> dict[str, list[Packet]]:
    """The packets of a flow by interface, once all of its way have seen it or the time for that is over."""
    if not marks:
        return {}
    wanted = {str(stage["at"]) for stage in way if stage["readable"] and not str(stage["at"]).endswith(":*")}
    last: dict[str, list[Packet]] = {}

    def look() -> bool:
        last.clear()
        last.update(window.sightings(marks))
        return wanted <= set(last)

    Deadline(LATE_SECONDS).poll(look)
    return last


def _link_header(window: Window, name: str) -> int:
    return 14 if window.captures.taps[name].reader.link_type == 1 else 0


def _packets(window: Window, more: dict[str, list[Packet]], most: int) -> dict[str, Any]:
    """The packets that the check was given, and those of its first flow where the check is looked into."""
    known = dict(window.decoded)
    for name, packets in more.items():
        link_type = window.captures.taps[name].reader.link_type
        for packet in packets[:2]:
            if len(known) < most and (name, packet.time, packet.data) not in known and link_type is not None:
                decoded = decode(packet.data, link_type, window.captures.tunnel, time=packet.time, length=packet.length)
                known[name, packet.time, packet.data] = decoded
    ordered = sorted(known.items(), key=lambda item: item[0][1])
    told = [layers_of(name, decoded, window.began) for (name, _, _), decoded in ordered[:most]]
    return {"packets": told, "packets_left_out": len(ordered) - len(told)}


def route(cluster: Cluster, window: Window, source: str, target: Address) -> list[dict[str, Any]]:
    """The interfaces that a flow has to come through, of those that are captured; [] where that is not known."""
    start_node, _, start_pod = source.partition("/")
    goal = next((pod for pod in cluster.pods.values() if target in (pod.address4, pod.address6)), None)
    nodes = (node.name for node in cluster.lab.spec.nodes if target in (node.ip, node.ip6))
    end_node = goal.node.name if goal else next(nodes, "")
    if not end_node or start_node == cluster.lab.spec.outside.name:  # where it comes in is the fabric's matter
        return []
    stages = Stages(cluster, window)
    names, ends = stages.pod(source if start_pod else ""), stages.pod(goal.name if goal else "")
    if start_node != end_node:
        tunnel = stages.tunnel(start_node, end_node, target) if goal else ""
        names += stages.inside(start_node, tunnel, bridge=bool(start_pod))
        ends += stages.inside(end_node, tunnel, bridge=goal is not None)
    if end_node == cluster.lab.spec.outside.name:
        ends = [f"{end_node}:*"]
    names += reversed(ends)
    return [stages.stage(name) for name in dict.fromkeys(names)]


class Stages:
    """Names the interfaces of a lab as captures do."""

    def __init__(self, cluster: Cluster, window: Window) -> None:
        self.cluster = cluster
        self.taps = window.captures.taps

    def stage(self, name: str) -> dict[str, Any]:
        """A stage as plain data."""
        machine = name.partition(":")[0].partition("/")[0]
        wire = name.endswith(f":{self.cluster.lab.spec.cluster_nodes[0].underlay.name}") and "/" not in name
        readable = not (wire and self.cluster.flannel.backend.type in ENCRYPTED)
        return {"at": name, "machine": machine, "readable": readable}

    def pod(self, name: str) -> list[str]:
        """A pod's interface, and the node's end of it."""
        if not name:
            return []
        node, _, _ = name.partition("/")
        veths = [
            tap.target.name
            for tap in self.taps.values()
            if tap.target.pod == name and tap.target.name.startswith(f"{node}:")
        ]
        return [f"{name}:eth0", *veths[:1]]

    def inside(self, node: str, tunnel: str, *, bridge: bool) -> list[str]:
        """What a packet comes through between a pod's veth and the wire."""
        names = [f"{node}:{self.cluster.flannel.bridge}"] if bridge else []
        names += [f"{node}:{tunnel}"] if tunnel else []
        nic = f"{node}:{self.cluster.lab.spec.node(node).underlay.name}"
        return [name for name in (*names, nic) if name in self.taps]

    def tunnel(self, start: str, end: str, target: Address) -> str:
        """The tunnel device between two nodes; "" where they need none."""
        flannel = self.cluster.flannel
        spec = self.cluster.lab.spec
        direct = flannel.direct and spec.same_subnet(start, end)
        device = flannel.tunnel_device if target.version == 4 else flannel.tunnel_device6
        return str(device or "") if flannel.backend.tunnels and not direct else ""
