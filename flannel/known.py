"""The peers' leases as far as they are known, and when that is enough to remove what a lease had.

Removal needs evidence: a removal event, or a complete list. A list without any peer where peers were known, or one
after our own key was lost, is taken for a store that lost its content: it removes nothing for a grace period.
"""

from __future__ import annotations

from collections.abc import Callable

from flannel import log
from flannel.lease import Lease, Network
from flannel.stores.base import Event, Snapshot


class KnownLeases:
    """Leases of other nodes by subnet, and which of them changed (`dirty`).

    `leftovers` says whether an earlier run left peers in the kernel; `grace` is in seconds on `clock`.
    """

    def __init__(self, own: Network, grace: float, clock: Callable[[], float], leftovers: Callable[[], bool]) -> None:
        self._own = own
        self._grace = grace
        self._clock = clock
        self._leftovers = leftovers
        self.leases: dict[Network, Lease] = {}
        self.dirty: set[Network] = set()
        self._listed = False
        self._grace_until: float | None = None
        self._absent: set[Network] = set()
        self._own_key_lost = False

    @property
    def may_remove(self) -> bool:
        """Whether what no known lease wants may go: there was a complete list, and no reason to doubt it."""
        return self._listed and self._grace_until is None

    @property
    def grace_until(self) -> float | None:
        """When the grace period ends; None where there is none."""
        return self._grace_until

    def take(self, message: Event | Snapshot) -> None:
        """Learn from the store."""
        if isinstance(message, Snapshot):
            self._take_list(message)
        elif message.lease.subnet != self._own:
            if message.kind == "added":
                self._learn(message.lease)
            else:
                self._forget(message.lease.subnet)

    def lost_own_key(self) -> None:
        """Our own key vanished from the store: it may have lost the others' keys too."""
        self._own_key_lost = True

    def end_grace(self, now: float) -> bool:
        """Forget who did not come back, if the grace period is over; whether it was."""
        if self._grace_until is None or now < self._grace_until:
            return False
        if self._absent:
            log.error(f"{len(self._absent)} nodes did not come back within {self._grace:.0f} s; removing what they had")
        else:
            log.info("every node that was known came back; removing what none of them wants")
        self._grace_until = None
        for subnet in tuple(self._absent):
            self._forget(subnet)
        return True

    def _take_list(self, snapshot: Snapshot) -> None:
        peers = {lease.subnet: lease for lease in snapshot.leases if lease.subnet != self._own}
        own_listed = len(peers) < len(snapshot.leases)
        absent = self.leases.keys() - peers.keys()
        if snapshot.complete:
            self._weigh(len(peers), len(absent), own_listed)
        else:
            log.warning(f"the store's list is incomplete: {len(peers)} leases taken from it, none removed for it")
        for lease in peers.values():
            self._learn(lease)
        if not snapshot.complete:
            return
        if self._grace_until is not None:
            self._absent = set(absent)
        else:
            for subnet in absent:
                self._forget(subnet)

    def _weigh(self, peers: int, absent: int, own_listed: bool) -> None:
        """Start a grace period where a complete list looks like a store that lost its content."""
        all_gone = not peers and (absent > 0 or self._leftovers())
        suspect = all_gone or (absent > 0 and (self._own_key_lost or not own_listed))
        self._own_key_lost = False
        self._listed = True
        if suspect and self._grace_until is None:
            self._grace_until = self._clock() + self._grace
            log.error(
                f"the store's list holds {peers} other nodes, where {max(absent, 1)} more were known: "
                f"taken for a store that lost its content. Nothing is removed for {self._grace:.0f} s, "
                "but what the store tells by name"
            )

    def _learn(self, lease: Lease) -> None:
        self._absent.discard(lease.subnet)
        known = self.leases.get(lease.subnet)
        self.leases[lease.subnet] = lease
        if known is None or (known.attrs, known.subnet6) != (lease.attrs, lease.subnet6):
            self.dirty.add(lease.subnet)

    def _forget(self, subnet: Network) -> None:
        self._absent.discard(subnet)
        if self.leases.pop(subnet, None) is not None:
            self.dirty.add(subnet)
