"""Many packets at once: the kernel's large TCP packets cut into those of the wire, and the wire's put together again.

The TUN device then hands over up to 64 KiB in one read, with a header (struct virtio_net_hdr) that says how to cut it,
and takes as much in one write; the socket does the same with UDP_SEGMENT and UDP_GRO. On the wire each datagram holds
one packet with right checksums, as if all had been carried one by one. No I/O here.

A checksum is an Internet checksum: the sum of 16-bit words modulo 0xFFFF, which an integer of all bytes has too.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

#: flags, kind of segmentation, header length, segment size, where the checksum starts and where it goes from there
VNET = struct.Struct("=BBHHHH")
NEEDS_CHECKSUM = 1
WHOLE, TCP4 = 0, 1
#: What the device must be told before it hands over large packets (TUNSETOFFLOAD): checksums, and TCP over IPv4.
OFFLOADS = 0x1 | 0x2
NO_OFFLOAD = bytes(VNET.size)

SMALLEST = 20
#: What a UDP datagram, or all the datagrams of one send, can hold.
_MOST_BYTES = 65507
_MOST_SEGMENTS = 64
_TCP, _UDP = 6, 17
_TCP_HEADER = 20
_FIN, _PSH = 0x01, 0x08
_ONLY_ACK = 0x10
_DONT_FRAGMENT = 0x40
# Sizes at which another way of summing is faster, and the pieces of the last one.
_SHORT, _LONG, _CHUNK = 256, 4096, 1024

_IP_PART = struct.Struct("!HHHHH")  # from the total length to the header's checksum
_TCP_PART = struct.Struct("!IIHHH")  # from the sequence number to the checksum
_FACTS = struct.Struct("!BxHxxHBBxx4xI")  # version and header length, length, fragment, TTL, protocol, destination
# A TCP packet without IP options: version to length, fragment to protocol, addresses and ports, sequence number,
# acknowledgement and header length, flags, window. The urgent pointer and TCP's options come behind.
_FLOW = struct.Struct("!4s2x4s2x12sI5sB2s4x")

_integer = int.from_bytes

Piece = bytes | bytearray | memoryview


def word_sum(data: memoryview | bytes | bytearray) -> int:
    """The 16-bit words' sum modulo 0xFFFF; a last odd byte counts as a word's high one."""
    size = len(data)
    if size & 1:
        return (word_sum(data[:-1]) + (data[-1] << 8)) % 0xFFFF
    if size < _SHORT:
        return _integer(data, "big") % 0xFFFF
    # Adding large integers is cheap, dividing them is not: so add first.
    if size <= _LONG:
        step = size // 8 * 2
        value = _integer(data[:step], "big") + _integer(data[step : 2 * step], "big")
        value += _integer(data[2 * step : 3 * step], "big") + _integer(data[3 * step :], "big")
        return value % 0xFFFF
    return sum([_integer(data[at : at + _CHUNK], "big") for at in range(0, size, _CHUNK)]) % 0xFFFF


def finish_checksum(header: bytearray, packet: bytearray, length: int) -> bool:
    """Set the checksum that the kernel left to its device; False where the header makes no sense."""
    flags, _, _, _, start, offset = VNET.unpack_from(header)
    if not flags & NEEDS_CHECKSUM:
        return True
    place = start + offset
    if start < SMALLEST or place + 2 > length:
        return False
    checksum = -word_sum(memoryview(packet)[start:length]) % 0xFFFF
    if not checksum and packet[9] == _UDP:
        checksum = 0xFFFF  # 0 says that there is none
    packet[place : place + 2] = checksum.to_bytes(2, "big")
    return True


class Burst(NamedTuple):
    """Datagrams for one send: headers and payloads in turn, and the size of each datagram but the last."""

    pieces: list[Piece]
    size: int


def cut(header: bytearray, packet: bytearray, length: int) -> list[Burst]:
    """Cut a large TCP packet as the device's header says; nothing where that makes no sense."""
    _, kind, _, size, _, _ = VNET.unpack_from(header)
    ip_length = (packet[0] & 0xF) * 4
    if kind != TCP4 or not size or ip_length < SMALLEST or packet[9] != _TCP or length < ip_length + _TCP_HEADER:
        return []
    head_length = ip_length + (packet[ip_length + 12] >> 4) * 4
    if head_length < ip_length + _TCP_HEADER or head_length >= length or head_length + size > _MOST_BYTES:
        return []
    pieces = _pieces(packet, length, ip_length, head_length, size)
    most = min(_MOST_SEGMENTS, _MOST_BYTES // (head_length + size))
    count = len(pieces) // 2
    at_once = 2 * -(-count // -(-count // most))  # as few sends as can be, of the same size
    return [Burst(pieces[at : at + at_once], head_length + size) for at in range(0, len(pieces), at_once)]


def _pieces(packet: bytearray, length: int, ip_length: int, head_length: int, size: int) -> list[Piece]:
    """Headers and payloads of the packets that a large one stands for, in turn."""
    view = memoryview(packet)[:length]
    count = -(-(length - head_length) // size)
    heads = bytearray(bytes(view[:head_length]) * count)
    _, identification, fragment, hops, _ = _IP_PART.unpack_from(packet, 2)
    sequence, acknowledged, flags, window, _ = _TCP_PART.unpack_from(packet, ip_length + 4)
    # What of either checksum is the same for all of them.
    ip_same = word_sum(view[:2]) + fragment + hops + word_sum(view[12:ip_length])
    tcp_same = word_sum(view[12:20]) + _TCP + word_sum(view[ip_length : ip_length + 4]) + (acknowledged >> 16)
    tcp_same += (acknowledged & 0xFFFF) + window + word_sum(view[ip_length + 18 : head_length])
    tcp_header = head_length - ip_length
    pieces: list[Piece] = []
    heads_view = memoryview(heads)
    flags_here = flags & ~(_FIN | _PSH)
    pack_ip, pack_tcp = _IP_PART.pack_into, _TCP_PART.pack_into
    at = 0
    for start in range(head_length, length, size):
        payload = view[start : start + size]
        if start + size >= length:
            flags_here |= flags & (_FIN | _PSH)
        carried = len(payload)
        total = head_length + carried
        ip_sum = -(ip_same + total + identification) % 0xFFFF
        pack_ip(heads, at + 2, total, identification, fragment, hops, ip_sum)
        tcp_sum = tcp_same + tcp_header + carried + (sequence >> 16) + (sequence & 0xFFFF) + flags_here
        tcp_sum = -(tcp_sum + word_sum(payload)) % 0xFFFF
        pack_tcp(heads, at + ip_length + 4, sequence, acknowledged, flags_here, window, tcp_sum)
        pieces += (heads_view[at : at + head_length], payload)
        at += head_length
        sequence = (sequence + size) & 0xFFFFFFFF
        identification = (identification + 1) & 0xFFFF
    return pieces


class Joiner:
    """Puts packets that came in one receive together for the device, as far as they are one burst of one TCP flow.

    What is no IPv4 packet for the node's own subnet, or has no hop left, is dropped.
    """

    def __init__(self, network: int, mask: int) -> None:
        self._network = network
        self._mask = mask

    def pieces(self, buffer: bytearray, length: int, size: int) -> list[list[Piece]]:
        """What to write to the device, one list a write, of `length` bytes in packets of `size` (the last may be
        shorter). Takes the hop off each packet."""
        view = memoryview(buffer)
        writes: list[list[Piece]] = []
        at = 0
        while at < length:
            end = min(at + size, length)
            if not self._acceptable(buffer, at, end):
                at = end
                continue
            burst_end = self._burst(buffer, view, at, length, size) if end < length else end
            if burst_end > end:
                writes.append(self._join(buffer, view, at, burst_end, size))
                at = burst_end
            else:
                take_hop(buffer, at)
                writes.append([NO_OFFLOAD, view[at:end]])
                at = end
        return writes

    def _acceptable(self, buffer: bytearray, at: int, end: int) -> bool:
        if end - at < SMALLEST:
            return False
        first, length, _, hops, _, destination = _FACTS.unpack_from(buffer, at)
        header = (first & 0xF) * 4
        if first >> 4 != 4 or header < SMALLEST or not header <= length <= end - at or hops <= 1:
            return False
        return bool(destination & self._mask == self._network)

    def _burst(self, buffer: bytearray, view: memoryview, at: int, length: int, size: int) -> int:
        """The end of the packets that can be one large packet: same flow, sequence numbers without a gap, and right
        checksums, for none is looked at behind the device."""
        head = SMALLEST + (buffer[at + SMALLEST + 12] >> 4) * 4 if size >= SMALLEST + _TCP_HEADER else 0
        if buffer[at] != 0x45 or size & 1 or not SMALLEST + _TCP_HEADER <= head < size:
            return at
        flow, fragment, ports, sequence, shared, flags, window = _FLOW.unpack_from(buffer, at)
        if fragment[0] & ~_DONT_FRAGMENT or fragment[1] or fragment[3] != _TCP or flags != _ONLY_ACK:
            return at
        if int.from_bytes(flow[2:], "big") != size:
            return at
        options = bytes(view[at + 38 : at + head])
        expected = (flow, fragment, ports, shared, window)
        end, last = at + size, False
        while end < length and not last:
            stop = end + size
            if stop > length:
                stop, last = length, True
                expected = (flow[:2] + (stop - end).to_bytes(2, "big"), fragment, ports, shared, window)
            if stop - end <= head:
                break
            flow_now, fragment_now, ports_now, number, shared_now, flags, window_now = _FLOW.unpack_from(buffer, end)
            sequence = (sequence + size - head) & 0xFFFFFFFF
            if (flow_now, fragment_now, ports_now, shared_now, window_now) != expected or number != sequence:
                break
            if flags != _ONLY_ACK:
                last = True
                if flags & ~(_FIN | _PSH) != _ONLY_ACK:
                    break
            if view[end + 38 : end + head] != options:
                break
            end = stop
        return end if end > at + size and self._right(view, at, end, size, ports) else at

    def _right(self, view: memoryview, at: int, end: int, size: int, ports: bytes) -> bool:
        """Whether all checksums are right, of IP and TCP together: the words of a right packet add up to what its
        pseudo header lacks."""
        count, rest = divmod(end - at, size)
        pseudo = word_sum(ports[:8]) + _TCP
        expected = count * (pseudo + size - SMALLEST) + (pseudo + rest - SMALLEST if rest else 0)
        return (word_sum(view[at:end]) + expected) % 0xFFFF == 0

    def _join(self, buffer: bytearray, view: memoryview, at: int, end: int, size: int) -> list[Piece]:
        head = SMALLEST + (buffer[at + SMALLEST + 12] >> 4) * 4
        last = at + (end - at - 1) // size * size
        count = (last - at) // size + 1
        first = bytearray(view[at : at + head])
        first[33] |= buffer[last + 33]
        length = end - at - (count - 1) * head
        first[2:4] = length.to_bytes(2, "big")
        first[8] -= 1
        first[10:12] = b"\0\0"
        first[10:12] = (-word_sum(first[:SMALLEST]) % 0xFFFF).to_bytes(2, "big")
        first[36:38] = ((word_sum(first[12:20]) + _TCP + length - SMALLEST) % 0xFFFF).to_bytes(2, "big")
        told = VNET.pack(NEEDS_CHECKSUM, TCP4, head, size - head, SMALLEST, 16)
        return [told, first, *[view[one + head : min(one + size, end)] for one in range(at, end, size)]]


def take_hop(packet: bytearray, at: int = 0) -> bool:
    """Take one off the TTL of the IPv4 packet at `at` and mend its header checksum; False where none was left."""
    hops = packet[at + 8]
    if hops <= 1:
        return False
    packet[at + 8] = hops - 1
    total = (packet[at + 10] << 8 | packet[at + 11]) + 0x100
    total = (total & 0xFFFF) + (total >> 16)
    packet[at + 10], packet[at + 11] = total >> 8, total & 0xFF
    return True
