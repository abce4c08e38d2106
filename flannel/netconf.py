"""The network configuration: reading and checking it. Every error names the key and the value at fault."""

from __future__ import annotations

import json
from collections.abc import Mapping
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import Any, NamedTuple

_KEYS = (
    "EnableIPv4 EnableIPv6 EnableNFTables Network IPv6Network SubnetMin SubnetMax IPv6SubnetMin IPv6SubnetMax "
    "SubnetLen IPv6SubnetLen Backend"
).split()
_LONGEST_NAME = 20
_BY_LOWER_CASE = {key.lower(): key for key in _KEYS}


class NetConfError(ValueError):
    """The network configuration cannot be used; the text names key and value."""


class NetConf(NamedTuple):
    """A network configuration, checked, with its defaults filled in.

    `backend` holds the backend's own keys in lower case, `Type` left out; `notes` says what an operator may not
    expect of it (keys that nobody reads, a default that surprises).

    With IPv6 alone, `network` and what follows are IPv6's; `ipv6_network` is there in dual stack only.
    """

    network: IPv4Network | IPv6Network
    subnet_len: int
    subnet_min: IPv4Address | IPv6Address
    subnet_max: IPv4Address | IPv6Address
    backend_type: str
    backend: Mapping[str, Any]
    enable_ipv4: bool = True
    enable_ipv6: bool = False
    enable_nftables: bool = False
    ipv6_network: IPv6Network | None = None
    ipv6_subnet_len: int = 0
    ipv6_subnet_min: IPv6Address | None = None
    ipv6_subnet_max: IPv6Address | None = None
    notes: tuple[str, ...] = ()


def parse(text: str) -> NetConf:
    """Read and check a network configuration. Raises NetConfError."""
    try:
        decoded = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NetConfError(f"the network configuration is not JSON: {error}") from None
    if not isinstance(decoded, dict):
        raise NetConfError(f"the network configuration is a {type(decoded).__name__}, not an object")
    values: dict[str, Any] = {}
    notes = []
    for given, value in decoded.items():
        key = _BY_LOWER_CASE.get(given.lower())
        if key is None:
            notes.append(f"network configuration: nobody reads the key {given!r}")
        elif value is not None or key == "Backend":
            values[key] = value
    enable_ipv4 = _bool(values, "EnableIPv4", True)
    enable_ipv6 = _bool(values, "EnableIPv6", False)
    if not enable_ipv4 and not enable_ipv6:
        raise NetConfError("EnableIPv4 and EnableIPv6 are both false: no address family is left")
    backend_type, backend, more = _backend(values)
    v4 = _family(values, "", 4) if enable_ipv4 else None
    v6 = _family(values, "IPv6", 6) if enable_ipv6 else None
    first, second = (v4, v6) if v4 else (v6, None)
    assert first is not None  # one of them is enabled
    network, length, low, high = first
    network6, length6, low6, high6 = second or (None, 0, None, None)
    return NetConf(
        network, length, low, high, backend_type, backend, enable_ipv4, enable_ipv6,
        _bool(values, "EnableNFTables", False), network6, length6, low6, high6, (*notes, *more),
    )  # fmt: skip


def _bool(values: Mapping[str, Any], key: str, default: bool) -> bool:
    value = values.get(key, default)
    if not isinstance(value, bool):
        raise NetConfError(f"{key} is {value!r}, not true or false")
    return value


def _backend(values: Mapping[str, Any]) -> tuple[str, dict[str, Any], list[str]]:
    if "Backend" not in values or values["Backend"] == "":
        return "udp", {}, ["network configuration: no Backend, so udp is used, as flannel always has"]
    backend = values["Backend"]
    if backend is None:
        return "", {}, []
    if not isinstance(backend, dict):
        is_name = isinstance(backend, str) and len(backend) <= _LONGEST_NAME  # anything longer may be a key
        shown = repr(backend) if is_name else f"a {type(backend).__name__}"
        raise NetConfError(f'Backend is {shown}, not an object such as {{"Type": "vxlan"}}')
    lowered = {key.lower(): value for key, value in backend.items()}
    backend_type = lowered.pop("type", "")
    if not isinstance(backend_type, str):
        raise NetConfError(f"Backend.Type is {backend_type!r}, not a string")
    return backend_type.lower(), lowered, []


