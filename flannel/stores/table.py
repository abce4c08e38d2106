"""Peers' leases as a store has them, one a subnet."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Generic, NamedTuple, TypeVar

from flannel.lease import Lease, Network
from flannel.stores.base import Event

Key = TypeVar("Key", bound=Hashable)


class _Held(NamedTuple):
    since: Any  # what sorts by who came first: a create revision, a creation time
    lease: Lease


class LeaseTable(Generic[Key]):
    """Peers' leases by key. Of several keys with one subnet the oldest counts; the next one takes its place.

    A key may change its subnet only by way of `remove`.
    """

    def __init__(self) -> None:
        self._held: dict[Key, _Held] = {}
        self._keys: dict[Network, list[Key]] = {}

    def get(self, key: Key) -> Lease | None:
        """Return the lease at a key."""
        held = self._held.get(key)
        return held.lease if held else None

    def put(self, key: Key, since: Any, lease: Lease) -> list[Event]:
        """Take in a lease; return what changed for the daemon: nothing if its data is the same (a renewal)."""
        before = self._winner_lease(lease.subnet)
        self._held[key] = _Held(since, lease)
        keys = self._keys.setdefault(lease.subnet, [])
        if key not in keys:
            keys.append(key)
        return _difference(before, self._winner_lease(lease.subnet))

    def remove(self, key: Key) -> list[Event]:
        """Drop a key."""
        held = self._held.get(key)
        if held is None:
            return []
        subnet = held.lease.subnet
        before = self._winner_lease(subnet)
        del self._held[key]
        self._keys[subnet].remove(key)
        if not self._keys[subnet]:
            del self._keys[subnet]
        return _difference(before, self._winner_lease(subnet))

    def leases(self) -> list[Lease]:
        """Return one lease a subnet, the oldest first: it has a right to what two of them contest."""
        winners = [held for subnet in self._keys if (held := self._winner(subnet)) is not None]
        return [held.lease for held in sorted(winners, key=lambda held: held.since)]

    def shadowed(self, lease: Lease) -> bool:
        """Return whether another key holds this lease's subnet already."""
        return self._winner_lease(lease.subnet) is not lease

    def shadowed_leases(self) -> list[tuple[Key, Lease]]:
        """Return the leases that do not count, with their keys."""
        doubles = [key for keys in self._keys.values() if len(keys) > 1 for key in keys]
        return [(key, self._held[key].lease) for key in doubles if self.shadowed(self._held[key].lease)]

    def _winner_lease(self, subnet: Network) -> Lease | None:
        held = self._winner(subnet)
        return held.lease if held else None

    def _winner(self, subnet: Network) -> _Held | None:
        keys = self._keys.get(subnet)
        if not keys:
            return None
        if len(keys) == 1:  # as it nearly always is
            return self._held[keys[0]]
        return min((self._held[key] for key in keys), key=lambda held: held.since)


def _difference(before: Lease | None, after: Lease | None) -> list[Event]:
    if after is None:
        return [] if before is None else [Event("removed", before)]
    same = before is not None and (before.attrs, before.subnet6) == (after.attrs, after.subnet6)
    return [] if same else [Event("added", after)]
