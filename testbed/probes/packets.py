"""Packets by layer: what tcpdump captured, decoded by scapy into plain typed values.

scapy is slow (about 0.2 ms a packet), so only packets that a check asks for are decoded, and only the layers that
flannel's backends use are loaded.  Which outer UDP packet is a tunnel's is a matter of the run's configuration, not of
a well-known port: flannel's vxlan runs on any port, and tcpdump takes 8472 for another protocol altogether.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from testbed.errors import LabError

ETHERNET, RAW_IP, RAW_IP_BSD = 1, 101, 12
"""Link types of a pcap: frames of Ethernet, and bare IP as a tun device gives it."""

BROADCAST = "ff:ff:ff:ff:ff:ff"

ICMPV6 = 58
FRAGMENT = 44
"""What may stand behind an IPv6 header."""


@dataclass(frozen=True, slots=True)
class Tunnel:
    """How a run's packets are encapsulated: `vxlan` and `udp` on a UDP port, `ipip`, or nothing."""

    kind: str | None = None
    port: int | None = None


@dataclass(frozen=True, slots=True)
class Ether:
    """An Ethernet header; MACs in lower case."""

    src: str
    dst: str
    type: int


@dataclass(frozen=True, slots=True)
class Arp:
    """An ARP packet; `op` 1 asks, 2 answers."""

    op: int
    sender_mac: str
    sender: IPv4Address
    target_mac: str
    target: IPv4Address


@dataclass(frozen=True, slots=True)
class Ip:
    """An IPv4 header. `length` counts header and payload, `offset` is in bytes."""

    src: IPv4Address
    dst: IPv4Address
    ttl: int
    tos: int
    proto: int
    length: int
    dont_fragment: bool
    more_fragments: bool
    offset: int

    @property
    def fragment(self) -> bool:
        """Whether this is one piece of a fragmented packet."""
        return self.more_fragments or self.offset > 0


@dataclass(frozen=True, slots=True)
class Ip6:
    """An IPv6 header. `length` counts header and payload, `next` is the header behind it (44: a fragment's).

    `offset` is the fragment's, in bytes; 0 in a whole packet and in the first piece.
    """

    src: IPv6Address
    dst: IPv6Address
    hops: int
    traffic_class: int
    next: int
    length: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Udp:
    """A UDP header; `checksum` as it stands on the wire, 0 where the sender gave none.

    `wrong`: there is one, and it is not that of the packet. Only where it is received that is a fault: a sender may
    leave it to its network card.
    """

    sport: int
    dport: int
    length: int
    checksum: int
    wrong: bool = False


@dataclass(frozen=True, slots=True)
class Tcp:
    """A TCP header; `mss` only where the segment carries the option."""

    sport: int
    dport: int
    flags: str
    mss: int | None


@dataclass(frozen=True, slots=True)
class Icmp:
    """An ICMP or ICMPv6 header; `mtu` is the next hop's in a 'fragmentation needed' or 'packet too big'."""

    type: int
    code: int
    id: int
    seq: int
    mtu: int = 0


@dataclass(frozen=True, slots=True)
class Vxlan:
    """A VXLAN header; `reserved` joins the two reserved fields, which must be 0."""

    flags: int
    vni: int
    reserved: int
    group_policy: int = 0


@dataclass(frozen=True, slots=True)
class Decoded:
    """One captured packet. A layer that is not there is None; `inner` is what a tunnel carried.

    `length` is the packet's length on the wire in bytes, its Ethernet header included where it has one.
    """

    time: float  # Unix time, seconds, by the kernel
    length: int
    ether: Ether | None
    arp: Arp | None
    ip: Ip | None
    ip6: Ip6 | None
    udp: Udp | None
    tcp: Tcp | None
    icmp: Icmp | None
    vxlan: Vxlan | None
    payload: bytes
    inner: Decoded | None

    @property
    def encapsulated(self) -> bool:
        """Whether the packet carries another one."""
        return self.inner is not None


def _layers() -> Any:
    """Load scapy's layers when the first packet is decoded, and no earlier."""
    from scapy.layers import inet, inet6, l2, vxlan

    return inet, inet6, l2, vxlan


def _mac(text: str) -> str:
    return text.lower()


def _ether(packet: Any, l2: Any) -> Ether | None:
    layer = packet if isinstance(packet, l2.Ether) else None
    return Ether(_mac(layer.src), _mac(layer.dst), layer.type) if layer is not None else None


def _arp(packet: Any, l2: Any) -> Arp | None:
    if not packet.haslayer(l2.ARP):
        return None
    arp = packet[l2.ARP]
    return Arp(arp.op, _mac(arp.hwsrc), IPv4Address(arp.psrc), _mac(arp.hwdst), IPv4Address(arp.pdst))


def _ip(packet: Any) -> Ip:
    return Ip(
        src=IPv4Address(packet.src),
        dst=IPv4Address(packet.dst),
        ttl=packet.ttl,
        tos=packet.tos,
        proto=packet.proto,
        length=packet.len,
        dont_fragment=bool(packet.flags.DF),
        more_fragments=bool(packet.flags.MF),
        offset=packet.frag * 8,
    )


def _ip6(packet: Any) -> Ip6:
    return Ip6(
        src=IPv6Address(packet.src),
        dst=IPv6Address(packet.dst),
        hops=packet.hlim,
        traffic_class=packet.tc,
        next=packet.nh,
        length=packet.plen + 40,
        offset=getattr(packet.payload, "offset", 0) * 8 if packet.nh == FRAGMENT else 0,
    )


