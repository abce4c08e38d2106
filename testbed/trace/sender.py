"""Sends one packet and waits for its answer. A program: `python -I -S -c SOURCE`, its order on standard input.

The order: {"protocol": "icmp", "target": …, "port": …, "payload": HEX, "number": …, "dont_fragment": …, "wait": …};
`number` is the id of an echo request, or the sequence number of a TCP SYN.  It prints one JSON object: whether it was
`answered`, the `address` that it sent from, and `error`, what its own kernel said.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import sys
import time
from typing import Any

RECVERR, MTU_DISCOVER, MTU = 11, 10, 14  # of IPPROTO_IP
RECVERR6, MTU_DISCOVER6, MTU6 = 25, 23, 24
DISCOVER_NEVER, DISCOVER_ALWAYS = 0, 2


def checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def own_address(family: int, target: str) -> str:
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((target, 9))
        return str(probe.getsockname()[0])


class Sender:
    """One packet, and what came of it."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.order = order
        self.target: str = order["target"]
        self.payload = bytes.fromhex(order["payload"])
        self.family = socket.AF_INET6 if ":" in self.target else socket.AF_INET
        self.told: dict[str, Any] = {"answered": False, "address": "", "error": "", "mtu": 0}

    def open(self) -> socket.socket:
        six = self.family == socket.AF_INET6
        if self.order["protocol"] == "udp":
            sock = socket.socket(self.family, socket.SOCK_DGRAM)
        elif self.order["protocol"] == "tcp":
            sock = socket.socket(self.family, socket.SOCK_RAW, socket.IPPROTO_TCP)
        else:
            sock = socket.socket(self.family, socket.SOCK_RAW, socket.IPPROTO_ICMPV6 if six else socket.IPPROTO_ICMP)
        level = socket.IPPROTO_IPV6 if six else socket.IPPROTO_IP
        sock.setsockopt(level, RECVERR6 if six else RECVERR, 1)
        discover = DISCOVER_ALWAYS if self.order["dont_fragment"] else DISCOVER_NEVER
        sock.setsockopt(level, MTU_DISCOVER6 if six else MTU_DISCOVER, discover)
        return sock

    def packet(self, sport: int) -> bytes:
        number = self.order["number"]
        if self.order["protocol"] == "udp":
            return self.payload
        if self.order["protocol"] == "icmp":
            kind = 128 if self.family == socket.AF_INET6 else 8
            head = struct.pack("!BBHHH", kind, 0, 0, number & 0xFFFF, 1)
            return head[:2] + struct.pack("!H", checksum(head + self.payload)) + head[4:] + self.payload
        head = struct.pack("!HHIIBBHHH", sport, self.order["port"], number, 0, 5 << 4, 2, 64240, 0, 0)
        ends = b"".join(socket.inet_pton(self.family, end) for end in (self.told["address"], self.target))
        total = struct.pack("!IBBBB", len(head), 0, 0, 0, 6) if self.family == socket.AF_INET6 else struct.pack(
            "!BBH", 0, 6, len(head)
        )  # fmt: skip
        return head[:16] + struct.pack("!H", checksum(ends + total + head)) + head[18:]

    def is_answer(self, data: bytes) -> bool:
        if self.order["protocol"] == "udp":
            return True
        if self.family == socket.AF_INET:
            data = data[(data[0] & 15) * 4 :]
        if self.order["protocol"] == "icmp":
            return data[:1] in (b"\x00", b"\x81") and self.payload[:8] in data
        return len(data) >= 20 and struct.unpack_from("!I", data, 8)[0] == (self.order["number"] + 1) & 0xFFFFFFFF

    def run(self) -> None:
        with contextlib.ExitStack() as stack:
            self.told["address"] = own_address(self.family, self.target)
            sock = stack.enter_context(self.open())
            port = self.order["port"] if self.order["protocol"] == "udp" else 0
            sock.connect((self.target, port))
            try:
                sock.send(self.packet(self.order["number"] % 20000 + 40000))
            except OSError:
                six = self.family == socket.AF_INET6
                ask = (socket.IPPROTO_IPV6, MTU6) if six else (socket.IPPROTO_IP, MTU)
                with contextlib.suppress(OSError):
                    self.told["mtu"] = sock.getsockopt(*ask)
                raise
            self.wait(sock)

    def wait(self, sock: socket.socket) -> None:
        """Until the answer is there; an error that somebody sends back may come before it."""
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        end = time.monotonic() + self.order["wait"]
        while (left := end - time.monotonic()) > 0:
            for _, event in poll.poll(int(left * 1000) + 1):
                if event & select.POLLERR:
                    self.read_error(sock)
                if event & select.POLLIN:
                    try:
                        if self.is_answer(sock.recv(1 << 16)):
                            self.told["answered"] = True
                            return
                    except OSError as error:
                        self.told["error"] = self.told["error"] or os.strerror(error.errno or 0)

    def read_error(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            _, ancillary, _, _ = sock.recvmsg(1 << 16, 512, socket.MSG_ERRQUEUE)
            for _, _, content in ancillary:
                if len(content) >= 16:
                    number, _, _, _, _, info, _ = struct.unpack_from("IBBBBII", content)
                    self.told["error"] = os.strerror(number)
                    self.told["mtu"] = info
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def main() -> None:
    """Send, wait, tell."""
    sender = Sender(json.loads(sys.stdin.buffer.read()))
    try:
        sender.run()
    except OSError as error:
        sender.told["error"] = os.strerror(error.errno or 0)
    print(json.dumps(sender.told))


main()
