"""The pcap format: reading it as it streams in, and writing it."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from testbed.errors import LabError

SNAP = 262144
_MAGIC = {
    b"\xd4\xc3\xb2\xa1": ("<", 1e-6),
    b"\xa1\xb2\xc3\xd4": (">", 1e-6),
    b"\x4d\x3c\xb2\xa1": ("<", 1e-9),
    b"\xa1\xb2\x3c\x4d": (">", 1e-9),
}


@dataclass(frozen=True, slots=True)
class Packet:
    """A captured packet: Unix time in seconds, its bytes, and its length on the wire."""

    time: float
    data: bytes
    length: int


class PcapReader:
    """Takes a pcap stream in pieces of any size. `link_type` is None until the header has arrived."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.link_type: int | None = None
        self._rest = bytearray()
        self._order, self._unit = "<", 1e-6

    def feed(self, data: bytes) -> Iterator[Packet]:
        """Give the packets that are complete by now. Raises LabError for bytes that are no pcap."""
        self._rest += data
        if self.link_type is None and not self._header():
            return
        at, rest = 0, self._rest
        while len(rest) - at >= 16:
            seconds, fraction, kept, length = struct.unpack_from(self._order + "IIII", rest, at)
            if kept > SNAP:
                raise LabError(f"the capture's stream is broken: a packet of {kept} bytes", where=self.where)
            if len(rest) - at - 16 < kept:
                break
            yield Packet(seconds + fraction * self._unit, bytes(rest[at + 16 : at + 16 + kept]), length)
            at += 16 + kept
        del rest[:at]

    def _header(self) -> bool:
        if len(self._rest) < 24:
            return False
        magic = bytes(self._rest[:4])
        if magic not in _MAGIC:
            raise LabError(f"the capture's stream is no pcap: it begins with {magic.hex()}", where=self.where)
        self._order, self._unit = _MAGIC[magic]
        self.link_type = struct.unpack_from(self._order + "I", self._rest, 20)[0] & 0x0FFFFFFF
        del self._rest[:24]
        return True


def to_pcap(packets: Iterable[Packet], link_type: int) -> bytes:
    """Return a pcap file of these packets, with microseconds."""
    parts = [struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, SNAP, link_type)]
    for packet in packets:
        seconds, micros = divmod(round(packet.time * 1e6), 1_000_000)
        parts.append(struct.pack("<IIII", seconds, micros, len(packet.data), packet.length) + packet.data)
    return b"".join(parts)
