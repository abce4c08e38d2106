"""etcd v3's few messages that flanneld needs, once, for both of etcd's voices: the JSON gateway and gRPC.

A message in memory is a dict of field name to Python value (bytes, int, bool, str, dict, or a list of those); a field
that has its default is left out. A schema gives each field's name, protobuf number and kind.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any, NamedTuple, TypeAlias

Values: TypeAlias = dict[str, Any]


class Field(NamedTuple):
    """A field: protobuf number; kind "bytes", "int", "bool", "str", an enum's names, or another message's schema."""

    number: int
    kind: Any
    repeated: bool = False


Schema: TypeAlias = dict[str, Field]

HEADER: Schema = {
    "cluster_id": Field(1, "int"),
    "member_id": Field(2, "int"),
    "revision": Field(3, "int"),
    "raft_term": Field(4, "int"),
}
KEY_VALUE: Schema = {
    "key": Field(1, "bytes"),
    "create_revision": Field(2, "int"),
    "mod_revision": Field(3, "int"),
    "version": Field(4, "int"),
    "value": Field(5, "bytes"),
    "lease": Field(6, "int"),
}
RANGE_REQUEST: Schema = {
    "key": Field(1, "bytes"),
    "range_end": Field(2, "bytes"),
    "limit": Field(3, "int"),
    "revision": Field(4, "int"),
}
RANGE_RESPONSE: Schema = {
    "header": Field(1, HEADER),
    "kvs": Field(2, KEY_VALUE, repeated=True),
    "more": Field(3, "bool"),
    "count": Field(4, "int"),
}
PUT_REQUEST: Schema = {"key": Field(1, "bytes"), "value": Field(2, "bytes"), "lease": Field(3, "int")}
DELETE_REQUEST: Schema = {"key": Field(1, "bytes")}
REQUEST_OP: Schema = {
    "request_range": Field(1, RANGE_REQUEST),
    "request_put": Field(2, PUT_REQUEST),
    "request_delete_range": Field(3, DELETE_REQUEST),
}
COMPARE: Schema = {
    "result": Field(1, ("EQUAL", "GREATER", "LESS", "NOT_EQUAL")),
    "target": Field(2, ("VERSION", "CREATE", "MOD", "VALUE", "LEASE")),
    "key": Field(3, "bytes"),
    "version": Field(4, "int"),
    "create_revision": Field(5, "int"),
    "mod_revision": Field(6, "int"),
    "lease": Field(8, "int"),
}
TXN_REQUEST: Schema = {
    "compare": Field(1, COMPARE, repeated=True),
    "success": Field(2, REQUEST_OP, repeated=True),
    "failure": Field(3, REQUEST_OP, repeated=True),
}
RESPONSE_OP: Schema = {"response_range": Field(1, RANGE_RESPONSE)}
TXN_RESPONSE: Schema = {
    "header": Field(1, HEADER),
    "succeeded": Field(2, "bool"),
    "responses": Field(3, RESPONSE_OP, repeated=True),
}
GRANT_REQUEST: Schema = {"TTL": Field(1, "int")}
GRANT_RESPONSE: Schema = {"header": Field(1, HEADER), "ID": Field(2, "int"), "TTL": Field(3, "int")}
REVOKE_REQUEST: Schema = {"ID": Field(1, "int")}
REVOKE_RESPONSE: Schema = {"header": Field(1, HEADER)}
WATCH_REQUEST: Schema = {
    "create_request": Field(
        1,
        {
            "key": Field(1, "bytes"),
            "range_end": Field(2, "bytes"),
            "start_revision": Field(3, "int"),
            "progress_notify": Field(4, "bool"),
        },
    )
}
WATCH_RESPONSE: Schema = {
    "header": Field(1, HEADER),
    "created": Field(3, "bool"),
    "canceled": Field(4, "bool"),
    "compact_revision": Field(5, "int"),
    "cancel_reason": Field(6, "str"),
    "events": Field(11, {"type": Field(1, ("PUT", "DELETE")), "kv": Field(2, KEY_VALUE)}, repeated=True),
}
AUTHENTICATE_REQUEST: Schema = {"name": Field(1, "str"), "password": Field(2, "str")}
AUTHENTICATE_RESPONSE: Schema = {"header": Field(1, HEADER), "token": Field(2, "str")}


class Method(NamedTuple):
    """One call: its path on the JSON gateway, its gRPC name, and what goes in and out."""

    path: str
    grpc: str
    request: Schema
    response: Schema


RANGE = Method("/v3/kv/range", "/etcdserverpb.KV/Range", RANGE_REQUEST, RANGE_RESPONSE)
TXN = Method("/v3/kv/txn", "/etcdserverpb.KV/Txn", TXN_REQUEST, TXN_RESPONSE)
GRANT = Method("/v3/lease/grant", "/etcdserverpb.Lease/LeaseGrant", GRANT_REQUEST, GRANT_RESPONSE)
REVOKE = Method("/v3/lease/revoke", "/etcdserverpb.Lease/LeaseRevoke", REVOKE_REQUEST, REVOKE_RESPONSE)
WATCH = Method("/v3/watch", "/etcdserverpb.Watch/Watch", WATCH_REQUEST, WATCH_RESPONSE)
AUTHENTICATE = Method(
    "/v3/auth/authenticate", "/etcdserverpb.Auth/Authenticate", AUTHENTICATE_REQUEST, AUTHENTICATE_RESPONSE
)


def to_json(schema: Schema, message: Values) -> bytes:
    """Encode a message as the JSON gateway takes it: bytes in base64, 64 bit integers as strings."""
    return json.dumps(_json_out(schema, message), separators=(",", ":")).encode()


def _json_out(schema: Schema, message: Values) -> dict[str, Any]:
    return {name: _json_field_out(schema[name], value) for name, value in message.items()}


def _json_field_out(field: Field, value: Any) -> Any:
    if field.repeated:
        single = Field(field.number, field.kind)
        return [_json_field_out(single, item) for item in value]
    if isinstance(field.kind, dict):
        return _json_out(field.kind, value)
    if field.kind == "bytes":
        return base64.b64encode(value).decode()
    if field.kind == "int":
        return str(value)
    return value


def from_json(schema: Schema, decoded: Any) -> Values:
    """Decode what the gateway answered (already parsed as JSON); unknown fields are left out.

    Raises ValueError where a value is not of its field's kind.
    """
    if not isinstance(decoded, dict):
        raise ValueError(f"a JSON object was expected, not {type(decoded).__name__}")
    out: Values = {}
    for name, value in decoded.items():
        field = schema.get(name)
        if field is not None and value is not None:
            out[name] = _json_field_in(field, value)
    return out


def _json_field_in(field: Field, value: Any) -> Any:
    if field.repeated:
        if not isinstance(value, list):
            raise ValueError("a JSON list was expected")
        single = Field(field.number, field.kind)
        return [_json_field_in(single, item) for item in value]
    if isinstance(field.kind, dict):
        return from_json(field.kind, value)
    if field.kind == "int":
        if not isinstance(value, int | str):
            raise ValueError("a number was expected")
        return int(value)
    if field.kind == "bytes":
        if not isinstance(value, str):
            raise ValueError("base64 was expected")
        return binascii.a2b_base64(value, strict_mode=True)
    if field.kind == "bool":
        return value is True
    if isinstance(field.kind, tuple):
        return field.kind[value] if isinstance(value, int) and 0 <= value < len(field.kind) else str(value)
    return str(value)
