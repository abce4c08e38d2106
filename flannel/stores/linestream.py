"""An HTTP answer that goes on and on, a JSON object a line."""

from __future__ import annotations

import contextlib
import socket
from typing import Protocol


class Closable(Protocol):
    """What can be given back."""

    def close(self) -> None:
        """Give it back."""


class LineStream:
    """The stream and its connection; `silence` is how many seconds it may say nothing."""

    def __init__(self, connection: Closable, response: Closable, sock: socket.socket, silence: float) -> None:
        self._connection, self._response, self._sock = connection, response, sock
        self._sock.settimeout(silence)

    def allow_silence(self, seconds: float) -> None:
        """Wait for so long for the next line at most."""
        self._sock.settimeout(seconds)

    def close(self) -> None:
        """End the stream, from any thread; its reader hears that it broke off, or that it ended."""
        with contextlib.suppress(OSError):
            # The plain socket's method, for the TLS one takes its state away from under the reading thread.
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def release(self) -> None:
        """Give the connection back; for the reading thread, when it is done."""
        self._response.close()
        self._connection.close()


def explain(error: BaseException) -> str:
    """An exception's class and words."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
