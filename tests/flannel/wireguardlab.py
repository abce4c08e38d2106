"""What the tests of wireguard share: its configuration, keys, and leases."""

from __future__ import annotations

import base64
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from flannel.lease import Lease, LeaseAttrs

WIREGUARD = {"Type": "wireguard"}


def key_of(number: int) -> bytes:
    return bytes([number] * 32)


def text_of(key: bytes) -> str:
    return base64.b64encode(key).decode()


def lease_of(number: int, *, port: int = 51820, ip: str = "", ip6: str = "", port6: int = 51821) -> Lease:
    data6 = {"PublicKey": text_of(key_of(number)), "Port": port6} if ip6 else None
    attrs = LeaseAttrs(
        IPv4Address(ip or f"192.168.50.{number}"), "wireguard", {"PublicKey": text_of(key_of(number)), "Port": port},
        IPv6Address(ip6) if ip6 else None, data6,
    )  # fmt: skip
    subnet6 = IPv6Network(f"fd00:10:244:{number}::/64") if ip6 else None
    return Lease(IPv4Network(f"10.244.{number}.0/24"), attrs, subnet6=subnet6)
