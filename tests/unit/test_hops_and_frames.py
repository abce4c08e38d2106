"""Hops as ping tells them, and frames that a check makes by hand."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest

from testbed.probes.flows import Nonce
from testbed.probes.frames import SOURCE_PORT, Ends, ping_frame, vxlan_frame
from testbed.probes.hops import parse_hop
from testbed.probes.packets import ETHERNET, Tunnel, decode

A, B = "02:00:00:00:00:0a", "02:00:00:00:00:0b"
ONE, TWO = IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2")


@pytest.mark.parametrize(
    ("text", "hop"),
    [
        (
            "PING 10.1.0.2 (10.1.0.2) 56(84) bytes of data.\nFrom 10.1.9.1 icmp_seq=1 Time to live exceeded\n",
            "10.1.9.1",
        ),
        ("PING 10.1.0.2 (10.1.0.2)\n64 bytes from 10.1.0.2: icmp_seq=1 ttl=62 time=0.1 ms\n", "10.1.0.2"),
        ("PING 10.1.0.2 (10.1.0.2) 56(84) bytes of data.\n\n1 packets transmitted, 0 received\n", None),
    ],
)
def test_who_answered(text: str, hop: str | None) -> None:
    assert parse_hop(text) == (IPv4Address(hop) if hop else None)


def test_a_frame_in_a_vxlan_packet() -> None:
    nonce = Nonce.new()
    inner = ping_frame(Ends(A, B, ONE, TWO), nonce)
    found = decode(vxlan_frame(Ends(B, A, TWO, ONE), inner, port=8475, vni=4001), ETHERNET, Tunnel("vxlan", 8475))
    assert found.udp
    assert (found.udp.sport, found.udp.dport, found.udp.wrong) == (SOURCE_PORT, 8475, False)
    assert found.vxlan
    assert (found.vxlan.flags, found.vxlan.vni, found.vxlan.reserved) == (0x08, 4001, 0)
    assert found.inner
    assert found.inner.ether
    assert found.inner.ip
    assert found.inner.icmp
    assert (found.inner.ether.src, found.inner.ether.dst) == (A, B)
    assert (found.inner.ip.src, found.inner.ip.dst, found.inner.icmp.type) == (ONE, TWO, 8)
    assert nonce.value in found.inner.payload
