"""subnet.env and JSON, read without the packages that cost time."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flannel.cni.basics import decode, encode, masked, parse_subnet_env
from tests.flannel.cnilab import ENV, Runtime


def test_an_empty_subnet_env() -> None:
    every = "FLANNEL_NETWORK, FLANNEL_IPV6_NETWORK, FLANNEL_SUBNET, FLANNEL_IPV6_SUBNET, FLANNEL_MTU, FLANNEL_IPMASQ"
    with pytest.raises(ValueError, match=f"missing {every}$"):
        parse_subnet_env("")


@pytest.mark.parametrize("line", ["FLANNEL_MTU", "FLANNEL_MT", "junk"])
def test_a_line_without_equals_sign_is_named(runtime: Runtime, line: str) -> None:
    runtime.subnet_file.write_text(ENV.replace("FLANNEL_MTU=1450", line))
    assert f"line 3, '{line}', has no '='" in runtime.fails("ADD")["msg"]


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("FLANNEL_NETWORK=10.1.2.3/16,10.2.0.0/16,10.1.0.0/16", "networks4", ["10.1.0.0/16", "10.2.0.0/16"]),
        ("FLANNEL_SUBNET=10.244.1.129/25", "subnet4", "10.244.1.128/25"),
        ("FLANNEL_MTU=4294967295", "mtu", 4294967295),
        ("FLANNEL_IPMASQ=True", "ip_masq", False),
        ("FLANNEL_IPMASQ= true", "ip_masq", False),
        ("OTHER=1\n\n# a comment\r", "mtu", 1450),
    ],
)
def test_values(line: str, key: str, value: Any) -> None:
    assert parse_subnet_env(f"{ENV}{line}\n")[key] == value


@pytest.mark.parametrize(
    "line",
    [
        *("FLANNEL_MTU=-1", "FLANNEL_MTU=4294967296", "FLANNEL_MTU= 1450", 'FLANNEL_MTU="1450"', "FLANNEL_MTU="),
        *("FLANNEL_SUBNET=10.244.1.1", "FLANNEL_SUBNET=10.244.1.1/33", "FLANNEL_SUBNET=", "FLANNEL_SUBNET=10.244.1/24"),
        *("FLANNEL_NETWORK=10.244.0.0/16, 10.2.0.0/16", "FLANNEL_IPV6_SUBNET=fd00::/129"),
    ],
)
def test_bad_values(line: str) -> None:
    with pytest.raises(ValueError, match=f"line 5, {line.partition('=')[0]}: "):
        parse_subnet_env(ENV + line)


@settings(max_examples=100, deadline=None)
@given(st.ip_addresses(), st.integers(0, 128))
def test_masked(address: Any, length: int) -> None:
    length = min(length, address.max_prefixlen)
    import ipaddress

    network = ipaddress.ip_network((address, length), strict=False)
    assert ipaddress.ip_network(masked(f"{address}/{length}")) == network


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(json_values)
def test_json_is_what_the_json_package_makes_of_it(value: Any) -> None:
    text = encode(value)
    assert text == json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    assert decode(b" \n" + text + b"\t ") == value


@pytest.mark.parametrize("text", [b"", b" ", b"{", b"{}x", b"{} {}", b"NaN", b"\xff", b"[" * 100000, b'{"a":}', b"'a'"])
def test_what_is_no_json(text: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - which words is the json package's affair
        decode(text)
