"""From the copies of a packet to its hops: which way each went, and what stands in its headers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from testbed.probes.packets import ICMPV6, Decoded, Icmp, Tunnel, decode
from testbed.trace.layout import Layout
from testbed.trace.model import Frame, Hop, PacketFacts
from testbed.trace.watch import Copy

_UNREACHABLE = {
    0: "network unreachable",
    1: "host unreachable",
    2: "protocol unreachable",
    3: "port unreachable",
    9: "network prohibited",
    10: "host prohibited",
    13: "prohibited",
}
_UNREACHABLE6 = {0: "no route", 1: "prohibited", 3: "address unreachable", 4: "port unreachable"}


@dataclass(frozen=True, slots=True)
class Probe:
    """What was sent, as far as it is known again by: a nonce, or the sequence number of a TCP SYN."""

    protocol: str
    nonce: bytes
    port: int
    number: int

    @property
    def needles(self) -> tuple[bytes, ...]:
        """Bytes that its packets have in them."""
        if self.protocol != "tcp":
            return (self.nonce,)
        return self.number.to_bytes(4, "big"), ((self.number + 1) & 0xFFFFFFFF).to_bytes(4, "big")

    def contains(self, data: bytes) -> bool:
        """Whether these bytes are of one of its packets."""
        return any(needle in data for needle in self.needles)


@dataclass(slots=True)
class Sorted:
    """The hops of one packet by what they are."""

    request: list[Hop] = field(default_factory=list)
    answer: list[Hop] = field(default_factory=list)
    errors: list[Hop] = field(default_factory=list)
    copies: dict[int, Copy] = field(default_factory=dict)  # by the hop's id()
    refused: bool = False  # the answer is a refusal: a RST

    def copy(self, hop: Hop) -> Copy:
        """The copy that a hop was made of."""
        return self.copies[id(hop)]


def innermost(packet: Decoded) -> Decoded:
    """What the tunnels around a packet carry."""
    return innermost(packet.inner) if packet.inner is not None else packet


def sort(copies: Sequence[Copy], layout: Layout, probe: Probe) -> Sorted:
    """Make hops of what was seen of a probe; copies of other packets are left out."""
    found = Sorted()
    began = copies[0].when if copies else 0
    for copy in copies:
        if not probe.contains(copy.data):
            continue
        packet = decode(copy.data, copy.link_type, layout.tunnel)
        direction = direction_of(innermost(packet), probe)
        if direction == "piece":
            _count_piece(found, copy, packet)
            continue
        if not direction:
            continue
        hop = hop_of(copy, packet, layout, began)
        hop.error = error_of(packet) if direction == "errors" else ""
        getattr(found, direction).append(hop)
        found.copies[id(hop)] = copy
        inner = innermost(packet)
        if direction == "answer" and inner.tcp and "R" in inner.tcp.flags:
            found.refused = True
    return found


def direction_of(packet: Decoded, probe: Probe) -> str:
    """`request`, `answer` or `errors`; `piece` for a later fragment, "" for something else."""
    if (ip := packet.ip or packet.ip6) is not None and ip.offset:
        return "piece"
    if packet.icmp is not None:
        kinds = {128: "request", 129: "answer"} if packet.ip6 else {8: "request", 0: "answer"}
        return kinds.get(packet.icmp.type, "errors")
    if packet.udp is not None:
        if packet.udp.dport == probe.port:
            return "request"
        return "answer" if packet.udp.sport == probe.port else ""
    if packet.tcp is not None and probe.protocol == "tcp":
        if packet.tcp.dport == probe.port:
            return "request" if packet.tcp.flags == "S" else ""  # not the RST by which the source's kernel ends it
        return "answer" if packet.tcp.sport == probe.port else ""
    return ""


def _count_piece(found: Sorted, copy: Copy, packet: Decoded) -> None:
    """Add a later fragment to the hop that its first one made."""
    inner = innermost(packet)
    ip, outer = inner.ip or inner.ip6, packet.ip or packet.ip6
    for hop in reversed([*found.request, *found.answer, *found.errors]):
        ends = {(one.src, one.dst) for one in (hop.packet, hop.outer) if one is not None}
        if (hop.place, hop.interface, hop.way) == (copy.place, copy.interface, copy.way) and any(
            one is not None and (str(one.src), str(one.dst)) in ends for one in (ip, outer)
        ):
            hop.pieces += 1
            return


def facts_of(packet: Decoded, *, unfinished: bool = False) -> PacketFacts | None:
    """The headers of a packet, what is in a tunnel left out; None for one without IP."""
    ip, ip6 = packet.ip, packet.ip6
    if ip is None and ip6 is None:
        return None
    ports = (0, 0)
    protocol, checksum = "", "none"
    if packet.udp is not None:
        protocol, ports = "udp", (packet.udp.sport, packet.udp.dport)
        if packet.udp.checksum:
            checksum = "offloaded" if unfinished else ("bad" if packet.udp.wrong else "good")
    elif packet.tcp is not None:
        protocol, ports = "tcp", (packet.tcp.sport, packet.tcp.dport)
    elif packet.icmp is not None:
        protocol = "icmp"
    else:
        number = ip.proto if ip else ip6.next if ip6 else 0
        protocol = {4: "ipip", 50: "esp", 17: "udp", 6: "tcp", 1: "icmp", ICMPV6: "icmp"}.get(number, str(number))
    if ip is not None:
        ends, ttl, whole = (str(ip.src), str(ip.dst)), ip.ttl, ip.dont_fragment
    else:
        assert ip6 is not None
        ends, ttl, whole = (str(ip6.src), str(ip6.dst)), ip6.hops, True
    return PacketFacts(*ends, protocol, *ports, ttl, whole, checksum)


def _frame(packet: Decoded) -> Frame | None:
    return Frame(packet.ether.src, packet.ether.dst) if packet.ether is not None else None


def hop_of(copy: Copy, packet: Decoded, layout: Layout, began: int) -> Hop:
    """The hop of one copy."""
    inner = innermost(packet)
    tunnelled = packet.inner is not None
    return Hop(
        machine=copy.machine,
        place=copy.place,
        interface=copy.interface,
        way=copy.way,
        kind=layout.kind(copy.place, copy.interface),
        at=round((copy.when - began) / 1e9, 7),
        length=len(copy.data),
        frame=_frame(packet),
        packet=facts_of(inner, unfinished=copy.unfinished and not tunnelled),
        outer=facts_of(packet, unfinished=copy.unfinished) if tunnelled else None,
        encapsulation=_encapsulation(packet, layout.tunnel) if tunnelled else None,
        inner_frame=_frame(inner) if tunnelled else None,
    )


def _encapsulation(packet: Decoded, tunnel: Tunnel) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": tunnel.kind}
    if packet.udp is not None:
        found["port"] = packet.udp.dport
    if packet.vxlan is not None:
        found["vni"] = packet.vxlan.vni
    return found


def error_of(packet: Decoded) -> str:
    """What an ICMP error says."""
    icmp = innermost(packet).icmp
    assert icmp is not None
    return error_text(icmp, six=innermost(packet).ip6 is not None)


def error_text(icmp: Icmp, *, six: bool) -> str:
    """An ICMP error in words."""
    if (six and icmp.type == 2) or (not six and (icmp.type, icmp.code) == (3, 4)):
        return f"fragmentation needed, MTU {icmp.mtu}"
    if six:
        return {1: _UNREACHABLE6.get(icmp.code, "unreachable"), 3: "TTL exceeded"}.get(icmp.type, f"ICMPv6 {icmp.type}")
    if icmp.type == 3:
        return _UNREACHABLE.get(icmp.code, f"unreachable, code {icmp.code}")
    return {5: "redirect", 11: "TTL exceeded"}.get(icmp.type, f"ICMP {icmp.type}")


def encrypted_hops(copies: Iterable[Copy], layout: Layout, probe: Probe, began: int) -> list[Hop]:
    """Hops of packets that are of the encrypting protocol and do not show what they carry."""
    found = []
    for copy in copies:
        if probe.contains(copy.data):
            continue
        packet = decode(copy.data, copy.link_type, Tunnel())
        outer = facts_of(packet, unfinished=copy.unfinished)
        hop = hop_of(copy, packet, layout, began)
        hop.outer, hop.packet, hop.matched = outer, None, "time and size"
        hop.encapsulation = {"kind": layout.encrypted}
        if packet.udp is not None:
            hop.encapsulation["port"] = packet.udp.dport
        found.append(hop)
    return found
