"""What two nodes cannot both have: the addresses of a subnet, and the MAC address of a tunnel."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Collection
from typing import TypeAlias

from flannel.backends.base import Wants
from flannel.lease import Network

#: IP version and address, or a MAC address.
Key: TypeAlias = "tuple[int, int] | bytes"


def keys_of(subnet: Network, wanted: Wants) -> set[Key]:
    """What a lease has once what it wants is in the kernel."""
    keys: set[Key] = {(subnet.version, int(subnet.network_address))}
    keys.update((route.version, route.dst) for route in wanted.routes)
    keys.update(entry.mac for entry in wanted.fdb)
    return keys


class Holders:
    """Which lease has each key, and which ones wait for it. A node with two subnets has its MAC address by both."""

    def __init__(self) -> None:
        self._first: dict[Key, Network] = {}
        self._shared: dict[Key, set[Network]] = {}  # all that have a key, where that is more than one
        self._waiting: dict[Key, set[Network]] = {}

    def of(self, key: Key) -> Network | None:
        """The lease that has a key."""
        return self._first.get(key)

    def alone(self, key: Key, subnet: Network) -> bool:
        """Whether this lease has it, and no other."""
        return self._first.get(key) == subnet and key not in self._shared

    def take(self, key: Key, subnet: Network) -> None:
        """Note that a lease has a key."""
        first = self._first.setdefault(key, subnet)
        if first != subnet:
            self._shared.setdefault(key, {first}).add(subnet)

    def give_back(self, key: Key, subnet: Network) -> set[Network]:
        """Note that a lease does not have it any more; return who may have it now."""
        left = self._shared.pop(key, set()) - {subnet}
        if not left:
            self._first.pop(key, None)
            return self._waiting.pop(key, set())
        self._first[key] = min(left, key=str)
        if len(left) > 1:
            self._shared[key] = left
        return set()

    def wait_for(self, key: Key, subnet: Network) -> None:
        """Note that a lease would have it, were it not another's."""
        self._waiting.setdefault(key, set()).add(subnet)

    def contested(self) -> Collection[Network]:
        """Those that have what others wait for."""
        return {self._first[key] for key in self._waiting if key in self._first}

    def clear(self) -> None:
        """Forget all of it."""
        for one in (self._first, self._shared, self._waiting):
            one.clear()


def span(subnet: Network) -> tuple[int, int]:
    """The first and the last address of a subnet, in numbers: there may be thousands of leases."""
    first = int(subnet.network_address)
    return first, first | (1 << (subnet.max_prefixlen - subnet.prefixlen)) - 1


class Ground:
    """Which lease has which addresses, of either IP version, and which leases wait for some of them.

    What leases have does not overlap, so what is in the way of another subnet is found by its place among the first
    addresses. A lease is named by its `subnet`.
    """

    def __init__(self) -> None:
        self._firsts: dict[int, list[int]] = {4: [], 6: []}  # in order
        self._at: dict[int, dict[int, tuple[int, Network]]] = {4: {}, 6: {}}  # first address: last one, and the lease
        self._had: dict[Network, tuple[Network, ...]] = {}
        self._waiting: dict[Network, set[Network]] = {}

    def in_the_way(self, one: Network, lease: Network) -> list[Network]:
        """The other leases that have some of a subnet's addresses."""
        first, last = span(one)
        firsts, at = self._firsts[one.version], self._at[one.version]
        found = []
        for position in range(bisect_right(firsts, last) - 1, -1, -1):
            end, holder = at[firsts[position]]
            if end < first:
                break
            if holder != lease:
                found.append(holder)
        return found

    def take(self, lease: Network, subnets: tuple[Network, ...]) -> set[Network]:
        """Note that a lease has these subnets, where nothing is in the way, and no others; return who may have what
        it had."""
        before = self._had.get(lease)
        if before == subnets:
            return set()
        freed = self.give_back(lease) if before else set()
        self._had[lease] = subnets
        for one in subnets:
            first, last = span(one)
            insort(self._firsts[one.version], first)
            self._at[one.version][first] = last, lease
        return freed

    def give_back(self, lease: Network) -> set[Network]:
        """Note that a lease has nothing any more; return who may have it now."""
        for one in self._had.pop(lease, ()):
            first = int(one.network_address)
            firsts = self._firsts[one.version]
            del firsts[bisect_left(firsts, first)]
            del self._at[one.version][first]
        return self._waiting.pop(lease, set())

    def wait_for(self, holders: Collection[Network], lease: Network) -> None:
        """Note that a lease would have what these have."""
        for holder in holders:
            self._waiting.setdefault(holder, set()).add(lease)

    def contested(self) -> Collection[Network]:
        """Those that have what others wait for."""
        return self._waiting.keys() & self._had.keys()

    def clear(self) -> None:
        """Forget all of it."""
        self._had.clear()
        self._waiting.clear()
        for version in self._firsts:
            self._firsts[version].clear()
            self._at[version].clear()
