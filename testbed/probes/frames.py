"""Frames made by hand and put on a device as they are: what no program of a node would send."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address
from typing import Any, NamedTuple

from testbed.labs import interpreter
from testbed.labs.base import Place
from testbed.probes.flows import Nonce

SOURCE_PORT = 50000

_SENDER = r"""
import socket, sys
sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
sock.bind((sys.argv[1], 0))
for line in sys.stdin:
    sock.send(bytes.fromhex(line))
"""


class Ends(NamedTuple):
    """Who speaks to whom: MACs and addresses."""

    src_mac: str
    dst_mac: str
    src: IPv4Address
    dst: IPv4Address


def send_frames(place: Place, device: str, frames: Sequence[bytes]) -> None:
    """Put frames on a device of a node. Raises CommandError."""
    text = "".join(f"{frame.hex()}\n" for frame in frames)
    place.run([interpreter(), "-I", "-S", "-c", _SENDER, device], stdin=text)


def _layers() -> Any:
    """Load scapy when the first frame is made, and no earlier."""
    from scapy.layers import inet, l2, vxlan

    return inet, l2, vxlan


def ping_frame(ends: Ends, nonce: Nonce) -> bytes:
    """A frame with a ping's request in it."""
    inet, l2, _ = _layers()
    head = l2.Ether(src=ends.src_mac, dst=ends.dst_mac) / inet.IP(src=str(ends.src), dst=str(ends.dst))
    return bytes(head / inet.ICMP(type=8, id=4711, seq=1) / (nonce.value * 7))


def vxlan_frame(ends: Ends, inner: bytes, *, port: int, vni: int) -> bytes:
    """A frame with a VXLAN packet in it that carries another frame."""
    inet, l2, vxlan = _layers()
    head = l2.Ether(src=ends.src_mac, dst=ends.dst_mac) / inet.IP(src=str(ends.src), dst=str(ends.dst))
    return bytes(head / inet.UDP(sport=SOURCE_PORT, dport=port) / vxlan.VXLAN(flags=8, vni=vni) / inner)
