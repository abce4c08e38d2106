"""Packets between a TUN device and a UDP socket: a datagram is a bare IPv4 packet. Either side takes a hop off."""

from __future__ import annotations

import os
import socket
import struct
from ipaddress import IPv4Network

_SMALLEST = 20
_MOST_CACHED = 8192
_LARGEST = 1 << 16
_ICMP = 1
#: Of these ICMP types an error may be answered with an error: echo and the other queries.
_ICMP_QUERIES = frozenset((0, 8, 9, 10, 13, 14, 15, 16, 17, 18))
_ICMP_TTL = 8

Address = tuple[str, int]


class Table:
    """Which peer holds an address: longest prefix first, with the answers of late kept."""

    def __init__(self, routes: dict[IPv4Network, Address]) -> None:
        by_length: dict[int, dict[int, Address]] = {}
        for network, peer in routes.items():
            by_length.setdefault(network.prefixlen, {})[int(network.network_address)] = peer
        self._levels = [
            ((0xFFFFFFFF << (32 - length)) & 0xFFFFFFFF, by_length[length])
            for length in sorted(by_length, reverse=True)
        ]
        self.cache: dict[bytes, Address] = {}

    def find(self, destination: bytes) -> Address | None:
        """The peer for a packed address; None where no lease holds it."""
        ip = int.from_bytes(destination, "big")
        for mask, peers in self._levels:
            peer = peers.get(ip & mask)
            if peer is not None:
                if len(self.cache) >= _MOST_CACHED:
                    self.cache.clear()
                self.cache[destination] = peer
                return peer
        return None


def checksum(data: bytes) -> int:
    """The Internet checksum."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data[: len(data) & ~1]))
    total += data[-1] << 8 if len(data) & 1 else 0
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def take_hop(packet: bytearray) -> bool:
    """Take one off an IPv4 packet's TTL and mend its header checksum; False where none was left."""
    ttl = packet[8]
    if ttl <= 1:
        return False
    packet[8] = ttl - 1
    total = (packet[10] << 8 | packet[11]) + 0x100
    total = (total & 0xFFFF) + (total >> 16)
    packet[10], packet[11] = total >> 8, total & 0xFF
    return True


def unreachable(packet: bytes, source: bytes) -> bytes:
    """ICMP network unreachable for a packet, from `source` (packed); empty where none may be sent."""
    header = (packet[0] & 0xF) * 4
    first_fragment = not (packet[6] << 8 | packet[7]) & 0x1FFF
    if packet[0] >> 4 != 4 or header < _SMALLEST or len(packet) < header + 8 or not first_fragment:
        return b""
    if packet[9] == _ICMP and packet[header] not in _ICMP_QUERIES:
        return b""
    sender = packet[12:16]
    if sender == b"\0\0\0\0" or sender[0] >= 224:
        return b""
    body = b"\x03\x00\x00\x00\x00\x00\x00\x00" + packet[: header + 8]
    body = body[:2] + checksum(body).to_bytes(2, "big") + body[4:]
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(body), 0, 0, _ICMP_TTL, _ICMP, 0, source, sender)
    return head[:10] + checksum(head).to_bytes(2, "big") + head[12:] + body


class Proxy:
    """Moves packets both ways. `table` may be replaced at any time by another thread."""

    def __init__(self, tun: int, sock: socket.socket, source: bytes) -> None:
        self.tun = tun
        self.sock = sock
        self.source = source
        self.table = Table({})

    def send_out(self) -> None:
        """Carry packets from the TUN device to peers, until the device is gone (OSError)."""
        buffer = bytearray(_LARGEST)
        view = memoryview(buffer)
        buffers, tun, sendto, readv = [buffer], self.tun, self.sock.sendto, os.readv
        while True:
            length = readv(tun, buffers)
            if length < _SMALLEST or buffer[0] >> 4 != 4:
                continue
            destination = bytes(view[16:20])
            table = self.table
            peer = table.cache.get(destination) or table.find(destination)
            if peer is None:
                self._refuse(bytes(view[:length]))
                continue
            if not take_hop(buffer):
                continue
            try:
                sendto(view[:length], peer)
            except OSError:
                pass  # the network's loss: no route, or a full queue; the sender's protocol deals with it

    def _refuse(self, packet: bytes) -> None:
        answer = unreachable(packet, self.source)
        if answer:
            os.write(self.tun, answer)

    def take_in(self) -> None:
        """Carry packets from peers to the TUN device, until the socket is closed (OSError).

        The device may be replaced meanwhile.
        """
        buffer = bytearray(_LARGEST)
        view = memoryview(buffer)
        tun, receive, write = self.tun, self.sock.recv_into, os.write
        while True:
            length = receive(buffer)
            if length < _SMALLEST or not take_hop(buffer):
                continue
            try:
                write(tun, view[:length])
            except OSError:
                pass  # not a packet that the kernel takes, or the device is being made again
