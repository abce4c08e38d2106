"""The own lease, between the daemon, the thread that follows the store, and the one that keeps the lease."""

from __future__ import annotations

import threading
from ipaddress import IPv6Network
from typing import Generic, Protocol, TypeVar

from flannel.lease import Lease, LeaseAttrs, Network
from flannel.stores.base import LeaseLost, Post


class Held(Protocol):
    """What a store knows of its own lease."""

    @property
    def lease(self) -> Lease:
        """The lease."""

    @property
    def generation(self) -> int:
        """Tells one acquired lease from the next."""


OwnT = TypeVar("OwnT", bound=Held)


class LeaseOwner(Generic[OwnT]):
    """Holds the own lease; `_changed` guards it, and is notified of what the keeping thread has to look at."""

    def __init__(self) -> None:
        self._network: Network | None = None
        self._network6: IPv6Network | None = None
        self._attrs: LeaseAttrs | None = None
        self._own: OwnT | None = None
        self._generation = 0
        self._changed = threading.Condition()
        self._post: Post | None = None

    @property
    def network(self) -> Network | None:
        """The Network that the lease was acquired in."""
        return self._network

    @property
    def network6(self) -> IPv6Network | None:
        """The IPv6Network that the lease was acquired in; None without IPv6."""
        return self._network6

    def lease_gone(self, generation: int, reason: str) -> None:
        """Forget the own lease, if it is still the one of that generation, and tell the daemon."""
        with self._changed:
            own = self._own
            if own is None or own.generation != generation:
                return
            self._own = None
        if self._post is not None:
            self._post(LeaseLost(f"lease {own.lease.subnet} is lost: {reason}"))
