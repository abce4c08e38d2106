"""Following everybody's leases in etcd: one list, then a watch from the revision after it, for as long as it takes."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv6Network
from typing import Literal, NamedTuple, Protocol

from flannel.lease import Lease, LeaseAttrs, Network
from flannel.log import quoted
from flannel.stores.base import Log, Post, StoreError
from flannel.stores.etcd_client import EtcdClient, KeyValue, key_value
from flannel.stores.etcd_messages import Values
from flannel.stores.leasecodec import overlap, parse_key, parse_value, why_unusable
from flannel.stores.table import LeaseTable
from flannel.stores.watcher import Watcher, why_clashing

FIRST_BACK_OFF, LONGEST_BACK_OFF = 0.1, 5.0  # seconds


class OwnLease(NamedTuple):
    """The own lease; `generation` tells one acquired lease from the next, even at the same key."""

    key: bytes
    lease: Lease
    generation: int


class Owner(Protocol):
    """Who holds the own lease."""

    @property
    def network(self) -> Network | None:
        """The Network, once it is known."""

    @property
    def network6(self) -> IPv6Network | None:
        """The IPv6Network, where there is one."""

    def own_attrs(self) -> LeaseAttrs | None:
        """What this node publishes."""

    def own_lease(self) -> OwnLease | None:
        """The own lease, if there is one now."""

    def own_key_put(self, key: KeyValue, *, listed: bool) -> None:
        """The own key was written, or listed."""

    def own_key_deleted(self, key: bytes, revision: int) -> None:
        """The own key was deleted at a revision."""

    def lease_gone(self, generation: int, reason: str) -> None:
        """The own lease is not there any more."""


class LeaseWatcher(Watcher[bytes]):
    """The `Watcher` of etcd's keys below `subnets`."""

    def __init__(self, client: EtcdClient, subnets: bytes, log: Log, owner: Owner, post: Post) -> None:
        super().__init__("etcd", log, post, FIRST_BACK_OFF, LONGEST_BACK_OFF)
        self._client, self._subnets, self._owner = client, subnets, owner
        self._header: Values | None = None  # of the last answer; None: list before watching
        self._next = 0  # first revision not seen yet

    def _knows_its_place(self) -> bool:
        return self._header is not None

    def _forget_place(self) -> None:
        self._header = None

    def _own(self) -> Lease | None:
        own = self._owner.own_lease()
        return None if own is None else own.lease

    # -- the list --------------------------------------------------------------------------------------------------

    def _list(self) -> None:
        self._header = None
        before = self._owner.own_lease()  # what is acquired while we list may be missing from the list
        listing = self._client.list(self._subnets)
        own = self._check_own(before, listing.keys)
        table: LeaseTable[bytes] = LeaseTable()
        for key in listing.keys:
            if own is not None and key.key == own.key:
                continue
            lease = self._judge(key) or self._last_good(key.key, own)
            if lease is not None:
                table.put(key.key, key.create_revision, lease)
        self._table = table
        self._name_shadowed(listing.keys)
        self._header, self._next = listing.header, listing.header.get("revision", 0) + 1
        self._recovered()
        self._post_snapshot()

    def _check_own(self, before: OwnLease | None, keys: Iterable[KeyValue]) -> OwnLease | None:
        """Compare the own lease with the list; return it if it holds."""
        if before is None:
            return None
        mine = next((key for key in keys if key.key == before.key), None)
        if mine is None:
            self._owner.lease_gone(before.generation, "etcd does not have its key any more")
            return None
        self._owner.own_key_put(mine, listed=True)
        return self._owner.own_lease()

    def _last_good(self, key: bytes, own: OwnLease | None) -> Lease | None:
        """What was good and has become unreadable is still there: its last good data holds."""
        lease = self._table.get(key)
        return None if lease is None or (own is not None and overlap(lease.subnet, own.lease.subnet)) else lease

    def _name_shadowed(self, keys: Iterable[KeyValue]) -> None:
        for key in keys:
            lease = self._table.get(key.key)
            if lease is not None and self._table.shadowed(lease):
                self._warn(key.key, f"another, older key has subnet {lease.subnet}")

    def _recovered(self) -> None:
        super()._recovered()
        self._back_off = FIRST_BACK_OFF

    # -- the watch -------------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Watch until the stream ends. Returns to have the leases listed, raises StoreError when etcd is away."""
        stream = self._client.watch(self._subnets, self._next)
        with self._reading(stream):
            for answer in stream:
                if not self._take(answer):
                    return

    def _take(self, answer: Values) -> bool:
        """Take in one answer; return False if the leases must be listed anew."""
        header = answer.get("header", {})
        if answer.get("canceled"):
            if answer.get("compact_revision"):
                self._log("info", f"etcd was compacted up to revision {answer['compact_revision']}: listing again")
                self._header = None
                return False
            raise StoreError(f"etcd cancelled the watch: {answer.get('cancel_reason', 'it gave no reason')}")
        if answer.get("created"):
            return self._created(header)
        events = answer.get("events", ())
        for event in events:
            key = key_value(event.get("kv", {}))
            self._take_event("DELETE" if event.get("type") == "DELETE" else "PUT", key)
        # Only events say how far the watch has come; the header of a late batch is ahead of it.
        last = key_value(events[-1].get("kv", {})).mod_revision if events else header.get("revision", 0)
        self._header, self._next = header, max(self._next, last + 1)
        return True

    def _created(self, header: Values) -> bool:
        known = self._header or {}
        reset = (
            header.get("cluster_id") != known.get("cluster_id")
            or header.get("raft_term", 0) < known.get("raft_term", 0)
            or header.get("revision", 0) < self._next - 1
        )
        if reset:
            # An etcd that was set up anew or restored would let us wait for ever for a revision yet to come.
            self._log("warning", "etcd's history is another one than before: listing again")
            self._header = None
            return False
        if self._down:
            self._recovered()
            self._post_snapshot()
        self._back_off = FIRST_BACK_OFF
        return True

    def _take_event(self, kind: Literal["PUT", "DELETE"], key: KeyValue) -> None:
        own = self._owner.own_lease()
        if own is not None and key.key == own.key:
            if kind == "DELETE":
                self._owner.own_key_deleted(key.key, key.mod_revision)
            else:
                self._owner.own_key_put(key, listed=False)
            if kind == "DELETE" or self._owner.own_lease() is not None:
                return
            # It was taken: from now on it is a peer's.
        if kind == "DELETE":
            self._post_all(self._table.remove(key.key))
        elif (lease := self._judge(key)) is not None:
            events = self._table.put(key.key, key.create_revision, lease)
            self._name_shadowed((key,))
            self._post_all(events)

    # -- a stranger's word ------------------------------------------------------------------------------------------

    def _judge(self, key: KeyValue) -> Lease | None:
        """Return a peer's lease, or None, with a warning, if it cannot be used."""
        try:
            subnet, subnet6 = parse_key(key.key[len(self._subnets) :].decode())
        except ValueError as error:
            self._warn(key.key, f"it is no subnet's key: {error}")
            return None
        try:
            # etcd tells the time left of a lease one lease a call, and nobody needs a peer's.
            lease = Lease(subnet, parse_value(key.value), subnet6=subnet6)
        except ValueError as error:
            self._warn(key.key, str(error))
            return None
        network, ours = self._owner.network, self._owner.own_attrs()
        if network is None:
            self._warn(key.key, "the Network is not known yet")
            return None
        why = why_unusable(lease, network, self._owner.network6) or why_clashing(lease, self._own(), "subnet")
        if not why and ours is not None and lease.attrs.public_ip == ours.public_ip:
            why = f"its PublicIP {ours.public_ip} is this node's own"
        if why:
            self._warn(key.key, why)
            return None
        return lease

    def _shown(self, key: bytes) -> str:
        return f"lease {quoted(key[len(self._subnets) :].decode('utf-8', 'replace'))}"
