"""Packets with any source address, put into a device past the node's own routes and rules."""

from __future__ import annotations

from ipaddress import IPv4Address

from testbed.labs import interpreter
from testbed.labs.base import Place
from testbed.probes.flows import Nonce

_SENDER = r"""
import socket, struct, sys
device, source, target, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
payload = bytes.fromhex(sys.argv[5]) * 2
def summed(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF
sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
for number in range(count):
    icmp = struct.pack("!BBHHH", 8, 0, 0, 4711, number) + payload
    icmp = icmp[:2] + struct.pack("!H", summed(icmp)) + icmp[4:]
    ends = socket.inet_aton(source) + socket.inet_aton(target)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(icmp), number, 0, 64, 1, 0) + ends
    head = head[:10] + struct.pack("!H", summed(head)) + head[12:]
    sock.sendto(head + icmp, (device, 0x0800))
"""


def spoofed_ping(
    place: Place, device: str, source: IPv4Address, target: IPv4Address, *, nonce: Nonce, count: int = 3
) -> None:
    """Send echo requests by a device as if from `source`. Answers, if any, go there. Raises CommandError."""
    argv = [interpreter(), "-I", "-S", "-c", _SENDER, device, str(source), str(target), str(count), nonce.hex]
    place.run(argv)
