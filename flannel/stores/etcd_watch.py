"""Following everybody's leases in etcd: one list, then a watch from the revision after it, for as long as it takes."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network
from typing import Literal, NamedTuple, Protocol

from flannel.lease import Lease, LeaseAttrs
from flannel.stores.base import Event, Log, Post, Snapshot, StoreDown, StoreError
from flannel.stores.etcd_client import EtcdClient, KeyValue, Watch, key_value
from flannel.stores.etcd_messages import Values
from flannel.stores.leasecodec import overlap, parse_key, parse_value, quoted, why_unusable
from flannel.stores.table import LeaseTable

FIRST_BACK_OFF, LONGEST_BACK_OFF = 0.1, 5.0  # seconds
_WARNINGS_KEPT = 1000


class OwnLease(NamedTuple):
    """The own lease; `generation` tells one acquired lease from the next, even at the same key."""

    key: bytes
    lease: Lease
    generation: int


class Owner(Protocol):
    """Who holds the own lease."""

    @property
    def network(self) -> IPv4Network | None:
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

    def own_key_gone(self, generation: int, reason: str) -> None:
        """The own key is not there any more."""


class LeaseWatcher:
    """Posts a Snapshot, then Events; after an outage, a compaction or a reset of the store, a Snapshot again."""

    def __init__(self, client: EtcdClient, subnets: bytes, log: Log, owner: Owner, post: Post) -> None:
        self._client, self._subnets, self._log, self._owner, self._post = client, subnets, log, owner, post
        self._table: LeaseTable[bytes] = LeaseTable()
        self._header: Values | None = None  # of the last answer; None: list before watching
        self._next = 0  # first revision not seen yet
        self._down = False
        self._warned: set[tuple[bytes, str]] = set()
        self._lock = threading.Lock()
        self._stream: Watch | None = None
        self._relist = False
        self._closed = threading.Event()
        self._back_off = FIRST_BACK_OFF

    def close(self) -> None:
        """Have `run` return."""
        self._closed.set()
        self._end_stream()

    def relist(self) -> None:
        """Have the leases listed and judged again: the own lease is another one now."""
        with self._lock:
            self._relist = True
        self._end_stream()

    def _end_stream(self) -> None:
        with self._lock:
            stream = self._stream
        if stream is not None:
            stream.close()

    def run(self) -> None:
        """List and watch until closed; whatever goes wrong is posted, and tried again."""
        while not self._closed.is_set():
            try:
                if self._list_wanted():
                    self._list()
                self._follow()
                continue
            except StoreError as error:
                reason = str(error)
            except Exception as error:  # noqa: BLE001 - a thread that died would leave the daemon blind, without a word
                reason = f"unexpected {error!r}"
                self._header = None
            if self._closed.is_set() or self._relist:
                continue
            if not self._down:
                self._down = True
                self._post(StoreDown(reason))
            self._closed.wait(self._back_off)
            self._back_off = min(self._back_off * 2, LONGEST_BACK_OFF)

    def _list_wanted(self) -> bool:
        with self._lock:
            wanted, self._relist = self._relist or self._header is None, False
        return wanted

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
        self._post_snapshot(own)

    def _check_own(self, before: OwnLease | None, keys: Iterable[KeyValue]) -> OwnLease | None:
        """Compare the own lease with the list; return it if it holds."""
        if before is None:
            return None
        mine = next((key for key in keys if key.key == before.key), None)
        if mine is None:
            self._owner.own_key_gone(before.generation, "etcd does not have its key any more")
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

    def _post_snapshot(self, own: OwnLease | None) -> None:
        leases = self._table.leases()
        if own is not None:
            leases.append(own.lease)
        self._post(Snapshot(tuple(leases)))

    def _recovered(self) -> None:
        self._back_off = FIRST_BACK_OFF
        if self._down:
            self._down = False
            self._log("info", "etcd is back")

    # -- the watch -------------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Watch until the stream ends. Returns to have the leases listed, raises StoreError when etcd is away."""
        stream = self._client.watch(self._subnets, self._next)
        with self._lock:
            self._stream = stream
            if self._relist or self._closed.is_set():
                stream.close()
        try:
            for answer in stream:
                if not self._take(answer):
                    return
        finally:
            with self._lock:
                self._stream = None
            stream.release()

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
            self._post_snapshot(self._owner.own_lease())
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
        events: list[Event] = []
        if kind == "DELETE":
            events = self._table.remove(key.key)
        elif (lease := self._judge(key)) is not None:
            events = self._table.put(key.key, key.create_revision, lease)
            self._name_shadowed((key,))
        for event in events:
            self._post(event)

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
        why = why_unusable(lease, network, self._owner.network6)
        own = self._owner.own_lease()
        if not why and own is not None and overlap(subnet, own.lease.subnet):
            why = f"its subnet {subnet} overlaps this node's {own.lease.subnet}"
        own6 = own.lease.subnet6 if own is not None else None
        if not why and own6 is not None and subnet6 is not None and own6.overlaps(subnet6):
            why = f"its subnet {subnet6} overlaps this node's {own6}"
        if not why and ours is not None and lease.attrs.public_ip == ours.public_ip:
            why = f"its PublicIP {ours.public_ip} is this node's own"
        if why:
            self._warn(key.key, why)
            return None
        return lease

    def _warn(self, key: bytes, why: str) -> None:
        if (key, why) in self._warned:
            return
        if len(self._warned) >= _WARNINGS_KEPT:
            self._warned.clear()
        self._warned.add((key, why))
        name = quoted(key[len(self._subnets) :].decode("utf-8", "replace"))
        self._log("warning", f"Ignoring the lease {name}: {why}")
