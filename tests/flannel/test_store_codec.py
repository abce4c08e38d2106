"""Keys and values of leases, and the two encodings of etcd's messages."""

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flannel.lease import Lease, LeaseAttrs
from flannel.stores import etcd_messages as messages
from flannel.stores.leasecodec import (
    is_unicast_mac,
    lease_key,
    lease_value,
    overlap,
    parse_key,
    parse_value,
    why_unusable,
)

NETWORK = IPv4Network("10.244.0.0/16")
FEW = settings(max_examples=50, deadline=None)

subnets = st.builds(
    lambda address, length: IPv4Network((address, length), strict=False),
    st.integers(0, 2**32 - 1),
    st.integers(0, 31),
)


@FEW
@given(subnets)
def test_key_round_trip(subnet: IPv4Network) -> None:
    assert parse_key(lease_key(subnet)) == (subnet, None)


@FEW
@given(st.text())
def test_any_key_is_read_or_refused(text: str) -> None:
    try:
        subnet, v6 = parse_key(text)
    except ValueError:
        return
    assert text.startswith(str(subnet.network_address)) or v6 is not None


def test_keys() -> None:
    assert lease_key(IPv4Network("10.5.34.0/24")) == "10.5.34.0-24"
    both = (IPv4Network("10.5.34.0/24"), IPv6Network("fd00:10:5:34::/64"))
    assert parse_key("10.5.34.0-24&fd00:10:5:34::-64") == both


@pytest.mark.parametrize(
    "text",
    [
        *("", "-", "10.5.34.0", "10.5.34.0-", "-24", "10.5.34.0-32", "10.5.34.0--24", "10.5.34.0-24 ", "10.5.34.1-24"),
        *(
            "10.5.34.0/24",
            "10.5.34-24",
            "x10.5.34.0-24",
            "10.5.34.0-24/x",
            "10.5.34.0-٢٤",
            "10.5.34.0-024000",
            "10.5.034.0-24",
            "0x0a.5.34.0-24",
        ),
        *("10.5.34.0-24&", "10.5.34.0-24&FD00::-64", "10.5.34.0-24&fd00::-128", "10.5.34.0-24&fd00::1-64"),
        *("fd00::-64", "10.5.34.0-24&fd00::%eth0-64"),
    ],
)
def test_bad_keys(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - a key is refused for one of many reasons, none of them shown
        parse_key(text)


def test_value_is_upstreams_to_the_byte() -> None:
    attrs = LeaseAttrs(IPv4Address("1.2.3.4"), "vxlan", {"VNI": 1, "VtepMAC": "aa:bb:cc:dd:ee:ff"})
    assert lease_value(attrs) == (
        b'{"PublicIP":"1.2.3.4","PublicIPv6":null,"BackendType":"vxlan",'
        b'"BackendData":{"VNI":1,"VtepMAC":"aa:bb:cc:dd:ee:ff"}}'
    )
    assert lease_value(LeaseAttrs(IPv4Address("1.2.3.4"))) == b'{"PublicIP":"1.2.3.4","PublicIPv6":null}'


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.dictionaries(st.text(), inner),
)


@FEW
@given(st.ip_addresses(v=4), st.sampled_from(["", "vxlan", "host-gw", "x"]), json_values)
def test_value_round_trip(address: Any, kind: str, data: Any) -> None:
    attrs = LeaseAttrs(address, kind, data)
    assert parse_value(lease_value(attrs)) == attrs


