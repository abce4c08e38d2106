"""Netlink messages: packing, unpacking, requests, dumps and batches over one raw socket."""

from __future__ import annotations

import errno
import os
import socket
import struct
from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12

F_REQUEST, F_ACK, F_DUMP = 0x1, 0x4, 0x300
F_REPLACE, F_EXCL, F_CREATE = 0x100, 0x200, 0x400
F_DUMP_INTERRUPTED = 0x10

_MSG_ERROR, _MSG_DONE = 2, 3
#: By how many bytes a length is past a multiple of four.
_PADDING = (b"", b"\0\0\0", b"\0\0", b"\0")
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_SOL_NETLINK = 270
_ADD_MEMBERSHIP, _EXT_ACK, _GET_STRICT_CHK, _CAP_ACK = 1, 11, 12, 10
_F_CAPPED, _F_ACK_TLVS = 0x100, 0x200
_SO_RCVBUFFORCE, _SO_ATTACH_FILTER = 33, 26
_RECEIVE = 1 << 16
#: The most messages that go out in one send; the kernel works a send off in one go.
BATCH = 100


class Message(NamedTuple):
    """A request: its type, flags beyond REQUEST, and its body (the family's struct and attributes)."""

    type: int
    flags: int
    body: bytes


class Failure(NamedTuple):
    """One message of a batch that the kernel refused: its position, errno, and the kernel's own words if any."""

    position: int
    errno: int
    text: str

    def __str__(self) -> str:
        return os.strerror(self.errno) + (f" ({self.text})" if self.text else "")


class NetlinkError(OSError):
    """The kernel refused a request; `errno` says how, the text holds the kernel's own words where it gave any."""


def attribute(kind: int, data: bytes) -> bytes:
    """Pack one attribute, padded to four bytes."""
    length = 4 + len(data)
    return _ATTRIBUTE.pack(length, kind) + data + _PADDING[length & 3]


def attributes(data: bytes | memoryview, start: int = 0) -> dict[int, bytes]:
    """Unpack attributes from `start`; of a repeated kind the last. A malformed tail is left out."""
    found: dict[int, bytes] = {}
    end = len(data)
    while start + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, start)
        if length < 4 or start + length > end:
            break
        found[kind & 0x3FFF] = bytes(data[start + 4 : start + length])
        start += (length + 3) & ~3
    return found


def messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Split what one receive gave into (type, flags, sequence, payload)."""
    start, end = 0, len(data)
    while start + 16 <= end:
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, start)
        if length < 16 or start + length > end:
            return
        yield kind, flags, sequence, data[start + 16 : start + length]
        start += (length + 3) & ~3


def verdict(flags: int, payload: bytes) -> tuple[int, str]:
    """The errno of an answer, 0 for a success, and the kernel's own words, if any."""
    if len(payload) < 8:
        return errno.EBADMSG, "cut short"
    code = -struct.unpack_from("=i", payload)[0]
    text = ""
    if flags & _F_ACK_TLVS:
        start = 20 if flags & _F_CAPPED else 4 + ((struct.unpack_from("=I", payload, 4)[0] + 3) & ~3)
        text = attributes(payload, start).get(1, b"").rstrip(b"\0").decode("utf-8", "replace")
    return code, text


