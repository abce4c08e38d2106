"""A lease as etcd has it: its key, its value, and whether this node can use it."""

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from socket import AF_INET, inet_pton
from typing import Any

from flannel.lease import Lease, LeaseAttrs, Network, Subnet
from flannel.log import quoted

#: Every type that a flannel node may publish; udp and alloc publish none.
KNOWN_TYPES = frozenset(
    ("", "vxlan", "host-gw", "ipip", "udp", "wireguard", "ipsec", "alloc", "extension", "tencent-vpc")
)


def lease_key(subnet: Network, subnet6: IPv6Network | None = None) -> str:
    """Return a subnet's key below `subnets/`, or that of a pair of them."""
    more = f"&{subnet6.network_address}-{subnet6.prefixlen}" if subnet6 is not None else ""
    return f"{subnet.network_address}-{subnet.prefixlen}{more}"


def parse_key(text: str) -> tuple[IPv4Network, IPv6Network | None]:
    """Read a key below `subnets/`: `10.5.34.0-24`, with `&fd00:10:5:34::-64` in dual stack.

    Raises ValueError.
    """
    v4_text, ampersand, v6_text = text.partition("&")
    address, length = _split(v4_text, 31)
    v4 = Subnet((parse_address(address), length))
    if not ampersand:
        return v4, None
    address, length = _split(v6_text, 127)
    if address != address.lower() or "%" in address:
        raise ValueError("an IPv6 address in lower case was expected")
    return v4, IPv6Network((address, length))


def _split(text: str, longest: int) -> tuple[str, int]:
    address, dash, length = text.rpartition("-")
    if not dash or not length.isascii() or not length.isdigit() or len(length) > 3 or int(length) > longest:
        raise ValueError(f"ADDRESS-LENGTH was expected, with a length of {longest} at most")
    return address, int(length)


def parse_address(text: str) -> IPv4Address:
    """Read an IPv4 address, five times as fast as ipaddress does. Raises ValueError."""
    try:
        return IPv4Address(inet_pton(AF_INET, text))
    except OSError:
        raise ValueError(f"no IPv4 address: {text!r}") from None


def lease_value(attrs: LeaseAttrs) -> bytes:
    """Return what a node publishes, in upstream's order of fields."""
    public_ip6 = str(attrs.public_ip6) if attrs.public_ip6 is not None else None
    value: dict[str, Any] = {"PublicIP": str(attrs.public_ip), "PublicIPv6": public_ip6}
    if attrs.backend_type:
        value["BackendType"] = attrs.backend_type
    if attrs.backend_data is not None:
        value["BackendData"] = attrs.backend_data
    if attrs.backend_data6 is not None:
        value["BackendV6Data"] = attrs.backend_data6
    return json.dumps(value, separators=(",", ":")).encode()


def parse_value(data: bytes) -> LeaseAttrs:
    """Read what a node published. Raises ValueError that names the fault."""
    try:
        decoded = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error})") from error
    if not isinstance(decoded, dict):
        raise ValueError("it is not a JSON object")
    fields = {name.lower(): value for name, value in decoded.items()}  # upstream reads keys so, too
    public_ip, backend_type = fields.get("publicip"), fields.get("backendtype") or ""
    if not isinstance(public_ip, str):
        raise ValueError("it has no PublicIP")
    if not isinstance(backend_type, str):
        raise ValueError("its BackendType is not a string")
    public_ip6, data6 = _parse_address6(fields.get("publicipv6")), fields.get("backendv6data")
    try:
        return LeaseAttrs(parse_address(public_ip), backend_type, fields.get("backenddata"), public_ip6, data6)
    except ValueError as error:
        raise ValueError(f"its PublicIP is no IPv4 address: {quoted(public_ip)}") from error


def _parse_address6(value: Any) -> IPv6Address | None:
    if value is None or value == "":
        return None
    try:
        return IPv6Address(value if isinstance(value, str) and "%" not in value else "")
    except ValueError as error:
        raise ValueError(f"its PublicIPv6 is no IPv6 address: {quoted(value)}") from error


