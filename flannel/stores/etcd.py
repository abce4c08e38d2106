"""Leases in etcd v3: getting one, keeping it, and telling the daemon about everybody's.

Two threads: one lists and watches, one renews and publishes. What upstream leaves behind is kept as it is (keys,
values, 24 hours, renewal by a new etcd lease); docs/deviations.md lists where this store does better.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network
from typing import TYPE_CHECKING

from flannel.lease import Address, Lease, LeaseAttrs, Network
from flannel.log import quoted
from flannel.stores.allocate import fits
from flannel.stores.base import Log, Post, Remembered, Renewed, StoreError
from flannel.stores.etcd_client import EtcdClient, KeyValue, TlsFiles
from flannel.stores.etcd_own import Entry, Own, Proof, choose_subnets, own_entries
from flannel.stores.etcd_watch import LeaseWatcher, OwnLease
from flannel.stores.leasecodec import lease_key, lease_value, parse_key, parse_value
from flannel.stores.owner import LeaseOwner

if TYPE_CHECKING:
    from flannel.netconf import NetConf

DAY = 86400
_ACQUIRE_TRIES = 100
_RETRY_RENEWAL = 60.0  # seconds


class _LostRaceError(Exception):
    """Somebody was faster; look again."""


class EtcdStore(LeaseOwner[Own]):
    """A `Store` (see base.py) in etcd v3.

    `renew_margin` and `ttl` are seconds: a lease is renewed so long before it ends. Raises StoreError for an endpoint
    or a TLS file that cannot be used; connects to nothing yet. `proof_file` is where it keeps by what it knows its own
    lease again after its address has changed; without it a tunnel's MAC address or public key must do.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        prefix: str,
        log: Log,
        *,
        keyfile: str = "",
        certfile: str = "",
        cafile: str = "",
        username: str = "",
        password: str = "",
        renew_margin: float = 3600.0,
        ttl: int = DAY,
        proof_file: str = "",
    ) -> None:
        super().__init__()
        tls = TlsFiles(keyfile, certfile, cafile)
        self._client = EtcdClient(endpoints, log, tls=tls, username=username, password=password)
        self._config_key = f"{prefix.rstrip('/')}/config"
        self._subnets = f"{prefix.rstrip('/')}/subnets/".encode()
        self._log, self._margin, self._ttl = log, renew_margin, ttl
        self._proof = Proof(proof_file)
        self._closed = False
        self._watcher: LeaseWatcher | None = None

    @property
    def name(self) -> str:
        """What it is called."""
        return "etcd"

    def remembered(self) -> Remembered:
        """Nothing: of a node etcd has its lease alone, which `acquire` finds."""
        return Remembered()

    def published_by(self, public: Address) -> LeaseAttrs | None:
        """The oldest lease with that PublicIP: the one that `acquire` would find."""
        found = [entry for entry in self._entries() if entry.attrs is not None and entry.attrs.public_ip == public]
        return min(found, key=lambda entry: entry.key.create_revision).attrs if found else None

    def network_config(self) -> str:
        """Return the JSON text at `<prefix>/config`."""
        text = self._client.get(self._config_key.encode())
        if text is None:
            raise StoreError(f"etcd has no key {self._config_key}: write the network configuration there")
        return text.decode("utf-8", "replace")

    # -- getting a lease -------------------------------------------------------------------------------------------

    def acquire(
        self, conf: NetConf, attrs: LeaseAttrs, previous: Network | None, previous6: IPv6Network | None = None
    ) -> Lease:  # fmt: skip
        """Reuse this node's lease, else take `previous` if it is free, else one of the first free subnets."""
        if not isinstance(conf.network, IPv4Network) or isinstance(previous, IPv6Network):
            raise StoreError("the keys of leases in etcd begin with an IPv4 subnet: IPv6 alone needs --kube-subnet-mgr")
        with self._changed:
            self._own, self._network, self._attrs = None, conf.network, attrs
            self._network6 = conf.ipv6_network
        for _ in range(_ACQUIRE_TRIES):
            try:
                entries = self._entries()
                own = self._reuse(conf, attrs, previous, entries) or self._create(
                    conf, attrs, previous, previous6, entries
                )  # fmt: skip
            except _LostRaceError as race:
                self._log("info", f"{race}; looking again")
                continue
            with self._changed:
                self._generation += 1
                own.generation = self._generation
                self._own = own
                self._changed.notify_all()
            self._keep_proof(own.etcd_lease)
            if self._watcher is not None:
                self._watcher.relist()
            return own.lease
        raise StoreError(f"lost the race for a subnet {_ACQUIRE_TRIES} times")

    def _entries(self) -> list[Entry]:
        entries = []
        for key in self._client.list(self._subnets).keys:
            name = key.key[len(self._subnets) :].decode("utf-8", "replace")
            try:
                subnet, v6 = parse_key(name)
            except ValueError:
                continue  # the watcher names it
            try:
                attrs = parse_value(key.value)
            except ValueError:
                attrs = None  # the subnet is taken all the same
            entries.append(Entry(key, subnet, v6, attrs))
        return entries

    def _reuse(
        self, conf: NetConf, attrs: LeaseAttrs, previous: IPv4Network | None, entries: list[Entry]
    ) -> Own | None:
        ours = own_entries(entries, attrs, previous, self._proof.read())
        fitting = [entry for entry in ours if fits(conf, entry.subnet, entry.subnet6)]
        for entry in ours:
            if entry not in fitting:
                self._give_up(entry, entries)
        if not fitting:
            return None
        entry, *others = fitting
        if others:  # they lapse by themselves
            shown = ", ".join(str(other.subnet) for other in others)
            self._log("warning", f"etcd has several leases of {attrs.public_ip}: using {entry.subnet}, not {shown}")
        # A key without an etcd lease is a reservation, which an operator made for this node: it stays one.
        etcd_lease, ttl = self._client.grant(self._ttl) if entry.key.lease else (0, 0)
        expected = {"mod_revision": entry.key.mod_revision}
        put = self._client.put_if(expected, entry.key.key, lease_value(attrs), etcd_lease)
        if not put.done and not _is_ours(put.found, etcd_lease):
            raise _LostRaceError(f"the lease of {entry.subnet} changed meanwhile")
        self._tell_found(entry, attrs)
        revision = put.revision if put.found is None else put.found.mod_revision
        lease = Lease(entry.subnet, attrs, time.time() + ttl if ttl else 0.0, entry.subnet6)
        return Own(entry.key.key, lease, etcd_lease, entry.key.create_revision, revision, self._due(ttl))

    def _tell_found(self, entry: Entry, attrs: LeaseAttrs) -> None:
        before = entry.attrs.public_ip if entry.attrs else attrs.public_ip
        if before == attrs.public_ip:
            self._log("info", f"Found lease ({entry.subnet}) for current IP ({attrs.public_ip}), reusing it")
        else:
            self._log("info", f"This node's address was {before} and is {attrs.public_ip}: keeping {entry.subnet}")

    def _keep_proof(self, etcd_lease: int) -> None:
        problem = self._proof.keep(etcd_lease)
        if problem:
            self._log("warning", f"this node may not know its lease again after a change of its address: {problem}")

    def _give_up(self, entry: Entry, entries: list[Entry]) -> None:
        """Delete a lease of ours that does not fit the configuration any more; a reservation is not ours to delete."""
        if not entry.key.lease:
            self._log("warning", f"The reservation {entry.subnet} for this node does not fit the network configuration")
            return
        if not self._client.delete_if(entry.key.key, entry.key.mod_revision):
            raise _LostRaceError(f"the lease of {entry.subnet} changed meanwhile")
        entries.remove(entry)
        self._log("info", f"Deleted this node's lease {entry.subnet}: it does not fit the network configuration")

    def _create(
        self, conf: NetConf, attrs: LeaseAttrs, previous: IPv4Network | None, previous6: IPv6Network | None,
        entries: list[Entry],
    ) -> Own:  # fmt: skip
        subnet, subnet6 = choose_subnets(conf, previous, previous6, entries)
        etcd_lease, ttl = self._client.grant(self._ttl)
        key = self._subnets + lease_key(subnet, subnet6).encode()
        put = self._client.put_if({"version": 0}, key, lease_value(attrs), etcd_lease)
        revision = put.revision
        if not put.done:
            if not _is_ours(put.found, etcd_lease):
                self._revoke(etcd_lease)
                raise _LostRaceError(f"subnet {subnet} was taken by another node")
            # The first answer was lost, and the call was made again: what stands there is what we wrote.
            revision = put.found.mod_revision if put.found else revision
        if subnet6 is not None:
            self._withdraw_if_second(key, revision, subnet, subnet6)
        self._log("info", f"Allocated lease ({subnet}) to current node ({attrs.public_ip})")
        lease = Lease(subnet, attrs, time.time() + ttl, subnet6)
        return Own(key, lease, etcd_lease, revision, revision, self._due(ttl))

    def _withdraw_if_second(self, key: bytes, revision: int, subnet: IPv4Network, subnet6: IPv6Network) -> None:
        """Give a new lease up where an older key has one of its subnets: keys of two subnets do not exclude it."""
        for other in self._entries():
            same = other.subnet.overlaps(subnet) or (other.subnet6 is not None and other.subnet6.overlaps(subnet6))
            if same and other.key.key != key and other.key.create_revision < revision:
                self._client.delete_if(key, revision)
                raise _LostRaceError(f"one of the subnets {subnet} and {subnet6} was taken by another node")

    def _revoke(self, etcd_lease: int) -> None:
        try:
            self._client.revoke(etcd_lease)
        except StoreError as error:
            self._log("debug", f"An etcd lease without a key is left to lapse: {error}")

    def _due(self, ttl: float) -> float | None:
        """Return when to renew; a margin as long as the lease itself would renew it without end."""
        if not ttl:
            return None
        return time.monotonic() + (ttl - self._margin if self._margin < ttl else ttl / 2)

    # -- keeping it ------------------------------------------------------------------------------------------------

    def watch(self, post: Post) -> None:
        """Start both threads."""
        self._post = post
        self._watcher = LeaseWatcher(self._client, self._subnets, self._log, self, post)
        threading.Thread(target=self._watcher.run, name="flannel-watch", daemon=True).start()
        threading.Thread(target=self._keep, name="flannel-renew", daemon=True).start()

    def update(self, attrs: LeaseAttrs) -> None:
        """Publish new data with the own lease."""
        with self._changed:
            self._attrs = attrs
            own = self._own
            if own is None:
                return  # the next acquire brings its own
            own.lease = own.lease._replace(attrs=attrs)
            own.published = False
            self._changed.notify_all()
            if self._watcher is not None:
                return
        self._write(own, renew=False)

    def close(self) -> None:
        """Stop the threads; the lease stays in etcd until it ends, for this node to find again."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._watcher is not None:
            self._watcher.close()
        self._client.close()

    def _keep(self) -> None:
        """Renew and publish until closed."""
        retry_at: float | None = None
        while True:
            with self._changed:
                while not self._closed and not self._is_due(retry_at):
                    self._changed.wait(self._seconds_left(retry_at))
                if self._closed:
                    return
                own = self._own
            assert own is not None  # nothing is due without a lease
            renew = own.due is not None and own.due <= time.monotonic()
            retry_at = None
            try:
                self._write(own, renew=renew)
            except Exception as error:  # noqa: BLE001 - this thread is all that keeps the lease alive
                wait = min(_RETRY_RENEWAL, self._ttl / 20) if renew else 1.0
                retry_at = time.monotonic() + wait
                self._log("error", f"Cannot write this node's lease, next try in {wait:.0f} s: {error}")

    def _wake_at(self, retry_at: float | None) -> float | None:
        own = self._own
        if own is None:
            return None
        wanted = 0.0 if not own.published else own.due
        return wanted if wanted is None or retry_at is None else max(wanted, retry_at)

    def _is_due(self, retry_at: float | None) -> bool:
        at = self._wake_at(retry_at)
        return at is not None and at <= time.monotonic()

    def _seconds_left(self, retry_at: float | None) -> float | None:
        at = self._wake_at(retry_at)
        return None if at is None else max(0.0, at - time.monotonic())

    def _write(self, own: Own, *, renew: bool) -> None:
        """Put the own key again, with a new etcd lease if it is to be renewed; only where it still is our key."""
        with self._changed:
            lease = own.lease
            expected = {"create_revision": own.create_revision, "lease": own.etcd_lease}
        etcd_lease, ttl = self._client.grant(self._ttl) if renew else (own.etcd_lease, 0)
        put = self._client.put_if(expected, own.key, lease_value(lease.attrs), etcd_lease)
        if not put.done and not (renew and _is_ours(put.found, etcd_lease)):
            if renew:
                self._revoke(etcd_lease)
            raise StoreError(f"the key of {lease.subnet} was changed or deleted by somebody else")
        with self._changed:
            own.etcd_lease = etcd_lease
            own.mod_revision = max(own.mod_revision, put.revision)
            own.published = own.lease.attrs == lease.attrs
            if renew:
                own.due = self._due(ttl)
                own.lease = own.lease._replace(expiration=time.time() + ttl)
            lease = own.lease
        if renew:
            self._keep_proof(etcd_lease)
        if renew and self._post is not None:
            self._post(Renewed(lease))

    # -- what the watcher sees of the own lease ---------------------------------------------------------------------

    def own_attrs(self) -> LeaseAttrs | None:
        """What this node publishes, whether or not it has a lease right now."""
        return self._attrs

    def own_lease(self) -> OwnLease | None:
        """Return the own lease, if there is one now."""
        with self._changed:
            own = self._own
            return None if own is None else OwnLease(own.key, own.lease, own.generation)

    def own_key_put(self, key: KeyValue, *, listed: bool) -> None:
        """The own key was written, by us, an operator or a stranger, or `listed`, which tells what holds now."""
        try:
            public_ip = parse_value(key.value).public_ip
        except ValueError as error:
            public_ip = None
            self._log("warning", f"Somebody wrote this node's key {quoted(key.key)}: {error}; writing it again")
        with self._changed:
            own = self._own
            if own is None or own.key != key.key or (key.mod_revision < own.mod_revision and not listed):
                return
            # An address of ours that is yet to be published may differ from what stands there.
            if public_ip is None or public_ip == own.lease.attrs.public_ip or not own.published:
                own.published = own.published and public_ip is not None
                self._follow_key(own, key)
                return
        self.lease_gone(own.generation, f"subnet {own.lease.subnet} is now leased to {public_ip}")

    def _follow_key(self, own: Own, key: KeyValue) -> None:
        own.create_revision, own.mod_revision = key.create_revision, key.mod_revision
        if key.lease != own.etcd_lease:
            own.etcd_lease = key.lease
            if not key.lease:  # an operator made it a reservation
                own.due, own.lease = None, own.lease._replace(expiration=0.0)
        self._changed.notify_all()

    def own_key_deleted(self, key: bytes, revision: int) -> None:
        """The own key was deleted, or its etcd lease ended, at `revision`."""
        with self._changed:
            own = self._own
        # Of a key that we deleted or lost and have acquired again, the old end may still come in.
        if own is not None and own.key == key and revision >= own.mod_revision:
            self.lease_gone(own.generation, "its key was deleted from etcd, or has expired")


def _is_ours(found: KeyValue | None, etcd_lease: int) -> bool:
    return found is not None and etcd_lease != 0 and found.lease == etcd_lease
