"""Packets that a machine which is no peer puts into a tunnel: encapsulated by hand, sent to a node's tunnel end."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address

from testbed.labs import interpreter
from testbed.labs.base import Place
from testbed.probes.flows import Nonce

_SENDER = r"""
import socket, struct, sys
kind, end, port, vni, mac, source, target, payload, count = sys.argv[1:]
payload = bytes.fromhex(payload) * 2
def summed(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF
if kind == "vxlan":
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
else:
    sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_IPIP)
for number in range(int(count)):
    icmp = struct.pack("!BBHHH", 8, 0, 0, 4712, number) + payload
    icmp = icmp[:2] + struct.pack("!H", summed(icmp)) + icmp[4:]
    ends = socket.inet_aton(source) + socket.inet_aton(target)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(icmp), number, 0, 64, 1, 0) + ends
    packet = head[:10] + struct.pack("!H", summed(head)) + head[12:] + icmp
    if kind == "vxlan":
        frame = bytes.fromhex(mac.replace(":", "")) + bytes.fromhex("0200000000aa") + b"\x08\x00" + packet
        packet = struct.pack("!II", 0x08000000, int(vni) << 8) + frame
    sock.sendto(packet, (end, int(port)))
"""


@dataclass(frozen=True, slots=True)
class TunnelEnd:
    """Where a node takes packets out of the tunnel: `kind` is vxlan or ipip; port, VNI and MAC are vxlan's."""

    kind: str
    address: IPv4Address
    port: int = 0
    vni: int = 0
    mac: str = ""


def forged_ping(
    place: Place, end: TunnelEnd, source: IPv4Address, target: IPv4Address, *, nonce: Nonce, count: int = 3
) -> None:
    """Send echo requests to a pod as if from `source`, by a tunnel that the sender has no part in.

    Answers, if any, go to `source`. Raises CommandError.
    """
    words = [end.kind, str(end.address), str(end.port), str(end.vni), end.mac]
    argv = [interpreter(), "-I", "-S", "-c", _SENDER, *words, str(source), str(target), nonce.hex, str(count)]
    place.run(argv)
