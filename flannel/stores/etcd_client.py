"""A small etcd v3 client: several endpoints, TLS, a password, and the few calls that a lease store makes.

It speaks to the JSON gateway, and changes over to gRPC for good where the gateway does not serve: etcd refuses client
certificates that carry a CommonName there while its authentication is on, and a gateway may be switched off.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar
from urllib.parse import urlsplit

from flannel.log import without_userinfo
from flannel.stores.base import Log, StoreError
from flannel.stores.etcd_http import UNAUTHENTICATED, GatewayRefusedError, HttpLink, LinkDownError, RefusedError
from flannel.stores.etcd_messages import AUTHENTICATE, GRANT, RANGE, REVOKE, TXN, WATCH, Method, Values

if TYPE_CHECKING:
    import ssl

#: Keys a page: what one answer holds stays small in memory, and 4000 leases take eight calls.
PAGE = 500
_LIST_TRIES = 5
_TARGETS = {"version": "VERSION", "create_revision": "CREATE", "mod_revision": "MOD", "lease": "LEASE"}
_FAILED_PRECONDITION = 9

Answer = TypeVar("Answer")


class Stream(Protocol):
    """Answers of a watch; `close` may be called from any thread, `release` from the reading one."""

    def __iter__(self) -> Iterator[Values]:
        """Yield answers until the stream ends, which is an error."""

    def close(self) -> None:
        """End the stream; its reader gets LinkDownError."""

    def release(self) -> None:
        """Give back what the stream holds."""


class Link(Protocol):
    """One endpoint, by either of etcd's voices."""

    def call(self, method: Method, request: Values, token: str) -> Values:
        """Do one call. Raises LinkDownError, GatewayRefusedError or RefusedError."""

    def stream(self, method: Method, request: Values, token: str) -> Stream:
        """Start a call that answers many times. Raises as `call` does."""

    def close(self) -> None:
        """Close what is kept open."""


class KeyValue(NamedTuple):
    """A key as etcd has it; `lease` is 0 for a key without one."""

    key: bytes
    value: bytes
    create_revision: int
    mod_revision: int
    lease: int


class Listing(NamedTuple):
    """All keys of a prefix at one revision."""

    keys: list[KeyValue]
    header: Values


class Put(NamedTuple):
    """Whether a conditional write was done, at which revision; if not, what stands in its place."""

    done: bool
    revision: int
    found: KeyValue | None


class TlsFiles(NamedTuple):
    """Paths of PEM files, each may be empty."""

    key: str = ""
    cert: str = ""
    ca: str = ""


_NO_TLS = TlsFiles()


