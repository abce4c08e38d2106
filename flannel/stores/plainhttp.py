"""The standard library's HTTP client without its TLS, where none is spoken: that is a fifth of the daemon's memory."""

from __future__ import annotations

import socket
import sys
from types import ModuleType


def load(*, tls: bool) -> ModuleType:
    """Import `http.client`, and `ssl` with it only for `tls`; a client that was imported without it gets it later."""
    if not tls and "ssl" not in sys.modules:
        # http.client takes what cannot be imported for a Python that was built without TLS.
        sys.modules["ssl"] = None  # type: ignore[assignment]
        try:
            import http.client
        finally:
            del sys.modules["ssl"]
    else:
        import http.client

        if not hasattr(http.client, "HTTPSConnection"):
            from importlib import reload

            reload(http.client)
    return http.client


def connect(host: str, port: int, timeout: float) -> socket.socket:
    """Connect as http.client does, but for the tables of international names, which an ASCII name does not need."""
    name = host.encode() if host.isascii() else host
    sock = socket.create_connection((name, port), timeout)  # type: ignore[arg-type]
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock
