"""Speaking to the Kubernetes API with the standard library's HTTP client: calls, and a watch's lines."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import ssl
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlencode

from flannel import __version__
from flannel.log import quoted
from flannel.stores.base import StoreError
from flannel.stores.etcd_http import notice_dead_peer
from flannel.stores.kubernetes_config import Access
from flannel.stores.linestream import LineStream, explain

STRATEGIC_MERGE = "application/strategic-merge-patch+json"
#: No object is larger in etcd than 1.5 MiB; what comes in a longer line is not the API's.
_LONGEST_LINE = 8 << 20
_LONGEST_WAIT = 300.0  # seconds of a Retry-After that are obeyed

Query = Mapping[str, str | int]


class UnreachableError(StoreError):
    """The API cannot be reached, or its answer broke off."""


class RefusedError(StoreError):
    """The API said no: an HTTP status, or an error within a watch.

    `retry_after` is how many seconds it asked to wait, 0.0 if it did not.
    """

    def __init__(self, status: int, text: str, retry_after: float = 0.0, *, too_new: bool = False) -> None:
        super().__init__(text)
        self.status, self.retry_after = status, retry_after
        self.too_new = too_new  # the API has not come as far as the resource version that was asked for


class KubeClient:
    """Makes links to the API. `connect_timeout` and `timeout` (for each read) are in seconds."""

    def __init__(self, access: Access, *, connect_timeout: float = 5.0, timeout: float = 30.0) -> None:
        self.access = access
        self._connect_timeout, self._timeout = connect_timeout, timeout
        self._context: ssl.SSLContext | None = None
        self._stamp: tuple[Any, ...] = ()

    def get(self, path: str, query: Query = {}) -> dict[str, Any]:  # noqa: B006 - it is only read
        """GET one object. Raises UnreachableError, RefusedError."""
        with contextlib.closing(self.link()) as link:
            return link.get(path, query)

    def patch(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """PATCH by strategic merge. Raises as `get` does."""
        with contextlib.closing(self.link()) as link:
            return link.call("PATCH", path, {}, body)

    def watch(self, path: str, query: Query, silence: float) -> Lines:
        """Start a watch; each read waits `silence` seconds at most. Raises as `get` does."""
        link = self.link()
        try:
            return link.lines(path, query, silence)
        except BaseException:
            link.close()
            raise

    def link(self) -> Link:
        """Connect. Raises UnreachableError, or StoreError for files that cannot be used."""
        access = self.access
        connection: http.client.HTTPConnection
        if access.tls:
            context = self._tls()
            connection = http.client.HTTPSConnection(
                access.host, access.port, timeout=self._connect_timeout, context=context
            )
        else:
            connection = http.client.HTTPConnection(access.host, access.port, timeout=self._connect_timeout)
        try:
            http.client.HTTPConnection.connect(connection)
            sock: socket.socket = connection.sock
            notice_dead_peer(sock)
            if access.tls:
                # The name to check may be another one than the host, which http.client knows nothing of.
                connection.sock = context.wrap_socket(sock, server_hostname=access.server_name or access.host)
            connection.sock.settimeout(self._timeout)
        except OSError as error:
            connection.close()
            raise UnreachableError(f"{access.url}: {explain(error)}") from error
        return Link(connection, access)

    def _tls(self) -> ssl.SSLContext:
        """The TLS context, made again when a file that it was made of has changed."""
        access = self.access
        stamp = tuple(_stamp(path) for path in (access.ca_file, access.cert_file, access.key_file) if path)
        if self._context is None or stamp != self._stamp:
            try:
                self._context = _make_context(access)
            except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
                files = ", ".join(path for path in (access.ca_file, access.cert_file, access.key_file) if path)
                raise StoreError(f"cannot use the certificates for {access.url} ({files}): {error}") from None
            self._stamp = stamp
        return self._context


def _stamp(path: str) -> tuple[int, int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return (0, 0, 0)
    return (found.st_ino, found.st_mtime_ns, found.st_size)


def _make_context(access: Access) -> ssl.SSLContext:
    ca = access.ca_data.decode("ascii", "replace") or None
    # With neither, the certificates that the system trusts are.
    context = ssl.create_default_context(cafile=None if ca else access.ca_file or None, cadata=ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not access.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if (access.cert_file or access.cert_data) and (access.key_file or access.key_data):
        with _as_file(access.cert_file, access.cert_data) as cert, _as_file(access.key_file, access.key_data) as key:
            context.load_cert_chain(cert, key)
    return context


@contextlib.contextmanager
def _as_file(path: str, data: bytes) -> Iterator[str]:
    """A path to what stands in the kubeconfig itself; OpenSSL reads files alone, and a key must not get to a disk."""
    if not data:
        yield path
        return
    number = os.memfd_create("flanneld", os.MFD_CLOEXEC)
    try:
        os.write(number, data)
        yield f"/proc/self/fd/{number}"
    finally:
        os.close(number)


class Link:
    """One connection to the API."""

    def __init__(self, connection: http.client.HTTPConnection, access: Access) -> None:
        self._connection, self._access = connection, access

    def get(self, path: str, query: Query = {}) -> dict[str, Any]:  # noqa: B006 - it is only read
        """GET one object. Raises UnreachableError, RefusedError."""
        return self.call("GET", path, query)

    def call(self, verb: str, path: str, query: Query, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Make one call; returns the object that it is answered with. Raises UnreachableError, RefusedError."""
        response = self._send(verb, path, query, body)
        try:
            decoded = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            raise UnreachableError(f"the answer to {verb} {path} broke off: {explain(error)}") from error
        if not isinstance(decoded, dict):
            raise UnreachableError(f"the answer to {verb} {path} is no object: {quoted(decoded)}")
        return decoded

    def lines(self, path: str, query: Query, silence: float) -> Lines:
        """GET what is answered line by line. Raises as `call` does."""
        sock: socket.socket = self._connection.sock  # http.client forgets it where the other end announces to close
        return Lines(self._connection, self._send("GET", path, query), sock, silence)

    def close(self) -> None:
        """Give the connection back."""
        self._connection.close()

    def _send(
        self, verb: str, path: str, query: Query, body: Mapping[str, Any] | None = None
    ) -> http.client.HTTPResponse:  # fmt: skip
        headers = {"Accept": "application/json", "User-Agent": f"flanneld/{__version__}"}
        token = self._token()
        if token:
            headers["Authorization"] = f"Bearer {token}"
        data = None
        if body is not None:
            headers["Content-Type"] = STRATEGIC_MERGE
            data = json.dumps(body, separators=(",", ":")).encode()
        target = self._access.base_path + path + (f"?{urlencode(query)}" if query else "")
        try:
            self._connection.request(verb, target, data, headers)
            response = self._connection.getresponse()
            if 200 <= response.status < 300:
                return response
            text = response.read(65536)
        except (OSError, http.client.HTTPException) as error:
            raise UnreachableError(f"{self._access.url}: {explain(error)}") from error
        raise _refusal(verb, path, response, text)

    def _token(self) -> str:
        """The token as it is now: the kubelet puts a new one into the same file well before the old one ends."""
        if not self._access.token_file:
            return self._access.token
        try:
            with open(self._access.token_file, encoding="ascii") as file:
                token = file.read().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise StoreError(f"cannot read the token {self._access.token_file}: {explain(error)}") from None
        if not token or not token.isprintable():
            raise StoreError(f"{self._access.token_file} holds no token")
        return token


