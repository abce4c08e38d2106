"""Packets between a TUN device and a UDP socket: a datagram is a bare IPv4 packet. Either side takes a hop off."""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from ipaddress import IPv4Network

from flannel.backends.udpoffload import NO_OFFLOAD, SMALLEST, VNET, WHOLE, Burst, Joiner, cut, finish_checksum, take_hop

#: Options of UDP sockets that Python has no names for.
_UDP_SEGMENT, _UDP_GRO = 103, 104
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


def unreachable(packet: bytes, source: bytes) -> bytes:
    """ICMP network unreachable for a packet, from `source` (packed); empty where none may be sent."""
    header = (packet[0] & 0xF) * 4
    first_fragment = not (packet[6] << 8 | packet[7]) & 0x1FFF
    if packet[0] >> 4 != 4 or header < SMALLEST or len(packet) < header + 8 or not first_fragment:
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
    """Moves packets both ways. `table` may be replaced at any time by another thread.

    `subnet` is the own one, as (network, mask): what comes for any other address is dropped. `offload` says whether the
    device puts struct virtio_net_hdr before each packet.
    """

    def __init__(self, tun: int, sock: socket.socket, subnet: tuple[int, int], *, offload: bool) -> None:
        self.tun = tun
        self.sock = sock
        self.table = Table({})
        self._source = subnet[0].to_bytes(4, "big")
        self._joiner = Joiner(*subnet)
        self._offload = offload
        self._bursts = offload and _knows(sock, _UDP_SEGMENT)
        self._receives_bursts = offload and _sets(sock, _UDP_GRO)

    def change_socket(self, sock: socket.socket) -> None:
        """Go on with another socket: both directions take it up with the next packet."""
        self.sock = sock
        self._receives_bursts = self._offload and _sets(sock, _UDP_GRO)

    def send_out(self) -> None:
        """Carry packets from the TUN device to peers, until the device is gone (OSError)."""
        header, packet = bytearray(VNET.size), bytearray(_LARGEST)
        view = memoryview(packet)
        buffers = [header, packet] if self._offload else [packet]
        before = VNET.size if self._offload else 0
        tun, readv = self.tun, os.readv
        while True:
            length = readv(tun, buffers) - before
            if length < SMALLEST or packet[0] >> 4 != 4:
                continue
            destination = bytes(view[16:20])
            table = self.table
            peer = table.cache.get(destination) or table.find(destination)
            if peer is None:
                self._refuse(bytes(view[:length]))
                continue
            if not take_hop(packet):
                continue
            try:
                if header[1] != WHOLE:
                    for burst in cut(header, packet, length):
                        self._send_burst(burst, peer)
                elif finish_checksum(header, packet, length):
                    self.sock.sendto(view[:length], peer)
            except OSError:
                pass  # the network's loss: no route, or a full queue; the sender's protocol deals with it

    def _send_burst(self, burst: Burst, peer: Address) -> None:
        if self._bursts and len(burst.pieces) > 2:
            told = [(socket.IPPROTO_UDP, _UDP_SEGMENT, burst.size.to_bytes(2, sys.byteorder))]
            try:
                self.sock.sendmsg(burst.pieces, told, 0, peer)
                return
            except OSError as error:
                # A device without checksums, or a path with a smaller MTU, takes datagrams one by one only.
                if error.errno not in (errno.EIO, errno.EINVAL, errno.EMSGSIZE):
                    raise
        for at in range(0, len(burst.pieces), 2):
            self.sock.sendmsg(burst.pieces[at : at + 2], (), 0, peer)

    def _refuse(self, packet: bytes) -> None:
        answer = unreachable(packet, self._source)
        if answer:
            try:
                os.writev(self.tun, [NO_OFFLOAD, answer] if self._offload else [answer])
            except OSError:
                pass  # want of memory, say: one error that nobody hears of is no reason to make the device again

    def take_in(self) -> None:
        """Carry packets from peers to the TUN device, until the socket is closed (OSError).

        The device may be replaced meanwhile.
        """
        buffer = bytearray(_LARGEST)
        buffers = [buffer]
        room = socket.CMSG_SPACE(4) if self._receives_bursts else 0
        tun, receive, pieces, write = self.tun, self.sock.recvmsg_into, self._joiner.pieces, os.writev
        offload = self._offload
        while True:
            length, told, _, _ = receive(buffers, room)
            size = int.from_bytes(told[0][2], sys.byteorder) if told else length
            for each in pieces(buffer, length, size or length):
                try:
                    write(tun, each if offload else each[1:])
                except OSError:
                    pass  # not a packet that the kernel takes, or the device is being made again


def _knows(sock: socket.socket, option: int) -> bool:
    try:
        sock.getsockopt(socket.IPPROTO_UDP, option)
    except OSError:
        return False
    return True


def _sets(sock: socket.socket, option: int) -> bool:
    try:
        sock.setsockopt(socket.IPPROTO_UDP, option, 1)
    except OSError:
        return False
    return True
