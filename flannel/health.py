"""/healthz and /readyz, on a thread of their own, so that a slow client holds up nobody."""

from __future__ import annotations

import selectors
import socket
import threading
import time

_PATIENCE = 5.0
_LONGEST_REQUEST = 8192
_MOST_CLIENTS = 64


class HealthError(Exception):
    """The health server cannot listen; the text says where and why."""


class _Client:
    __slots__ = ("data", "deadline", "socket")

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.data = b""
        self.deadline = time.monotonic() + _PATIENCE


class HealthServer:
    """Answers `/healthz` with 200 as long as the process lives, `/readyz` with 200 once `ready` is set, else 503."""

    def __init__(self, address: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.ready = False
        self._listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._listener.bind((address, port))
            self._listener.listen(128)
        except (OSError, OverflowError) as error:
            self._listener.close()
            raise HealthError(f"cannot listen on {address} port {port} for --healthz-port: {error}") from None
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._clients: set[_Client] = set()
        threading.Thread(target=self._serve, name="health", daemon=True).start()

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._listener.getsockname()[1])

    def _serve(self) -> None:
        while True:
            timeout = None
            if self._clients:
                timeout = max(0.0, min(client.deadline for client in self._clients) - time.monotonic())
            for key, _ in self._selector.select(timeout):
                if key.data is None:
                    self._accept()
                elif key.data in self._clients:  # one before it may have cost it its place
                    self._read(key.data)
            now = time.monotonic()
            for client in [client for client in self._clients if client.deadline <= now]:
                self._drop(client)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        if len(self._clients) >= _MOST_CLIENTS:
            self._drop(min(self._clients, key=lambda client: client.deadline))
        sock.setblocking(False)
        client = _Client(sock)
        self._clients.add(client)
        self._selector.register(sock, selectors.EVENT_READ, client)
        self._read(client)  # who has something to say is not to wait among those who have not

    def _drop(self, client: _Client) -> None:
        self._clients.discard(client)
        self._selector.unregister(client.socket)
        client.socket.close()

    def _read(self, client: _Client) -> None:
        try:
            data = client.socket.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        client.data += data
        if b"\r\n\r\n" in client.data or b"\n\n" in client.data or len(client.data) > _LONGEST_REQUEST:
            try:
                client.socket.send(self._answer(client.data))
                client.socket.shutdown(socket.SHUT_WR)
            except OSError:
                pass
            self._drop(client)
        elif not data:
            self._drop(client)

    def _answer(self, request: bytes) -> bytes:
        words = request.split(b"\r\n", 1)[0].split(b" ")
        if len(words) != 3 or len(request) > _LONGEST_REQUEST:
            return _response("400 Bad Request", "bad request", True)
        path = words[1].split(b"?", 1)[0]
        with_body = words[0] != b"HEAD"
        if path == b"/healthz":
            return _response("200 OK", "flanneld is running", with_body)
        if path == b"/readyz" and self.ready:
            return _response("200 OK", "flanneld is ready", with_body)
        if path == b"/readyz":
            return _response("503 Service Unavailable", "flanneld is not ready yet", with_body)
        return _response("404 Not Found", "404 page not found\n", with_body)


def _response(status: str, text: str, with_body: bool) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\n"
    head += f"Content-Length: {len(text)}\r\nConnection: close\r\n\r\n"
    return (head + (text if with_body else "")).encode()