def _family(values: Mapping[str, Any], prefix: str, version: int) -> tuple[Any, int, Any, Any]:
    """Network, subnet length, first and last subnet of one address family, checked."""
    bits = 32 if version == 4 else 128
    usual, spare = (24, 2) if version == 4 else (64, 2)
    network = _network(values, f"{prefix}Network", version)
    longest = bits - spare
    key = f"{prefix}SubnetLen"
    length = values.get(key, 0)
    if not isinstance(length, int) or isinstance(length, bool) or length < 0:
        raise NetConfError(f"{key} is {length!r}, not a number of bits")
    if length:
        if length > longest:
            raise NetConfError(f"{key} is {length}: a subnet of less than four addresses cannot hold pods")
        if length < network.prefixlen + 2:
            raise NetConfError(f"{key} is {length}: {prefix}Network {network} must hold at least four subnets")
    elif network.prefixlen > longest - 2:
        raise NetConfError(f"{prefix}Network is {network}: too small to hold at least four subnets")
    else:
        length = usual if network.prefixlen <= usual - 2 else network.prefixlen + 2
    size = 1 << (bits - length)
    low = _bound(values, f"{prefix}SubnetMin", network, size, network.network_address + size)
    high = _bound(values, f"{prefix}SubnetMax", network, size, network.broadcast_address - (size - 1))
    if low > high:
        raise NetConfError(f"{prefix}SubnetMin is {low}: above {prefix}SubnetMax {high}")
    return network, length, low, high


def _network(values: Mapping[str, Any], key: str, version: int) -> IPv4Network | IPv6Network:
    value = values.get(key, "")
    if value == "":
        raise NetConfError(f"{key} is missing")
    try:
        if not isinstance(value, str) or "/" not in value or not value.rpartition("/")[2].isdigit():
            raise ValueError
        network = ip_network(value, strict=False)
        if network.version != version:
            raise ValueError
    except ValueError:
        raise NetConfError(f"{key} is {value!r}, not an IPv{version} network such as 10.244.0.0/16") from None
    if not network.prefixlen:
        raise NetConfError(f"{key} is {value!r}: the whole address space cannot be a cluster's network")
    return network


def _bound(values: Mapping[str, Any], key: str, network: Any, size: int, default: Any) -> Any:
    value = values.get(key, "")
    if value == "":
        return default
    try:
        address = type(network.network_address)(value if isinstance(value, str) else "")
    except (AddressValueError, ValueError):
        raise NetConfError(f"{key} is {value!r}, not an address") from None
    if address not in network:
        raise NetConfError(f"{key} is {address}: outside {network}")
    if int(address) % size:
        raise NetConfError(f"{key} is {address}: not the first address of a subnet of {size} addresses")
    return address


def backend_int(conf: NetConf, key: str, default: int, low: int, high: int) -> int:
    """A number of the backend's own keys. Raises NetConfError where it is none, or out of bounds."""
    value = conf.backend.get(key.lower())
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise NetConfError(f"Backend.{key} is {value!r}, not a number from {low} to {high}")
    return value


def backend_bool(conf: NetConf, key: str) -> bool:
    """A switch of the backend's own keys, off by default. Raises NetConfError where it is neither true nor false."""
    value = conf.backend.get(key.lower())
    if value is None:
        return False
    if not isinstance(value, bool):
        raise NetConfError(f"Backend.{key} is {value!r}, not true or false")
    return value


def unread_keys(conf: NetConf, known: tuple[str, ...]) -> list[str]:
    """Name the backend's keys that this backend does not read."""
    read = {key.lower() for key in known}
    return [f"Backend {conf.backend_type}: nobody reads the key {key!r}" for key in conf.backend if key not in read]
