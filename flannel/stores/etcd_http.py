"""Speaking to one etcd endpoint through its JSON gateway."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from flannel.stores.base import StoreError
from flannel.stores.etcd_messages import Method, Values, from_json, to_json
from flannel.stores.linestream import LineStream, explain
from flannel.stores.shorthttp import Answer, BadAnswerError, connect, post

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
        self._named = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def call(self, method: Method, request: Values, token: str) -> Values:
        """Do one call. Raises LinkDownError, GatewayRefusedError or RefusedError."""
        sock, answer = self._send(method, request, token)
        try:
            return from_json(method.response, json.loads(answer.read()))
        except (OSError, BadAnswerError, ValueError, RecursionError) as error:
            raise LinkDownError(f"the answer to {method.path} broke off: {error!r}") from error
        finally:
            answer.close()
            sock.close()

    def stream(self, method: Method, request: Values, token: str) -> HttpStream:
        """Start a call that answers many times. Raises as `call` does."""
        return HttpStream(method, *self._send(method, request, token))

    def close(self) -> None:
        """Nothing is kept open between calls."""

    def _send(self, method: Method, request: Values, token: str) -> tuple[socket.socket, Answer]:
        headers = {"Content-Type": "application/json", "Grpc-Metadata-hasleader": "true"}
        if token:
            headers["Authorization"] = token
        body = to_json(method.request, request)
        try:
            sock = connect(self._host, self._port, self._connect_timeout, self._context)
        except OSError as error:
            raise LinkDownError(explain(error)) from error
        try:
            notice_dead_peer(sock)
            sock.settimeout(self._timeout)
            answer = post(sock, self._named, method.path, headers, body)
            if answer.status == 200:
                return sock, answer
            text = answer.read(65536)
        except (OSError, BadAnswerError) as error:
            sock.close()
            raise LinkDownError(explain(error)) from error
        answer.close()
        sock.close()
        raise _error_of(answer.status, answer.content_type, text)


class HttpStream(LineStream):
    """The answers of a watch."""

    def __init__(self, method: Method, sock: socket.socket, answer: Answer) -> None:
        super().__init__(sock, answer, sock, WATCH_SILENCE)
        self._method, self._answers = method, answer

    def __iter__(self) -> Iterator[Values]:
        """Yield answers; raises LinkDownError when the stream ends or breaks, RefusedError when etcd says no."""
        while True:
            try:
                line = self._answers.readline()
                decoded = json.loads(line) if line else None
            except (OSError, BadAnswerError, ValueError, RecursionError) as error:
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
