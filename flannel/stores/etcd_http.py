"""Speaking to one etcd endpoint through its JSON gateway, with the standard library's HTTP client."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from flannel.stores import plainhttp
from flannel.stores.base import StoreError
from flannel.stores.etcd_messages import Method, Values, from_json, to_json
from flannel.stores.linestream import LineStream, explain

plainhttp.load(tls=False)
import http.client  # noqa: E402 - after the line that says how

if TYPE_CHECKING:
    import ssl

#: etcd tells of its progress every ten minutes; a watch that is silent for longer is dead, whatever TCP thinks.
WATCH_SILENCE = 660.0

UNAUTHENTICATED = 16
_UNAVAILABLE = (4, 8, 14)  # gRPC's deadline exceeded, resource exhausted, unavailable: another endpoint may do better


class LinkDownError(StoreError):
    """This endpoint cannot be reached or cannot answer now; another one may."""


class GatewayRefusedError(StoreError):
    """The endpoint is there, but its JSON gateway does not serve this client."""


class RefusedError(StoreError):
    """etcd understood and said no. `code` is gRPC's status code."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def api_error(code: int, text: str) -> StoreError:
    """Return the error for a gRPC status that etcd gave."""
    return LinkDownError(text) if code in _UNAVAILABLE else RefusedError(code, text)


class HttpLink:
    """One endpoint. Each call has a connection of its own: calls are rare, and an idle one would only go stale."""

    def __init__(
        self, host: str, port: int, context: ssl.SSLContext | None, *, connect_timeout: float, timeout: float
    ) -> None:
        self._host, self._port, self._context = host, port, context
        self._connect_timeout, self._timeout = connect_timeout, timeout

    def call(self, method: Method, request: Values, token: str) -> Values:
        """Do one call. Raises LinkDownError, GatewayRefusedError or RefusedError."""
        connection, response, _ = self._send(method, request, token)
        try:
            return from_json(method.response, json.loads(response.read()))
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            raise LinkDownError(f"the answer to {method.path} broke off: {error!r}") from error
        finally:
            connection.close()

    def stream(self, method: Method, request: Values, token: str) -> HttpStream:
        """Start a call that answers many times. Raises as `call` does."""
        return HttpStream(method, *self._send(method, request, token))

    def close(self) -> None:
        """Nothing is kept open between calls."""

    def _send(
        self, method: Method, request: Values, token: str
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse, socket.socket]:
        if self._context is None:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=self._connect_timeout)
        else:
            connection = http.client.HTTPSConnection(
                self._host, self._port, timeout=self._connect_timeout, context=self._context
            )
        headers = {"Content-Type": "application/json", "Grpc-Metadata-hasleader": "true"}
        if token:
            headers["Authorization"] = token
        try:
            if self._context is None:
                connection.sock = plainhttp.connect(self._host, self._port, self._connect_timeout)
            else:
                connection.connect()
            sock: socket.socket = connection.sock  # http.client forgets it where the other end announces to close
            notice_dead_peer(sock)
            sock.settimeout(self._timeout)
            connection.request("POST", method.path, to_json(method.request, request), headers)
            response = connection.getresponse()
            if response.status == 200:
                return connection, response, sock
            status, body, kind = response.status, response.read(65536), response.getheader("Content-Type", "")
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise LinkDownError(explain(error)) from error
        connection.close()
        raise _error_of(status, kind, body)


class HttpStream(LineStream):
    """The answers of a watch."""

    def __init__(
        self,
        method: Method,
        connection: http.client.HTTPConnection,
        response: http.client.HTTPResponse,
        sock: socket.socket,
    ) -> None:
        super().__init__(connection, response, sock, WATCH_SILENCE)
        self._method = method

    def __iter__(self) -> Iterator[Values]:
        """Yield answers; raises LinkDownError when the stream ends or breaks, RefusedError when etcd says no."""
        while True:
            try:
                line = self._response.readline()
                decoded = json.loads(line) if line else None
            except (OSError, http.client.HTTPException, ValueError, RecursionError, AttributeError) as error:
                raise LinkDownError(f"the watch broke off: {explain(error)}") from error
            if decoded is None:
                raise LinkDownError("etcd ended the watch")
            yield self._answer(decoded)

    def _answer(self, decoded: Any) -> Values:
        if isinstance(decoded, dict) and "error" in decoded:
            error = decoded["error"] if isinstance(decoded["error"], dict) else decoded
            code = error.get("grpc_code", error.get("code", 2))
            raise api_error(code if isinstance(code, int) else 2, str(error.get("message", error)))
        try:
            return from_json(self._method.response, decoded.get("result") if isinstance(decoded, dict) else None)
        except ValueError as error:
            raise LinkDownError(f"the watch answered what it should not: {error}") from error


def notice_dead_peer(sock: socket.socket) -> None:
    """Have the kernel find out within some 25 s that the other end has gone without a word."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def _error_of(status: int, kind: str, body: bytes) -> StoreError:
    """Tell etcd's own errors from those of a gateway that does not serve us."""
    text = body.decode("utf-8", "replace").strip()
    try:
        decoded = json.loads(text)
        return api_error(int(decoded["code"]), str(decoded.get("message") or decoded.get("error")))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        pass
    # A client certificate with a CommonName is answered 400 in plain text while authentication is on; a gateway that is
    # switched off is answered 404.
    if (status == 400 and "CommonName" in text) or status == 404:
        return GatewayRefusedError(f"the JSON gateway answered {status}: {text[:200]}")
    return LinkDownError(f"HTTP {status} ({kind}): {text[:200]}")
