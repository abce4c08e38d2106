"""Sees a packet on every interface of a machine and its pods. A program: `python -I -S -c SOURCE`.

Its order is the first line of standard input: {"spaces": {NAME: PATH, …}, "needles": [HEX, …], "outer": […]}.  A space
is a network namespace ("" as a path: the machine's own).  It prints one line, {"interfaces": {NAME: {INDEX: NAME}}},
once it listens everywhere; at the end of standard input it prints what it saw, as one JSON object: `packets` that
contain one of the needles, or are of an `outer` protocol ({"protocol": 50} or {"port": 51820}).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import socket
import struct
import sys
from typing import Any

ALL_PROTOCOLS = 0x0003
SOL_PACKET, AUXDATA = 263, 8
TIMESTAMP_NS = 35  # SO_TIMESTAMPNS and the type of its message
CLONE_NEWNET = 0x40000000
ROOM, MOST = 8 << 20, 2000  # bytes of a socket's queue; packets that are kept
ETHERNET = 1  # a device's type by which its packets begin with MACs

libc = ctypes.CDLL(None, use_errno=True)


def enter(descriptor: int) -> None:
    if libc.setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def listen(path: str) -> tuple[socket.socket, dict[int, str]]:
    """A socket that sees every interface of a namespace, and the interfaces' names."""
    own = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        if path:
            other = os.open(path, os.O_RDONLY)
            enter(other)
            os.close(other)
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL_PROTOCOLS))
        names = dict(socket.if_nameindex())
    finally:
        enter(own)
        os.close(own)
    sock.setsockopt(SOL_PACKET, AUXDATA, 1)
    sock.setsockopt(socket.SOL_SOCKET, TIMESTAMP_NS, 1)
    for option in (33, socket.SO_RCVBUF):  # SO_RCVBUFFORCE where it is allowed
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, option, ROOM)
    sock.setblocking(False)
    return sock, names


class Sniffer:
    """What is looked for, and what was found."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.needles = [bytes.fromhex(needle) for needle in order["needles"]]
        self.protocols = {one["protocol"] for one in order["outer"] if "protocol" in one}
        self.ports = {one["port"] for one in order["outer"] if "port" in one}
        self.found: list[dict[str, Any]] = []

    def wanted(self, data: bytes, kind: int) -> bool:
        return any(needle in data for needle in self.needles) or self.is_outer(data[14:] if kind == ETHERNET else data)

    def is_outer(self, packet: bytes) -> bool:
        if not (self.protocols or self.ports) or len(packet) < 28 or packet[0] >> 4 not in (4, 6):
            return False
        protocol, at = (packet[9], (packet[0] & 15) * 4) if packet[0] >> 4 == 4 else (packet[6], 40)
        if protocol in self.protocols:
            return True
        return protocol == 17 and len(packet) >= at + 8 and struct.unpack_from("!H", packet, at + 2)[0] in self.ports

    def take(self, space: str, sock: socket.socket) -> None:
        """Read what has come on a socket."""
        while True:
            try:
                data, ancillary, _, address = sock.recvmsg(1 << 16, 256)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:  # an interface went away
                continue
            if len(self.found) >= MOST or not self.wanted(data, address[3]):
                continue
            when, status = 0, 0
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, TIMESTAMP_NS):
                    seconds, nanoseconds = struct.unpack_from("qq", content)
                    when = seconds * 10**9 + nanoseconds
                elif (level, kind) == (SOL_PACKET, AUXDATA):
                    status = struct.unpack_from("I", content)[0]
            self.found.append(
                {"space": space, "interface": address[0], "packet_type": address[2], "device_type": address[3],
                 "when": when, "status": status, "data": data.hex()}
            )  # fmt: skip


def main() -> None:
    """Listen everywhere, say so, look until standard input ends, and say what was there."""
    sniffer = Sniffer(order := json.loads(sys.stdin.buffer.readline()))
    spaces: dict[int, tuple[str, socket.socket]] = {}
    interfaces: dict[str, dict[int, str]] = {}
    faults = []
    for name, path in order["spaces"].items():
        try:
            sock, interfaces[name] = listen(path)
            spaces[sock.fileno()] = name, sock
        except OSError as error:
            faults.append(f"{name}: {error.strerror}")
    poll = select.poll()
    for descriptor in (0, *spaces):
        poll.register(descriptor, select.POLLIN)
    print(json.dumps({"interfaces": interfaces, "faults": faults}), flush=True)
    over = False
    while not over:
        for descriptor, _ in poll.poll():
            if descriptor == 0:
                over = not os.read(0, 4096)
            else:
                sniffer.take(*spaces[descriptor])
    for name, sock in spaces.values():
        sniffer.take(name, sock)
    print(json.dumps({"packets": sniffer.found}), flush=True)


if __name__ == "__main__":
    main()
