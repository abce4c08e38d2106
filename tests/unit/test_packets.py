"""Packets by layer, from bytes that scapy and a real ping made."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.l2 import ARP, Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Padding

from testbed.errors import LabError
from testbed.probes.packets import ETHERNET, RAW_IP, Decoded, Tunnel, decode

A, B = "02:00:00:00:00:0a", "02:00:00:00:00:0b"
OUTER = Ether(src=A, dst=B) / IP(src="192.0.2.1", dst="192.0.2.2", ttl=64)
INNER = IP(src="198.51.100.1", dst="198.51.100.130", ttl=63, flags="DF") / ICMP(id=7, seq=3) / b"nonce"


def built(packet: object) -> bytes:
    return bytes(packet)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("port", [8472, 4789, 8475])
def test_vxlan_on_any_port(port: int) -> None:
    frame = OUTER / UDP(sport=40000, dport=port) / VXLAN(flags=8, vni=4000) / Ether(src=B, dst=A) / INNER
    found = decode(built(frame), ETHERNET, Tunnel("vxlan", port), time=5.0)
    assert (found.time, found.length) == (5.0, len(frame))
    assert found.ip
    assert (found.ip.src, found.ip.ttl, found.ip.dont_fragment) == (IPv4Address("192.0.2.1"), 64, False)
    assert found.udp
    assert (found.udp.sport, found.udp.dport) == (40000, port)
    assert found.vxlan
    assert (found.vxlan.flags, found.vxlan.vni, found.vxlan.reserved) == (0x08, 4000, 0)
    assert found.inner
    assert found.inner.length == len(frame) - 50
    assert found.inner.ether
    assert (found.inner.ether.src, found.inner.ether.dst) == (B, A)
    assert found.inner.ip
    assert (found.inner.ip.ttl, found.inner.ip.dont_fragment) == (63, True)
    assert found.inner.icmp
    assert (found.inner.icmp.type, found.inner.icmp.id, found.inner.icmp.seq) == (8, 7, 3)
    assert found.inner.payload == b"nonce"


def test_reserved_bits_are_seen() -> None:
    header = bytes([0x08, 0x01, 0, 0, 0, 0, 1, 0x80])
    found = decode(built(OUTER / UDP(dport=4789) / header / Ether() / INNER), ETHERNET, Tunnel("vxlan", 4789))
    assert found.vxlan
    assert found.vxlan.reserved != 0


def test_another_port_is_no_tunnel() -> None:
    frame = OUTER / UDP(dport=8472) / VXLAN(flags=8, vni=1) / Ether() / INNER
    found = decode(built(frame), ETHERNET, Tunnel("vxlan", 4789))
    assert found.udp
    assert not found.encapsulated
    assert found.vxlan is None


def test_udp_backend_carries_bare_ip() -> None:
    found = decode(built(OUTER / UDP(sport=8285, dport=8285) / INNER), ETHERNET, Tunnel("udp", 8285))
    assert found.inner
    assert found.inner.ether is None
    assert found.inner.ip
    assert found.inner.ip.dst == IPv4Address("198.51.100.130")
    assert b"nonce" in found.payload


def test_ipip_carries_bare_ip() -> None:
    found = decode(built(OUTER / INNER), ETHERNET, Tunnel("ipip"))
    assert found.ip
    assert found.ip.proto == 4
    assert found.inner
    assert found.inner.icmp


def test_bare_ip_of_a_tun() -> None:
    found = decode(built(INNER), RAW_IP, Tunnel())
    assert found.ether is None
    assert found.icmp
    assert found.icmp.seq == 3


def test_fragments_arp_and_tcp() -> None:
    def one(packet: object) -> Decoded:
        return decode(built(packet), ETHERNET, Tunnel("vxlan", 8472))

    later = one(Ether() / IP(frag=185, proto=17) / (b"\x21\x18" * 40))
    assert later.ip
    assert later.ip.fragment
    assert later.ip.offset == 1480
    assert later.udp is None
    assert (first := one(Ether() / IP(flags="MF") / UDP() / b"x").ip)
    assert first.fragment
    arp = one(Ether() / ARP(op=2, hwsrc=A, psrc="192.0.2.1", hwdst=B, pdst="192.0.2.2")).arp
    assert arp
    assert (arp.op, arp.sender_mac, arp.target) == (2, A, IPv4Address("192.0.2.2"))
    tcp = one(Ether() / IP() / TCP(sport=1, dport=80, flags="S", options=[("MSS", 1410)])).tcp
    assert tcp
    assert (tcp.flags, tcp.mss) == ("S", 1410)
    needed = one(Ether() / IP() / ICMP(type=3, code=4, nexthopmtu=1400) / bytes(28)).icmp
    assert needed
    assert needed.mtu == 1400


@pytest.mark.parametrize(("raw", "link_type"), [(b"", 147), (built(OUTER / UDP(dport=8472) / b"abc"), ETHERNET)])
def test_what_is_no_packet_is_the_labs_fault(raw: bytes, link_type: int) -> None:
    with pytest.raises(LabError):
        decode(raw, link_type, Tunnel("vxlan", 8472))


@pytest.mark.parametrize(
    ("frame", "wrong"),
    [
        (OUTER / UDP(sport=40000, dport=7) / b"odd", False),
        (OUTER / UDP(sport=40000, dport=7, chksum=0) / b"none", False),
        (OUTER / UDP(sport=40000, dport=7, chksum=0x1234) / b"another", True),
        (OUTER / UDP(sport=40000, dport=7) / b"with a trailer" / Padding(b"\0" * 9), False),
    ],
)
def test_a_checksum_is_compared_with_the_packet(frame: object, wrong: bool) -> None:
    found = decode(built(frame), ETHERNET, Tunnel())
    assert found.udp
    assert found.udp.wrong is wrong
