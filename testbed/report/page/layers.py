"""A decoded packet as rows of text, layer by layer: what a reader compares, outer and inner side by side.

PACKET = {"at": "worker1:eth0", "time": 0.0021,          # seconds since the check began
          "length": 148, "summary": "10.244.1.3 → 10.244.3.2 ICMP echo request",
          "outer": [LAYER, …],                           # [] where it is not encapsulated
          "inner": [LAYER, …]}                           # the packet itself
LAYER = {"name": "IPv4", "fields": [["from", "10.244.1.3"], …]}
"""

from __future__ import annotations

from typing import Any

from testbed.probes.packets import Arp, Decoded, Ether, Icmp, Ip, Ip6, Tcp, Udp, Vxlan

ETHER_TYPES = {0x0800: "IPv4", 0x86DD: "IPv6", 0x0806: "ARP"}
PROTOCOLS = {1: "ICMP", 4: "IPv4 in IP", 6: "TCP", 17: "UDP", 41: "IPv6 in IP", 50: "ESP", 58: "ICMPv6"}
ICMP_TYPES = {
    (8, 0): "echo request",
    (0, 0): "echo reply",
    (3, 0): "network unreachable",
    (3, 1): "host unreachable",
    (3, 3): "port unreachable",
    (3, 4): "fragmentation needed",
    (3, 13): "prohibited by a filter",
    (11, 0): "TTL exceeded",
    (128, 0): "echo request",
    (129, 0): "echo reply",
    (1, 0): "no route",
    (2, 0): "packet too big",
    (3, 6): "network unknown",
    (135, 0): "neighbour solicitation",
    (136, 0): "neighbour advertisement",
}
PAYLOAD = 24
"""Bytes of the payload that are shown."""

Layer = dict[str, Any]


def _layer(name: str, *fields: tuple[str, object]) -> Layer:
    return {"name": name, "fields": [[key, str(value)] for key, value in fields if value is not None]}


def _ether(ether: Ether) -> Layer:
    kind = ETHER_TYPES.get(ether.type, f"0x{ether.type:04x}")
    return _layer("Ethernet", ("from", ether.src), ("to", ether.dst), ("carries", kind))


def _arp(arp: Arp) -> Layer:
    if arp.op == 1:
        return _layer("ARP", ("asks for", arp.target), ("from", f"{arp.sender} {arp.sender_mac}"))
    return _layer("ARP", ("answers", f"{arp.sender} is at {arp.sender_mac}"), ("to", arp.target))


def _ip(ip: Ip) -> Layer:
    flags = [*(["DF"] if ip.dont_fragment else []), *(["MF"] if ip.more_fragments else [])]
    if ip.offset:
        flags.append(f"offset {ip.offset}")
    return _layer(
        "IPv4",
        ("from", ip.src),
        ("to", ip.dst),
        ("TTL", ip.ttl),
        ("carries", PROTOCOLS.get(ip.proto, ip.proto)),
        ("length", ip.length),
        ("flags", " ".join(flags) or None),
        ("TOS", f"0x{ip.tos:02x}" if ip.tos else None),
    )


def _ip6(ip: Ip6) -> Layer:
    return _layer(
        "IPv6",
        ("from", ip.src),
        ("to", ip.dst),
        ("hops", ip.hops),
        ("carries", PROTOCOLS.get(ip.next, ip.next)),
        ("length", ip.length),
        ("class", f"0x{ip.traffic_class:02x}" if ip.traffic_class else None),
    )


def _udp(udp: Udp) -> Layer:
    checksum = f"0x{udp.checksum:04x}" if udp.checksum else "none"
    return _layer("UDP", ("ports", f"{udp.sport} → {udp.dport}"), ("length", udp.length), ("checksum", checksum))


def _tcp(tcp: Tcp) -> Layer:
    return _layer("TCP", ("ports", f"{tcp.sport} → {tcp.dport}"), ("flags", tcp.flags), ("MSS", tcp.mss))


def _icmp(icmp: Icmp) -> Layer:
    kind = ICMP_TYPES.get((icmp.type, icmp.code), f"type {icmp.type} code {icmp.code}")
    return _layer("ICMP", ("kind", kind), ("id", icmp.id), ("sequence", icmp.seq), ("MTU", icmp.mtu or None))


def _vxlan(vxlan: Vxlan) -> Layer:
    return _layer(
        "VXLAN",
        ("VNI", vxlan.vni),
        ("flags", f"0x{vxlan.flags:02x}"),
        ("reserved", vxlan.reserved or None),
        ("policy", vxlan.group_policy or None),
    )


def _layers(packet: Decoded) -> list[Layer]:
    found = []
    kinds: tuple[tuple[Any, Any], ...] = (
        (packet.ether, _ether),
        (packet.arp, _arp),
        (packet.ip, _ip),
        (packet.ip6, _ip6),
        (packet.udp, _udp),
        (packet.tcp, _tcp),
        (packet.icmp, _icmp),
        (packet.vxlan, _vxlan),
    )
    for layer, show in kinds:
        if layer is not None:
            found.append(show(layer))
    if packet.inner is None and packet.payload:
        more = f" … {len(packet.payload)} bytes" if len(packet.payload) > PAYLOAD else f" {len(packet.payload)} bytes"
        found.append(_layer("Payload", ("data", packet.payload[:PAYLOAD].hex(" ", 4) + more)))
    return found


def summary(packet: Decoded) -> str:
    """The packet in one line: who to whom, and what."""
    inner = packet.inner or packet
    if inner.arp is not None:
        return f"ARP for {inner.arp.target}" if inner.arp.op == 1 else f"ARP: {inner.arp.sender} is at a MAC"
    ip: Ip | Ip6 | None = inner.ip or inner.ip6
    if ip is None:
        return "a frame without IP"
    if inner.icmp is not None:
        what = "ICMP " + ICMP_TYPES.get((inner.icmp.type, inner.icmp.code), f"type {inner.icmp.type}")
    elif inner.udp is not None:
        what = f"UDP {inner.udp.sport} → {inner.udp.dport}"
    elif inner.tcp is not None:
        what = f"TCP {inner.tcp.sport} → {inner.tcp.dport} {inner.tcp.flags}"
    else:
        number = ip.proto if isinstance(ip, Ip) else ip.next
        what = PROTOCOLS.get(number, f"protocol {number}")
    return f"{ip.src} → {ip.dst}  {what}"


def layers_of(at: str, packet: Decoded, began: float) -> dict[str, Any]:
    """A packet as plain data, times relative to the check's begin."""
    inner = packet.inner
    return {
        "at": at,
        "time": round(packet.time - began, 6),
        "length": packet.length,
        "summary": summary(packet),
        "outer": _layers(packet) if inner else [],
        "inner": _layers(inner or packet),
    }