class Lines(LineStream):
    """A watch's events."""

    def __init__(
        self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse, sock: socket.socket,
        silence: float,
    ) -> None:  # fmt: skip
        super().__init__(connection, response, sock, silence)
        self._lines = response

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield events until the API ends the watch in good order. Raises UnreachableError."""
        while True:
            try:
                line = self._lines.readline(_LONGEST_LINE)
                if not line:
                    return
                if not line.endswith(b"\n"):
                    raise UnreachableError("the watch broke off in the middle of a line")
                decoded = json.loads(line)
            except TimeoutError:
                raise UnreachableError("the watch fell silent") from None
            except (OSError, http.client.HTTPException, ValueError, RecursionError, AttributeError) as error:
                raise UnreachableError(f"the watch broke off: {explain(error)}") from error
            if not isinstance(decoded, dict):
                raise UnreachableError(f"the watch sent what is no event: {quoted(decoded)}")
            yield decoded


def _refusal(verb: str, path: str, response: http.client.HTTPResponse, body: bytes) -> RefusedError:
    """Return the error for a status that is no success."""
    try:
        status = json.loads(body)
    except (ValueError, RecursionError):
        status = {"message": body.decode("utf-8", "replace").strip()}
    refused = status_error(status if isinstance(status, dict) else {}, response.status, f"{verb} {path}")
    header = response.getheader("Retry-After", "")
    if header.isascii() and header.isdigit():
        refused.retry_after = min(float(header), _LONGEST_WAIT)
    return refused


def status_error(status: Mapping[str, Any], code: int, what: str) -> RefusedError:
    """Return the error that a Status object tells of; `code` where it names none, `what` was asked for."""
    given = status.get("code")
    if isinstance(given, int) and not isinstance(given, bool) and 100 <= given < 600:
        code = given
    message, details = status.get("message"), status.get("details")
    if not isinstance(message, str):
        message = ""
    seconds = details.get("retryAfterSeconds") if isinstance(details, dict) else None
    wait = float(min(seconds, _LONGEST_WAIT)) if isinstance(seconds, int) and seconds > 0 else 0.0
    hint = {
        401: " (the token or certificate is not accepted)",
        403: " (flanneld's ClusterRole must allow pods get, nodes get, list and watch, and nodes/status patch)",
    }.get(code, "")
    text = f"the Kubernetes API answered {what} with {code}: {quoted(message)}{hint}"
    return RefusedError(code, text, min(wait, _LONGEST_WAIT), too_new="Too large resource version" in message)