def why_unusable(lease: Lease, network: Network, network6: IPv6Network | None = None) -> str:
    """Return why a peer's lease cannot be used within `network` (and `network6` in dual stack), "" if it can.

    A value in etcd is a stranger's word: one bad lease must cost that lease only.
    """
    if isinstance(network, IPv6Network):
        return _why_unusable_alone(lease, network)
    # In numbers, because the properties of ipaddress take ten times as long, and there may be thousands of leases.
    attrs, subnet, mask, base = lease.attrs, lease.subnet, int(network.netmask), int(network.network_address)
    if subnet.prefixlen <= network.prefixlen or int(subnet.network_address) & mask != base:
        return f"its subnet {subnet} is not a part of the Network {network}"
    ip = int(attrs.public_ip)
    first = ip >> 24
    if ip in (0, 0xFFFFFFFF) or first == 127 or 224 <= first <= 239:
        return f"its PublicIP {attrs.public_ip} is no node's address"
    if ip & mask == base:
        return f"its PublicIP {attrs.public_ip} lies inside the Network {network}, and would be reached through itself"
    if attrs.backend_type not in KNOWN_TYPES:
        return f"its BackendType {quoted(attrs.backend_type)} is unknown"
    why = _why_bad_vxlan(attrs.backend_data) if attrs.backend_type == "vxlan" else ""
    return why or (_why_unusable6(lease, network6) if network6 is not None else "")


def _why_unusable_alone(lease: Lease, network: IPv6Network) -> str:
    """The same with IPv6 alone."""
    attrs = lease.attrs
    if attrs.backend_type not in KNOWN_TYPES:
        return f"its BackendType {quoted(attrs.backend_type)} is unknown"
    if not isinstance(lease.subnet, IPv6Network) or not isinstance(attrs.public_ip, IPv6Address):
        return "it is not of IPv6"
    return _why_bad6(lease.subnet, attrs.public_ip, attrs.backend_type, attrs.backend_data, network)


def _why_unusable6(lease: Lease, network: IPv6Network) -> str:
    attrs, subnet = lease.attrs, lease.subnet6
    if subnet is None or attrs.public_ip6 is None:
        return ""  # a node without IPv6: what it has is used
    return _why_bad6(subnet, attrs.public_ip6, attrs.backend_type, attrs.backend_data6, network)


def _why_bad6(subnet: IPv6Network, ip: IPv6Address, kind: str, data: Any, network: IPv6Network) -> str:
    if subnet.prefixlen <= network.prefixlen or not subnet.subnet_of(network):
        return f"its subnet {subnet} is not a part of the IPv6Network {network}"
    if ip.is_unspecified or ip.is_loopback or ip.is_multicast:
        return f"its PublicIPv6 {ip} is no node's address"
    if ip in network:
        return f"its PublicIPv6 {ip} lies inside the IPv6Network {network}, and would be reached through itself"
    return _why_bad_vxlan(data) if kind == "vxlan" else ""


def _why_bad_vxlan(data: Any) -> str:
    if not isinstance(data, dict):
        return "its BackendData is not a JSON object"
    # A fault of the VNI is the backend's to judge; a bad MAC would poison neighbours and FDB.
    mac = {name.lower(): value for name, value in data.items()}.get("vtepmac")
    if not isinstance(mac, str) or not is_unicast_mac(mac):
        return f"its VtepMAC {quoted(mac)} is no unicast MAC"
    return ""


def overlap(one: Network, other: Network) -> bool:
    """Return whether two subnets of one IP version share addresses."""
    host_bits = one.max_prefixlen - min(one.prefixlen, other.prefixlen)
    return int(one.network_address) >> host_bits == int(other.network_address) >> host_bits


def is_unicast_mac(text: str) -> bool:
    """Return whether `text` is a MAC (six pairs of hex digits with colons) that one station can have."""
    if len(text) != 17 or text[2::3] != ":::::":
        return False
    try:
        octets = bytes.fromhex(text.replace(":", ""))
    except ValueError:
        return False
    return len(octets) == 6 and any(octets) and not octets[0] & 1
