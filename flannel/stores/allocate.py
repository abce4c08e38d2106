"""Which subnets of the Network are free."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flannel.netconf import NetConf

#: Upstream picks among so many; nodes that start together then seldom want the same one.
CANDIDATES = 100


def fits(conf: NetConf, subnet: IPv4Network) -> bool:
    """Return whether a node may hold `subnet` under this configuration."""
    return (
        subnet.prefixlen == conf.subnet_len
        and subnet.subnet_of(conf.network)
        and conf.subnet_min <= subnet.network_address <= conf.subnet_max
    )


def free_subnets(conf: NetConf, taken: Iterable[IPv4Network], limit: int = CANDIDATES) -> list[IPv4Network]:
    """Return up to `limit` subnets from SubnetMin on that overlap none of `taken`, in order of address."""
    size = 1 << (32 - conf.subnet_len)
    last = int(conf.subnet_max)
    spans = sorted((int(subnet.network_address), int(subnet.broadcast_address)) for subnet in taken)
    free: list[IPv4Network] = []
    base, index = int(conf.subnet_min), 0
    while base <= last and len(free) < limit:
        # Spans of keys may nest, so one that ended before `base` is passed over, wherever it stands.
        while index < len(spans) and spans[index][1] < base:
            index += 1
        if index < len(spans) and spans[index][0] < base + size:
            beyond = spans[index][1] + 1
            base += -(-(beyond - base) // size) * size
        else:
            free.append(IPv4Network((IPv4Address(base), conf.subnet_len)))
            base += size
    return free