class Netlink:
    """One netlink socket for requests. Not to be shared between threads."""

    def __init__(self, protocol: int = NETLINK_ROUTE) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._sequence = 0
        self._buffer = memoryview(bytearray(_RECEIVE))
        grow_receive_buffer(self._socket)
        options = (_EXT_ACK, _CAP_ACK, _GET_STRICT_CHK) if protocol == NETLINK_ROUTE else (_EXT_ACK, _CAP_ACK)
        for option in options:
            try:
                self._socket.setsockopt(_SOL_NETLINK, option, 1)
            except OSError:
                pass  # a kernel older than the option: less text in errors, more rows in dumps
        self._socket.bind((0, 0))

    @property
    def port(self) -> int:
        """The port id that the kernel notes on what this socket changes."""
        return int(self._socket.getsockname()[0])

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _send(self, requests: Sequence[Message], last_flags: int) -> int:
        first = self._sequence + 1
        parts: list[bytes] = []
        for position, request in enumerate(requests):
            flags = request.flags | F_REQUEST | (last_flags if position == len(requests) - 1 else 0)
            length = 16 + len(request.body)
            parts += (
                _HEADER.pack(length, request.type, flags, first + position, 0),
                request.body,
                _PADDING[length & 3],
            )
        self._sequence += len(requests)
        self._socket.send(b"".join(parts))
        return first

    def _receive(self) -> bytes:
        """What comes next; by a buffer that stays, for making one takes longer than all the rest."""
        return bytes(self._buffer[: self._socket.recv_into(self._buffer)])

    def request(self, request: Message) -> list[tuple[int, bytes]]:
        """Send one request and return its answers as (type, payload).

        Raises NetlinkError where the kernel refuses it.
        """
        wanted = self._send([request], F_ACK)
        answers: list[tuple[int, bytes]] = []
        while True:
            for kind, flags, sequence, payload in messages(self._receive()):
                if sequence != wanted:
                    continue
                if kind != _MSG_ERROR:
                    answers.append((kind, payload))
                    continue
                code, text = verdict(flags, payload)
                if code:
                    raise NetlinkError(code, os.strerror(code) + (f" ({text})" if text else ""))
                return answers

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """Return the payloads of a dump; one that changed while it was read is read again.

        Raises NetlinkError where the kernel refuses it.
        """
        for _ in range(5):
            rows, interrupted = self._dump(kind, body)
            if not interrupted:
                break
        return rows

    def _dump(self, request_kind: int, body: bytes) -> tuple[list[bytes], bool]:
        wanted = self._send([Message(request_kind, F_DUMP, body)], 0)
        rows: list[bytes] = []
        interrupted = False
        while True:
            for kind, flags, sequence, payload in messages(self._receive()):
                if sequence != wanted:
                    continue
                interrupted |= bool(flags & F_DUMP_INTERRUPTED)
                if kind == _MSG_DONE:
                    code = -struct.unpack_from("=i", payload)[0] if len(payload) >= 4 else 0
                    if code > 0:
                        raise NetlinkError(code, os.strerror(code))
                    return rows, interrupted
                if kind == _MSG_ERROR:
                    code, text = verdict(flags, payload)
                    raise NetlinkError(code, os.strerror(code) + (f" ({text})" if text else ""))
                rows.append(payload)

    def batch(self, requests: Sequence[Message]) -> list[Failure]:
        """Send changes in order, many to a send, and return every refusal; the others are done.

        Only the last of a send is acknowledged, but the kernel answers each one that fails, so none is missed.
        """
        failures: list[Failure] = []
        for start in range(0, len(requests), BATCH):
            part = requests[start : start + BATCH]
            first = self._send(part, F_ACK)
            failures += self._outcome(first, first + len(part) - 1, start)
        return failures

    def _outcome(self, first: int, last: int, offset: int) -> Iterator[Failure]:
        while True:
            for kind, flags, sequence, payload in messages(self._receive()):
                if kind != _MSG_ERROR or not first <= sequence <= last:
                    continue
                code, text = verdict(flags, payload)
                if code:
                    yield Failure(offset + sequence - first, code, text)
                if sequence == last:
                    return


def grow_receive_buffer(sock: socket.socket, size: int = 4 << 20) -> None:
    """Ask for a large receive buffer, past the system's limit where we may; a smaller one only costs comparisons."""
    for option in (_SO_RCVBUFFORCE, socket.SO_RCVBUF):
        try:
            sock.setsockopt(socket.SOL_SOCKET, option, size)
            return
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOBUFS, errno.EINVAL):
                raise


def leave_out(sock: socket.socket, kinds: Sequence[int], port: int) -> None:
    """Have the kernel leave out notifications of these types that a request from `port` caused.

    A classic BPF program reads with the network's byte order what was written with the machine's.
    """
    load, load_half, jump_if_equal, answer = 0x20, 0x28, 0x15, 0x06
    program = [(load_half, 0, 0, 4)]  # the message's type
    for position, kind in enumerate(kinds):
        program.append((jump_if_equal, len(kinds) - position, 0, socket.htons(kind)))
    program += [(answer, 0, 0, 0xFFFFFFFF), (load, 0, 0, 12), (jump_if_equal, 0, 1, socket.htonl(port))]
    program += [(answer, 0, 0, 0), (answer, 0, 0, 0xFFFFFFFF)]
    code = array("B", b"".join(struct.pack("=HBBI", *instruction) for instruction in program))
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(program), code.buffer_info()[0]))
    except OSError:
        pass  # then the echo is heard, and finds everything as it should be


def join_group(sock: socket.socket, group: int) -> None:
    """Subscribe to a multicast group by its number. Raises OSError without CAP_NET_ADMIN where the family wants it."""
    sock.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
