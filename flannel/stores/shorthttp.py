"""As much of HTTP/1.1 as calls to etcd's JSON gateway take: one call a connection, an answer at once or line by line.

Python's own client does this too, but brings the `email` package: a tenth of the daemon's start, and 2 MB.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl

_LONGEST_LINE = 1 << 16
_MOST_HEADERS = 100
#: etcd's own limit for a request is 1.5 MiB; a page of 500 leases, or a batch of events, stays far below this.
_MOST_HELD = 64 << 20
_PIECE = 1 << 16
_HEXADECIMAL = frozenset(b"0123456789abcdefABCDEF")


class BadAnswerError(Exception):
    """What came is not HTTP, or it ended before its end."""


def connect(host: str, port: int, timeout: float, context: ssl.SSLContext | None = None) -> socket.socket:
    """Connect, by TLS where there is a context; `timeout` in seconds. Raises OSError."""
    # Bytes need no tables of international names.
    name = host.encode() if host.isascii() else host
    try:
        sock = socket.create_connection((name, port), timeout)  # type: ignore[arg-type]
    except UnicodeError as error:
        raise OSError(f"{host!r} is no name of a host: {error}") from error
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock if context is None else context.wrap_socket(sock, server_hostname=host)
    except BaseException:
        sock.close()
        raise


def post(sock: socket.socket, host: str, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
    """Send a request, and return the beginning of its answer; `host` is HOST:PORT. Raises OSError, BadAnswerError."""
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if not all(line.isascii() and line.isprintable() for line in lines):
        raise BadAnswerError("a header cannot hold what it was given, such as a token with a line break")
    sock.sendall("\r\n".join([*lines, "", ""]).encode() + body)
    return Answer(sock)


class Answer:
    """An answer whose status and headers have come. Reading raises OSError and BadAnswerError."""

    def __init__(self, sock: socket.socket) -> None:
        self._file = sock.makefile("rb")
        self._held = bytearray()
        self._begun = False
        while True:
            self.status = self._read_status()
            headers = self._read_headers()
            if self.status >= 200:  # before that it only says that the answer is to come
                break
        self.content_type = headers.get("content-type", "")
        coding = headers.get("transfer-encoding", "").lower()
        self._chunked = coding == "chunked"
        length = headers.get("content-length", "")
        if (coding and not self._chunked) or (length and not (length.isascii() and length.isdigit())):
            raise BadAnswerError(f"an answer of coding {coding[:40]!r} and length {length[:40]!r}")
        # Bytes that are still to come of the body, or of its chunk; None: it ends with the connection.
        self._left: int | None = 0 if self._chunked or self.status in (204, 304) else int(length) if length else None

    def read(self, limit: int = 1 << 62) -> bytes:
        """The rest of the body; no more than `limit` bytes of it, where more is not wanted."""
        while len(self._held) < limit and self._fill():
            if len(self._held) > _MOST_HELD:
                raise BadAnswerError(f"an answer of more than {_MOST_HELD} bytes")
        taken = bytes(self._held[:limit])
        self._held.clear()
        return taken

    def readline(self) -> bytes:
        """The next line of the body with its end; empty at the end of all."""
        seen = 0
        while (end := self._held.find(b"\n", seen)) < 0:
            seen = len(self._held)
            if seen > _MOST_HELD:
                raise BadAnswerError(f"a line of more than {_MOST_HELD} bytes")
            if not self._fill():
                end = seen - 1
                break
        line = bytes(self._held[: end + 1])
        del self._held[: end + 1]
        return line

    def close(self) -> None:
        """Give back what it holds; the socket stays the caller's."""
        self._file.close()

    def _fill(self) -> bool:
        """Take in another piece of the body; False at its end."""
        if self._left == 0 and (not self._chunked or not self._next_chunk()):
            return False
        piece = self._file.read1(_PIECE if self._left is None else min(self._left, _PIECE))
        if self._left is None:
            self._held += piece
            return bool(piece)
        if not piece:
            raise BadAnswerError("the connection ended in the middle of an answer")
        self._left -= len(piece)
        self._held += piece
        return True

    def _next_chunk(self) -> bool:
        if self._begun and self._line():
            raise BadAnswerError("a chunk is longer than it was said to be")
        self._begun = True
        size = self._line().partition(b";")[0].strip()
        if not size or not set(size) <= _HEXADECIMAL or len(size) > 8:
            raise BadAnswerError(f"a chunk of size {size[:40]!r}")
        self._left = int(size, 16)
        if self._left:
            return True
        self._read_headers()
        self._chunked = False
        return False

    def _read_status(self) -> int:
        line = self._line()
        version, _, rest = line.partition(b" ")
        number = rest[:3]
        if version not in (b"HTTP/1.1", b"HTTP/1.0") or not number.isdigit() or rest[3:4] not in (b"", b" "):
            raise BadAnswerError(f"this is not HTTP: {line[:40]!r}")
        return int(number)

    def _read_headers(self) -> dict[str, str]:
        headers: dict[str, str] = {}
        for _ in range(_MOST_HEADERS):
            line = self._line()
            if not line:
                return headers
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()
        raise BadAnswerError("an answer of too many headers")

    def _line(self) -> bytes:
        line = self._file.readline(_LONGEST_LINE)
        if not line.endswith(b"\n"):
            raise BadAnswerError("the connection ended without an answer" if not line else "an answer broke off")
        return line.rstrip(b"\r\n")