@FEW
@given(st.binary() | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_value_is_read_or_refused(data: bytes) -> None:
    try:
        attrs = parse_value(data)
    except ValueError:
        return
    assert str(attrs.public_ip) in data.decode()


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100000, "not JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "no PublicIP"),
        (b'{"PublicIP": 5}', "no PublicIP"),
        (b'{"PublicIP": "1.2.3"}', "no IPv4 address"),
        (b'{"PublicIP": "1.2.3.4", "BackendType": 7}', "BackendType"),
    ],
)
def test_bad_values(value: bytes, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        parse_value(value)


GOOD = LeaseAttrs(IPv4Address("192.0.2.7"), "vxlan", {"VNI": 1, "VtepMAC": "0a:00:00:00:00:01"})


@pytest.mark.parametrize(
    ("subnet", "attrs", "fault"),
    [
        ("10.244.7.0/24", GOOD, ""),
        ("10.244.7.0/24", LeaseAttrs(GOOD.public_ip), ""),
        ("10.245.7.0/24", GOOD, "not a part of the Network"),
        ("0.0.0.0/0", GOOD, "not a part of the Network"),
        ("10.244.0.0/16", GOOD, "not a part of the Network"),
        ("10.244.7.0/24", LeaseAttrs(IPv4Address("0.0.0.0")), "no node's address"),
        ("10.244.7.0/24", LeaseAttrs(IPv4Address("224.0.0.9")), "no node's address"),
        ("10.244.7.0/24", LeaseAttrs(IPv4Address("127.0.0.1")), "no node's address"),
        ("10.244.7.0/24", LeaseAttrs(IPv4Address("255.255.255.255")), "no node's address"),
        ("10.244.7.0/24", LeaseAttrs(IPv4Address("10.244.9.9")), "through itself"),
        ("10.244.7.0/24", LeaseAttrs(GOOD.public_ip, "vx\nlan"), "unknown"),
        ("10.244.7.0/24", LeaseAttrs(GOOD.public_ip, "vxlan", None), "BackendData"),
        ("10.244.7.0/24", LeaseAttrs(GOOD.public_ip, "vxlan", {"VtepMAC": "01:00:5e:00:00:01"}), "unicast"),
    ],
)
def test_what_cannot_be_used(subnet: str, attrs: LeaseAttrs, fault: str) -> None:
    why = why_unusable(Lease(IPv4Network(subnet), attrs), NETWORK)
    assert (fault in why) if fault else (why == "")
    assert "\n" not in why


@FEW
@given(subnets, st.integers(0, 2**32 - 1), subnets)
def test_overlap_and_containment_are_those_of_ipaddress(one: IPv4Network, address: int, other: IPv4Network) -> None:
    near = IPv4Network((int(one.network_address), other.prefixlen), strict=False)
    for subnet in (other, near):
        assert overlap(one, subnet) is one.overlaps(subnet)
        why = why_unusable(Lease(subnet, LeaseAttrs(IPv4Address(address))), one)
        assert ("not a part" in why) is (not subnet.subnet_of(one) or subnet == one)
    inside = one.network_address + address % one.num_addresses
    why = why_unusable(Lease(next(one.subnets()), LeaseAttrs(inside)), one)
    assert "through itself" in why or "no node's address" in why


@pytest.mark.parametrize(
    ("mac", "good"),
    [
        ("0a:00:00:00:00:01", True),
        ("AA:bb:CC:dd:EE:ff", True),
        ("00:00:00:00:00:00", False),
        ("ff:ff:ff:ff:ff:ff", False),
        ("0b:00:00:00:00:01", False),
        ("0a:00:00:00:00", False),
        ("0a:00:00:00:00:0g", False),
        ("0a:0:00:00:00:01", False),
        ("0a-00-00-00-00-01", False),
        ("0a: 0:00:00:00:01", False),
        ("0a:  :00:00:00:01", False),
        ("+a:00:00:00:00:01", False),
        ("", False),
    ],
)
def test_unicast_mac(mac: str, good: bool) -> None:
    assert is_unicast_mac(mac) is good


numbers = st.integers(1, 2**63 - 1)
key_values = st.fixed_dictionaries({"key": st.binary(min_size=1), "mod_revision": numbers}, optional={"lease": numbers})
watch_answers = st.fixed_dictionaries(
    {"header": st.fixed_dictionaries({"cluster_id": st.integers(1, 2**64 - 1), "revision": numbers})},
    optional={
        "created": st.just(True),
        "cancel_reason": st.text(min_size=1),
        "events": st.lists(
            st.fixed_dictionaries({"kv": key_values}, optional={"type": st.just("DELETE")}), min_size=1, max_size=3
        ),
    },
)


@FEW
@given(watch_answers)
def test_json_round_trip(answer: dict[str, Any]) -> None:
    decoded = json.loads(messages.to_json(messages.WATCH_RESPONSE, answer))
    assert messages.from_json(messages.WATCH_RESPONSE, decoded) == answer


@FEW
@given(watch_answers)
def test_protobuf_round_trip(answer: dict[str, Any]) -> None:
    grpc = pytest.importorskip("flannel.stores.etcd_grpc", reason="grpcio is missing")
    encoded = grpc.to_protobuf(messages.WATCH_RESPONSE, answer)
    assert grpc.from_protobuf(messages.WATCH_RESPONSE, encoded) == answer


@FEW
@given(st.binary())
def test_any_bytes_are_protobuf_or_refused(data: bytes) -> None:
    grpc = pytest.importorskip("flannel.stores.etcd_grpc", reason="grpcio is missing")
    try:
        answer = grpc.from_protobuf(messages.WATCH_RESPONSE, data)
    except ValueError:
        return
    assert set(answer) <= set(messages.WATCH_RESPONSE)


def test_protobuf_on_the_wire() -> None:
    """protobuf's own documentation: field 1, varint 150 is 08 96 01; field 2, "testing" is 12 07 74…"""
    grpc = pytest.importorskip("flannel.stores.etcd_grpc", reason="grpcio is missing")
    schema = {"a": messages.Field(1, "int"), "b": messages.Field(2, "str")}
    assert grpc.to_protobuf(schema, {"a": 150, "b": "testing"}) == bytes.fromhex("08960112") + b"\x07testing"
    assert grpc.from_protobuf(schema, bytes.fromhex("3d010203041801089601")) == {"a": 150}
