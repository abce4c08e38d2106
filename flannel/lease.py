"""A lease: which subnet of the Network belongs to which node, and how its backend is reached."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, NamedTuple

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


class Subnet(IPv4Network):
    """A network that works out its hash once: each lease is looked up some twenty times on its way to the kernel."""

    def __init__(self, address: tuple[IPv4Address, int]) -> None:
        super().__init__(address)
        self._hash = super().__hash__()

    def __hash__(self) -> int:
        return self._hash


class LeaseAttrs(NamedTuple):
    """What a node publishes with its subnet. `backend_type` is empty for udp and alloc, as upstream's is.

    With IPv6 alone, address and data are IPv6's, and the fields with a 6 are empty.
    """

    public_ip: Address
    backend_type: str = ""
    backend_data: Any = None  # decoded JSON; for vxlan {"VNI": 1, "VtepMAC": "aa:…"}
    public_ip6: IPv6Address | None = None
    backend_data6: Any = None  # the same for what carries IPv6


class Lease(NamedTuple):
    """One node's lease. `expiration` is Unix time in seconds, 0.0 for a reservation (no expiry).

    `subnet6` is there in dual stack only: with IPv6 alone `subnet` is of IPv6.
    """

    subnet: Network
    attrs: LeaseAttrs
    expiration: float = 0.0
    subnet6: IPv6Network | None = None