class Watch:
    """A watch that has begun. Raises RefusedError where etcd cancels it at once, which is how it takes a dead token."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self._answers = stream, iter(stream)
        try:
            self._first = next(self._answers)
            if self._first.get("canceled") and not self._first.get("compact_revision"):
                raise RefusedError(UNAUTHENTICATED, f"etcd refused the watch: {self._first.get('cancel_reason', '')}")
        except StoreError:
            stream.release()
            raise

    def __iter__(self) -> Iterator[Values]:
        """Yield answers; raises LinkDownError when the stream ends."""
        yield self._first
        yield from self._answers

    def close(self) -> None:
        """End the watch, from any thread."""
        self._stream.close()

    def release(self) -> None:
        """Give back what it holds; for the reading thread."""
        self._stream.release()


class Endpoint(NamedTuple):
    """Where one etcd listens for clients; `url` is for the log."""

    url: str
    host: str
    port: int
    tls: bool


def key_value(fields: Values) -> KeyValue:
    """Return a key from its message."""
    return KeyValue(
        fields.get("key", b""),
        fields.get("value", b""),
        fields.get("create_revision", 0),
        fields.get("mod_revision", 0),
        fields.get("lease", 0),
    )


def parse_endpoint(url: str, tls: TlsFiles) -> Endpoint:
    """Read an endpoint: http://HOST:PORT, https://HOST:PORT, or HOST:PORT (TLS where key and certificate are given).

    Raises StoreError for anything else.
    """
    whole = url if "://" in url else f"{'https' if tls.key and tls.cert else 'http'}://{url}"
    try:
        parts = urlsplit(whole)
        host, port = parts.hostname, parts.port or 2379
    except ValueError as error:
        raise StoreError(f"etcd endpoint {without_userinfo(url)!r}: {error}") from error
    if parts.scheme not in ("http", "https") or not host or parts.path not in ("", "/"):
        shown = without_userinfo(url)
        raise StoreError(f"etcd endpoint {shown!r}: write it as http://HOST:PORT or https://HOST:PORT")
    return Endpoint(without_userinfo(url), host, port, parts.scheme == "https")


def tls_context(tls: TlsFiles) -> ssl.SSLContext:
    """Return a client context: TLS 1.2 or later, the server always verified. Raises StoreError naming a bad file."""
    import ssl  # only here: without TLS it would be the largest part of the daemon

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        if tls.ca:
            context.load_verify_locations(tls.ca)
        else:
            context.load_default_certs()
    except (OSError, ValueError) as error:
        raise StoreError(f"etcd CA file {tls.ca}: {error}") from error
    if tls.key and tls.cert:
        try:
            context.load_cert_chain(tls.cert, tls.key)
        except (OSError, ValueError) as error:
            raise StoreError(f"etcd certificate {tls.cert} with key {tls.key}: {error}") from error
    return context


class EtcdClient:
    """Safe to call from several threads. Every method raises StoreError."""

    def __init__(
        self, endpoints: Sequence[str], log: Log, *, tls: TlsFiles = _NO_TLS, username: str = "", password: str = ""
    ) -> None:
        self._endpoints = [parse_endpoint(url.strip(), tls) for url in endpoints if url.strip()]
        if not self._endpoints:
            raise StoreError("no etcd endpoint is given")
        self._log, self._tls, self._username, self._password = log, tls, username, password
        self._context = tls_context(tls) if any(endpoint.tls for endpoint in self._endpoints) else None
        self._good = 0  # index of the endpoint that answered last
        self._grpc = False
        self._links: dict[int, Link] = {}
        self._token = ""
        self._lock = threading.Lock()

    def get(self, key: bytes) -> bytes | None:
        """Return a key's value, None where there is no such key."""
        found = self._call(lambda link, token: link.call(RANGE, {"key": key}, token)).get("kvs", [])
        return key_value(found[0]).value if found else None

    def list(self, prefix: bytes) -> Listing:
        """Return every key under a prefix, at one revision; never a part of them."""
        for _ in range(_LIST_TRIES):
            try:
                return self._list_at_one_revision(prefix)
            except RefusedError as error:
                if "compacted" not in str(error):
                    raise
        raise StoreError("etcd is compacted faster than its leases can be listed")

    def _list_at_one_revision(self, prefix: bytes) -> Listing:
        start, end, revision, total = prefix, prefix_end(prefix), 0, -1
        keys: list[KeyValue] = []
        header: Values = {}
        while True:
            request: Values = {"key": start, "range_end": end, "limit": PAGE}
            if revision:
                request["revision"] = revision
            page = self._call(lambda link, token, request=request: link.call(RANGE, request, token))  # type: ignore[misc]
            if not revision:
                header, total = page.get("header", {}), page.get("count", 0)
                revision = header.get("revision", 0)
            got = [key_value(fields) for fields in page.get("kvs", ())]
            keys += got
            if not page.get("more"):
                break
            if not got:
                raise LinkDownError("etcd said that there are more keys, and gave none")
            start = got[-1].key + b"\0"
        if len(keys) != total:
            raise LinkDownError(f"the list of leases was cut: {len(keys)} of {total} came")
        return Listing(keys, header)

    def grant(self, ttl: int) -> tuple[int, int]:
        """Make an etcd lease of `ttl` seconds; return its id and the seconds that etcd gave."""
        answer = self._call(lambda link, token: link.call(GRANT, {"TTL": ttl}, token))
        if not answer.get("ID"):
            raise StoreError("etcd granted a lease without an id")
        return answer["ID"], answer.get("TTL", ttl)

    def revoke(self, lease: int) -> None:
        """Take an etcd lease back."""
        self._call(lambda link, token: link.call(REVOKE, {"ID": lease}, token))

    def put_if(self, expected: Values, key: bytes, value: bytes, lease: int) -> Put:
        """Write a key if it has what is `expected`: version (0: there is no such key), create_revision, mod_revision or
        lease. `lease` 0 writes it without an etcd lease."""
        put: Values = {"key": key, "value": value}
        if lease:
            put["lease"] = lease
        return self._transact(expected, key, {"request_put": put})

    def delete_if(self, key: bytes, mod_revision: int) -> bool:
        """Delete a key if nothing has changed it since `mod_revision`."""
        return self._transact({"mod_revision": mod_revision}, key, {"request_delete_range": {"key": key}}).done

    def _transact(self, expected: Values, key: bytes, success: Values) -> Put:
        compare = [{"result": "EQUAL", "target": _TARGETS[name], "key": key, name: expected[name]} for name in expected]
        request = {
            "compare": compare,
            "success": [success],
            "failure": [{"request_range": {"key": key}}],
        }
        answer = self._call(lambda link, token: link.call(TXN, request, token))
        revision = answer.get("header", {}).get("revision", 0)
        if answer.get("succeeded"):
            return Put(True, revision, None)
        responses = answer.get("responses") or [{}]
        found = responses[0].get("response_range", {}).get("kvs", [])
        return Put(False, revision, key_value(found[0]) if found else None)

    def watch(self, prefix: bytes, revision: int) -> Watch:
        """Watch every key under a prefix from a revision on; the first answer says that the watch was created, or that
        the revision was compacted."""
        create = {
            "key": prefix,
            "range_end": prefix_end(prefix),
            "start_revision": revision,
            "progress_notify": True,
        }
        return self._call(lambda link, token: Watch(link.stream(WATCH, {"create_request": create}, token)))

    def close(self) -> None:
        """Close what is kept open."""
        with self._lock:
            links, self._links = list(self._links.values()), {}
        for link in links:
            link.close()

    def _call(self, do: Callable[[Link, str], Answer]) -> Answer:
        """Do one call at the first endpoint that can, beginning with the one that answered last."""
        reasons: list[str] = []
        for step in range(len(self._endpoints)):
            index = (self._good + step) % len(self._endpoints)
            try:
                answer = self._call_endpoint(index, do)
            except LinkDownError as error:
                reasons.append(f"{self._endpoints[index].url}: {error}")
                continue
            self._good = index
            return answer
        raise LinkDownError("no etcd endpoint answers: " + "; ".join(reasons))

    def _call_endpoint(self, index: int, do: Callable[[Link, str], Answer]) -> Answer:
        try:
            return self._with_token(self._link(index), do)
        except GatewayRefusedError as refusal:
            self._speak_grpc(refusal)
            return self._with_token(self._link(index), do)

    def _with_token(self, link: Link, do: Callable[[Link, str], Answer]) -> Answer:
        if not self._username:
            return do(link, "")
        token = self._token or self._authenticate(link)
        try:
            return do(link, token)
        except RefusedError as error:
            # A token lives for minutes only, and dies with the etcd that gave it.
            if error.code != UNAUTHENTICATED and not _wants_token(str(error)):
                raise
        return do(link, self._authenticate(link))

    def _authenticate(self, link: Link) -> str:
        request = {"name": self._username, "password": self._password}
        try:
            self._token = link.call(AUTHENTICATE, request, "").get("token", "")
        except RefusedError as error:
            if error.code != _FAILED_PRECONDITION and "not enabled" not in str(error):
                raise StoreError(f"etcd does not accept user {self._username!r} and its password: {error}") from error
            self._token = ""  # authentication is off there: the password is not needed
        return self._token

    def _link(self, index: int) -> Link:
        with self._lock:
            if index not in self._links:
                self._links[index] = self._new_link(self._endpoints[index])
            return self._links[index]

    def _new_link(self, endpoint: Endpoint) -> Link:
        # A dead endpoint must not hold up one that lives.
        connect_timeout, timeout = (2.0, 4.0) if len(self._endpoints) > 1 else (5.0, 10.0)
        context = self._context if endpoint.tls else None
        if not self._grpc:
            return HttpLink(endpoint.host, endpoint.port, context, connect_timeout=connect_timeout, timeout=timeout)
        from flannel.stores.etcd_grpc import GrpcLink

        return GrpcLink(endpoint.host, endpoint.port, self._tls if endpoint.tls else None, timeout=timeout)

    def _speak_grpc(self, refusal: GatewayRefusedError) -> None:
        try:
            import flannel.stores.etcd_grpc  # noqa: F401 - whether it can be had is the question
        except ImportError as error:
            raise StoreError(
                f"etcd does not serve this client over its JSON gateway ({refusal}); to speak gRPC with it install"
                f" Python's grpcio (Debian and Ubuntu: python3-grpcio), or use a client certificate without CommonName"
                f" [{error}]"
            ) from error
        with self._lock:
            if not self._grpc:
                self._log("info", f"Speaking gRPC with etcd: {refusal}")
                self._grpc, self._links = True, {}


def prefix_end(prefix: bytes) -> bytes:
    """Return the first key after all that begin with `prefix`."""
    return prefix[:-1] + bytes([prefix[-1] + 1])


def _wants_token(text: str) -> bool:
    return "invalid auth token" in text or "user name is empty" in text or "auth store is old" in text
