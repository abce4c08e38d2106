"""Which subnets of the Network are free."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from flannel.netconf import NetConf

#: Upstream picks among so many; nodes that start together then seldom want the same one.
CANDIDATES = 100


class Pool(NamedTuple):
    """The subnets of one IP version that nodes get."""

    network: IPv4Network | IPv6Network
    length: int
    low: IPv4Address | IPv6Address
    high: IPv4Address | IPv6Address


def pool6(conf: NetConf) -> Pool | None:
    """Those of IPv6, None without it."""
    network, low, high = conf.ipv6_network, conf.ipv6_subnet_min, conf.ipv6_subnet_max
    if network is None or low is None or high is None:
        return None
    return Pool(network, conf.ipv6_subnet_len, low, high)


def _pool(conf: NetConf) -> Pool:
    return Pool(conf.network, conf.subnet_len, conf.subnet_min, conf.subnet_max)


def fits(conf: NetConf, subnet: IPv4Network, subnet6: IPv6Network | None = None) -> bool:
    """Return whether a node may hold `subnet` and `subnet6` under this configuration."""
    second = pool6(conf)
    if second is None or subnet6 is None:
        return second is None and subnet6 is None and _fits(_pool(conf), subnet)
    return _fits(_pool(conf), subnet) and _fits(second, subnet6)


def _fits(pool: Pool, subnet: IPv4Network | IPv6Network) -> bool:
    base = int(subnet.network_address)
    return subnet.prefixlen == pool.length and int(pool.low) <= base <= int(pool.high)


def fits6(conf: NetConf, subnet: IPv6Network) -> bool:
    """Return whether a node may hold an IPv6 subnet."""
    pool = pool6(conf)
    return pool is not None and _fits(pool, subnet)


def free_subnets(conf: NetConf, taken: Iterable[IPv4Network], limit: int = CANDIDATES) -> list[IPv4Network]:
    """Return up to `limit` subnets from SubnetMin on that overlap none of `taken`, in order of address."""
    return [IPv4Network((base, conf.subnet_len)) for base in _free(_pool(conf), taken, limit)]


def free_subnets6(conf: NetConf, taken: Iterable[IPv6Network], limit: int = CANDIDATES) -> list[IPv6Network]:
    """The same of IPv6; none where it is not enabled."""
    pool = pool6(conf)
    return [] if pool is None else [IPv6Network((base, pool.length)) for base in _free(pool, taken, limit)]


def _free(pool: Pool, taken: Iterable[IPv4Network | IPv6Network], limit: int) -> list[int]:
    size = 1 << (pool.network.max_prefixlen - pool.length)
    last = int(pool.high)
    spans = sorted((int(subnet.network_address), int(subnet.broadcast_address)) for subnet in taken)
    free: list[int] = []
    base, index = int(pool.low), 0
    while base <= last and len(free) < limit:
        # Spans of keys may nest, so one that ended before `base` is passed over, wherever it stands.
        while index < len(spans) and spans[index][1] < base:
            index += 1
        if index < len(spans) and spans[index][0] < base + size:
            beyond = spans[index][1] + 1
            base += -(-(beyond - base) // size) * size
        else:
            free.append(base)
            base += size
    return free