def _udp(
    packet: Any, src: IPv4Address | IPv6Address, dst: IPv4Address | IPv6Address, *, whole: bool = True
) -> Udp:  # fmt: skip
    raw = packet.original[: packet.len]
    wrong = False
    if packet.chksum and whole and len(raw) == packet.len:
        pseudo = src.packed + dst.packed + struct.pack("!IHH", packet.len, 0, 17)
        wrong = _sum(pseudo + raw) != 0xFFFF
    return Udp(packet.sport, packet.dport, packet.len, packet.chksum, wrong)


def _sum(data: bytes) -> int:
    """The ones' complement sum of 16-bit words; 0xffff over what has a right checksum in it."""
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def _tcp(packet: Any) -> Tcp:
    mss = next((value for name, value in packet.options if name == "MSS"), None)
    return Tcp(packet.sport, packet.dport, str(packet.flags), mss)


def _icmp(packet: Any) -> Icmp:
    return Icmp(packet.type, packet.code, packet.id or 0, packet.seq or 0, getattr(packet, "nexthopmtu", 0) or 0)


def _icmp6(packet: Any) -> Icmp:
    number, sequence, mtu = (getattr(packet, name, 0) or 0 for name in ("id", "seq", "mtu"))
    return Icmp(packet.type, packet.code, number, sequence, mtu)


def decode(raw: bytes, link_type: int, tunnel: Tunnel, *, time: float = 0.0, length: int | None = None) -> Decoded:
    """Decode one packet, and what it carries where the tunnel's headers say so.

    Raises LabError for a link type that no interface of a lab has, and for bytes that are no packet.
    """
    inet, inet6, l2, _ = _layers()
    if link_type == ETHERNET:
        start = l2.Ether
    elif link_type in (RAW_IP, RAW_IP_BSD):
        start = inet6.IPv6 if raw[:1] and raw[0] >> 4 == 6 else inet.IP
    else:
        raise LabError(f"a capture has the unknown link type {link_type}")
    try:
        packet = start(raw)
        return _decoded(packet, tunnel, time, len(raw) if length is None else length)
    except (ValueError, IndexError, KeyError, AttributeError, TypeError) as error:
        raise LabError(f"a captured packet cannot be decoded ({error}): {raw[:64].hex()}") from error


def _decoded(packet: Any, tunnel: Tunnel, time: float, length: int) -> Decoded:
    inet, inet6, l2, _ = _layers()
    outer = packet.payload if isinstance(packet, l2.Ether) else packet
    ip = outer if isinstance(outer, inet.IP) else None
    ip6 = outer if isinstance(outer, inet6.IPv6) else None
    udp = tcp = icmp = None
    vxlan, inner, payload = None, None, b""
    if ip6 is not None:
        fragment = isinstance(ip6.payload, inet6.IPv6ExtHdrFragment)
        last, body = (ip6.payload, ip6.payload.payload) if fragment else (ip6, ip6.payload)
        payload = bytes(body.payload) if body else b""
        if isinstance(body, inet.UDP):
            udp = _udp(body, IPv6Address(ip6.src), IPv6Address(ip6.dst), whole=not fragment)
            vxlan, inner = _tunnelled(udp, payload, tunnel, time)
        elif isinstance(body, inet.TCP):
            tcp = _tcp(body)
        elif last.nh == ICMPV6 and body and not (fragment and last.offset):
            icmp = _icmp6(body)
            payload = getattr(body, "data", payload)
    elif ip is not None:
        body = ip.payload
        payload = bytes(body.payload) if body else b""
        fragment = ip.frag > 0
        if isinstance(body, inet.UDP) and not fragment:
            udp = _udp(body, IPv4Address(ip.src), IPv4Address(ip.dst), whole=not ip.flags.MF)
            vxlan, inner = _tunnelled(udp, payload, tunnel, time)
        elif isinstance(body, inet.TCP) and not fragment:
            tcp = _tcp(body)
        elif isinstance(body, inet.ICMP) and not fragment:
            icmp = _icmp(body)
        elif ip.proto == 4 and tunnel.kind == "ipip":
            payload = bytes(body)
            inner = decode(payload, RAW_IP, Tunnel(), time=time)
    return Decoded(
        time=time,
        length=length,
        ether=_ether(packet, l2),
        arp=_arp(packet, l2),
        ip=_ip(ip) if ip is not None else None,
        ip6=_ip6(ip6) if ip6 is not None else None,
        udp=udp,
        tcp=tcp,
        icmp=icmp,
        vxlan=vxlan,
        payload=payload,
        inner=inner,
    )


def _tunnelled(udp: Udp, payload: bytes, tunnel: Tunnel, time: float) -> tuple[Vxlan | None, Decoded | None]:
    """What a UDP packet of the tunnel's port carries; nothing for any other port."""
    vxlan = _layers()[3]
    if tunnel.port is None or udp.dport != tunnel.port:
        return None, None
    if tunnel.kind == "vxlan":
        if len(payload) < 8:
            raise LabError(f"a packet on the vxlan port {tunnel.port} is too short for a VXLAN header: {payload.hex()}")
        layer = vxlan.VXLAN(payload[:8])
        reserved = (layer.reserved1 or 0) << 8 | layer.reserved2
        header = Vxlan(int(layer.flags), layer.vni, reserved, layer.gpid or 0)
        return header, decode(payload[8:], ETHERNET, Tunnel(), time=time)
    if tunnel.kind == "udp" and payload and payload[0] >> 4 == 4:
        return None, decode(payload, RAW_IP, Tunnel(), time=time)
    return None, None
