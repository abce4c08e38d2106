"""What netlink messages say, in words; part of the program `stateof`, and by itself as well."""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any

VXLAN = {1: "id", 4: "local", 5: "ttl", 6: "tos", 7: "learning", 8: "ageing", 15: "port", 18: "udpcsum", 29: "df"}
LOWER = {"vxlan": 3, "ipip": 1}
"""The attribute with the number of the device that a tunnel's packets leave by."""


def attributes(data: bytes, at: int, end: int) -> Iterator[tuple[int, bytes]]:
    """The attributes of a netlink message between two places."""
    while end - at >= 4:
        length, kind = struct.unpack_from("HH", data, at)
        if length < 4:
            return
        yield kind & 0x3FFF, data[at + 4 : at + length]
        at += (length + 3) & ~3


def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The type and body of each netlink message."""
    at = 0
    while len(data) - at >= 16:
        length, kind = struct.unpack_from("IH", data, at)
        if length < 16:
            return
        yield kind, data[at + 16 : at + length]
        at += (length + 3) & ~3


def text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")


def number(value: bytes) -> int:
    return int.from_bytes(value, sys.byteorder)


def address(value: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(value) == 4 else socket.AF_INET6, value)


def mac(value: bytes) -> str:
    return ":".join(f"{byte:02x}" for byte in value)


def told_of(kind: str, data: bytes, name_of: Callable[[int], str]) -> list[str]:
    """A device's own attributes, those of vxlan by their names.

    What it stands on is told by name: that has another number once a container has started anew.
    """
    words = []
    for key, value in attributes(data, 0, len(data)):
        if key == LOWER.get(kind):
            words.append(f"link {name_of(number(value)) if any(value) else '-'}")
        elif kind == "vxlan" and key in VXLAN:
            name = VXLAN[key]
            order: Any = "big" if name == "port" else sys.byteorder
            words.append(f"{name} {address(value) if name == 'local' else int.from_bytes(value, order)}")
        else:
            words.append(f"{key}={value.hex()}")
    return words


def next_hops(data: bytes) -> Iterator[tuple[int, dict[int, bytes], int]]:
    at = 0
    while len(data) - at >= 8:
        length, flags, _, index = struct.unpack_from("HBBi", data, at)
        if length < 8:
            return
        yield index, dict(attributes(data, at + 8, at + length)), flags
        at += (length + 3) & ~3
