"""Speaking to one etcd endpoint by gRPC, for an etcd whose JSON gateway does not serve this client.

Imported only then, because it needs the library grpcio, which costs some 20 MB. The messages are so few that a protobuf
codec for etcd_messages' schemas is smaller than a second library.
"""

from __future__ import annotations

import functools
import os
import site
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

# Its own lines on stderr are not in our log's form, and say nothing that its errors do not.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
try:
    import grpc
except ImportError:
    # flanneld is started without site-packages (-S), which is where the library lives.
    site.main()
    import grpc

from flannel.stores.base import StoreError
from flannel.stores.etcd_http import LinkDownError, RefusedError, api_error
from flannel.stores.etcd_messages import Field, Method, Schema, Values

if TYPE_CHECKING:
    from flannel.stores.etcd_client import TlsFiles

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_OPTIONS = (
    ("grpc.keepalive_time_ms", 20000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2000),  # this is also how long a connection may take
    ("grpc.max_reconnect_backoff_ms", 5000),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
)


class GrpcLink:
    """One endpoint; its connection is kept, as gRPC means it."""

    def __init__(self, host: str, port: int, tls: TlsFiles | None, *, timeout: float) -> None:
        target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._timeout = timeout
        if tls is None:
            self._channel = grpc.insecure_channel(target, options=_OPTIONS)
        else:
            self._channel = grpc.secure_channel(target, _credentials(tls), options=_OPTIONS)

    def call(self, method: Method, request: Values, token: str) -> Values:
        """Do one call. Raises LinkDownError or RefusedError."""
        do = self._channel.unary_unary(
            method.grpc,
            request_serializer=functools.partial(to_protobuf, method.request),
            response_deserializer=functools.partial(from_protobuf, method.response),
        )
        try:
            answer: Values = do(request, timeout=self._timeout, metadata=_metadata(token))
        except grpc.RpcError as error:
            raise _error_of(error) from error
        return answer

    def stream(self, method: Method, request: Values, token: str) -> GrpcStream:
        """Start a call that answers many times; raises LinkDownError or RefusedError if it does not begin."""
        do = self._channel.stream_stream(
            method.grpc,
            request_serializer=functools.partial(to_protobuf, method.request),
            response_deserializer=functools.partial(from_protobuf, method.response),
        )
        return GrpcStream(do(iter([request]), timeout=None, metadata=_metadata(token)), self._timeout)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()


class GrpcStream:
    """The answers of a watch."""

    def __init__(self, call: Any, timeout: float) -> None:
        self._call = call
        self._first = self._begin(timeout)

    def _begin(self, timeout: float) -> Values:
        # A stream has no deadline that ends with its first answer, and an etcd that hangs would hold us for ever.
        timer = threading.Timer(timeout, self._call.cancel)
        timer.daemon = True
        timer.start()
        try:
            return self._next()
        finally:
            timer.cancel()

    def _next(self) -> Values:
        try:
            answer: Values = next(self._call)
        except StopIteration:
            raise LinkDownError("etcd ended the watch") from None
        except grpc.RpcError as error:
            raise _error_of(error) from error
        return answer

    def __iter__(self) -> Iterator[Values]:
        """Yield answers; raises LinkDownError when the stream ends or breaks, RefusedError when etcd says no."""
        yield self._first
        while True:
            yield self._next()  # keep-alive pings end a call to an etcd that hangs

    def close(self) -> None:
        """End the stream, from any thread; a reader gets LinkDownError."""
        self._call.cancel()

    def release(self) -> None:
        """End the stream."""
        self._call.cancel()


def _metadata(token: str) -> tuple[tuple[str, str], ...]:
    return (("hasleader", "true"), ("token", token)) if token else (("hasleader", "true"),)


def _credentials(tls: TlsFiles) -> Any:
    key, cert = (_read(tls.key), _read(tls.cert)) if tls.key and tls.cert else (None, None)
    return grpc.ssl_channel_credentials(_read(tls.ca) if tls.ca else None, key, cert)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise StoreError(f"etcd TLS file {path}: {error.strerror}") from error


def _error_of(error: Any) -> StoreError:
    code, text = error.code().value[0], error.details() or str(error.code())
    if code == grpc.StatusCode.CANCELLED.value[0]:
        return LinkDownError("the call was cancelled")
    answer = api_error(code, text)
    if isinstance(answer, RefusedError) and code == grpc.StatusCode.UNKNOWN.value[0] and "Stream removed" in text:
        return LinkDownError(text)
    return answer


# -- protobuf's wire format, as far as etcd uses it ------------------------------------------------------------------


def to_protobuf(schema: Schema, message: Values) -> bytes:
    """Encode a message."""
    out = bytearray()
    for name, value in message.items():
        field = schema[name]
        for item in value if field.repeated else (value,):
            _encode_field(out, field, item)
    return bytes(out)


def _encode_field(out: bytearray, field: Field, value: Any) -> None:
    if isinstance(field.kind, dict):
        body = to_protobuf(field.kind, value)
    elif field.kind == "bytes":
        body = value
    elif field.kind == "str":
        body = value.encode()
    else:
        number = field.kind.index(value) if isinstance(field.kind, tuple) else int(value)
        _encode_varint(out, field.number << 3 | _VARINT)
        _encode_varint(out, number & 0xFFFFFFFFFFFFFFFF)
        return
    _encode_varint(out, field.number << 3 | _BYTES)
    _encode_varint(out, len(body))
    out += body


def _encode_varint(out: bytearray, number: int) -> None:
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)


def from_protobuf(schema: Schema, data: bytes) -> Values:
    """Decode a message; unknown fields are left out. Raises ValueError for what is no protobuf."""
    names = {field.number: (name, field) for name, field in schema.items()}
    out: Values = {}
    at = 0
    while at < len(data):
        tag, at = _decode_varint(data, at)
        raw, at = _decode_raw(data, at, tag & 7)
        if tag >> 3 not in names:
            continue
        name, field = names[tag >> 3]
        value = _decode_field(field, raw)
        if field.repeated:
            out.setdefault(name, []).append(value)
        else:
            out[name] = value
    return out


def _decode_raw(data: bytes, at: int, wire: int) -> tuple[int | bytes, int]:
    if wire == _VARINT:
        return _decode_varint(data, at)
    if wire == _BYTES:
        size, at = _decode_varint(data, at)
    elif wire in (_FIXED64, _FIXED32):
        size = 8 if wire == _FIXED64 else 4
    else:
        raise ValueError(f"protobuf: wire type {wire}")
    if at + size > len(data):
        raise ValueError("protobuf: a field is longer than its message")
    return data[at : at + size], at + size


def _decode_field(field: Field, raw: int | bytes) -> Any:
    if isinstance(raw, int):
        if field.kind == "bool":
            return raw != 0
        if isinstance(field.kind, tuple):
            return field.kind[raw] if raw < len(field.kind) else str(raw)
        if field.kind == "int":
            return raw
    elif isinstance(field.kind, dict):
        return from_protobuf(field.kind, raw)
    elif field.kind == "bytes":
        return raw
    elif field.kind == "str":
        return raw.decode("utf-8", "replace")
    raise ValueError("protobuf: a field is of another kind than expected")


def _decode_varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("protobuf: a number breaks off")
        octet = data[at]
        at += 1
        number |= (octet & 0x7F) << shift
        if octet < 0x80:
            return number, at
        shift += 7
