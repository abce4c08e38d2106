"""Where leases live: the protocol that every store speaks, and the messages that it posts.

A store runs its own threads and tells the daemon what it learns through one thread-safe callable. It never decides what
becomes of kernel state: it says what it knows, and how sure it is.
"""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv6Network
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias

from flannel.lease import Address, Lease, LeaseAttrs, Network

if TYPE_CHECKING:
    from flannel.netconf import NetConf


class StoreError(Exception):
    """The store could not do what was asked; the text says what, where, and what to do about it."""


class Event(NamedTuple):
    """Another node's lease was added, changed ("added" again, as upstream has it) or removed.

    A removed lease carries the attributes that were last known. The own lease is never in an Event.
    """

    kind: Literal["added", "removed"]
    lease: Lease


class Snapshot(NamedTuple):
    """Every usable lease of the store, the own one included, as of one revision.

    `complete` is False where the list cannot be trusted to be whole: its leases are real, but a lease that is not in it
    may exist all the same. The own lease is in the list wherever the store has it, so that an empty list means that the
    store lost its content, and not that the last peer has gone.
    """

    leases: tuple[Lease, ...]
    complete: bool = True


class StoreDown(NamedTuple):
    """The store cannot be reached; posted once for each outage. Keep all state. A Snapshot follows when it is back."""

    reason: str


class LeaseLost(NamedTuple):
    """The own lease is gone: deleted, expired, or taken by another node. Call `acquire` to have one again."""

    reason: str


class Renewed(NamedTuple):
    """The own lease was renewed; `lease.expiration` is the new one."""

    lease: Lease


class Remembered(NamedTuple):
    """What a store has kept of this node from before: an address that an operator wants published in place of the
    interface's (`public_ip`, "" for none; `public_ip6` the same of IPv6), and what was published last."""

    public_ip: str = ""
    attrs: LeaseAttrs | None = None
    public_ip6: str = ""


Message: TypeAlias = Snapshot | Event | StoreDown | LeaseLost | Renewed
Post: TypeAlias = Callable[[Message], None]
#: `log(level, text)`, level one of "debug", "info", "warning", "error".
Log: TypeAlias = Callable[[str, str], None]


class Store(Protocol):
    """What the daemon may ask of a store. `name` is for the log."""

    @property
    def name(self) -> str:
        """What it is called."""

    def remembered(self) -> Remembered:
        """Return what the store has kept of this node. Raises StoreError."""

    def published_by(self, public: Address) -> LeaseAttrs | None:
        """Return what a node with this published address has in its lease, where `remembered` did not say it; None
        where there is none. Raises StoreError."""

    def network_config(self) -> str:
        """Return the network configuration's JSON text; raises StoreError (the caller asks again)."""

    def acquire(
        self, conf: NetConf, attrs: LeaseAttrs, previous: Network | None, previous6: IPv6Network | None = None
    ) -> Lease:  # fmt: skip
        """Get this node's lease: its old one, else `previous` if it is free, else a free subnet; in dual stack the same
        with `previous6`. Raises StoreError."""

    def watch(self, post: Post) -> None:
        """Start the threads that list, watch and renew, and return at once; never raises. Call `acquire` before."""

    def update(self, attrs: LeaseAttrs) -> None:
        """Publish new data with the own lease. While watching it is done in the background, and retried until it holds;
        before that it is done at once, and raises StoreError."""

    def close(self) -> None:
        """Stop the threads and close connections. The lease stays."""
