"""What two nodes cannot both have: the address that a subnet begins with, and the MAC address of a tunnel."""

from __future__ import annotations

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
