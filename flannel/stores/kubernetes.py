"""Leases in the Kubernetes API: a node's subnet is its podCIDR, and annotations of the node say how it is reached.

Two threads: one lists and watches the nodes, one keeps this node's annotations as they have to be.
docs/deviations.md lists where this store does better than upstream's.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, IPv6Network
from typing import TYPE_CHECKING, NamedTuple, TypeVar
from urllib.parse import quote

from flannel.lease import Address, Lease, LeaseAttrs, Network
from flannel.log import quoted
from flannel.stores.base import Log, Post, Remembered, StoreError
from flannel.stores.kubernetes_http import KubeClient, RefusedError
from flannel.stores.kubernetes_nodes import (
    Addresses,
    Keys,
    Node,
    annotations_patch,
    counted,
    is_managed,
    network_available_patch,
    overwritten,
    pod_cidrs,
    published,
    read_node,
    wanted_annotations,
)
from flannel.stores.kubernetes_watch import NODES, TIMING, NodeWatcher, Own, Timing
from flannel.stores.owner import LeaseOwner

if TYPE_CHECKING:
    from flannel.netconf import NetConf

T = TypeVar("T")


class Patience(NamedTuple):
    """In seconds: how long a call is tried, how often, and how long the keeping thread rests after a failure."""

    whole: float = 30.0
    between: float = 3.0
    longest: float = 60.0


PATIENCE = Patience()


class _FinalError(StoreError):
    """What no further try will cure."""


class KubernetesStore(LeaseOwner[Own]):
    """A `Store` (see base.py) in the Kubernetes API.

    `node_name` is the own node's; `conf_path` the file with the network configuration; `set_condition` says whether the
    node's NetworkUnavailable condition is to be cleared.
    """

    def __init__(
        self,
        client: KubeClient,
        node_name: str,
        conf_path: str,
        log: Log,
        *,
        prefix: str = "flannel.alpha.coreos.com",
        set_condition: bool = True,
        patience: Patience = PATIENCE,
        timing: Timing = TIMING,
    ) -> None:
        super().__init__()
        self.node_name = node_name
        self._client, self._log, self._keys = client, log, Keys(prefix)
        self._conf_path, self._set_condition = conf_path, set_condition
        self._patience, self._timing = patience, timing
        self._path = f"{NODES}/{quote(node_name, safe='')}"
        self._closed = threading.Event()
        self._faults: list[str] = []  # of the node's annotations, as last told of
        self._unwritten = False  # the annotations may differ from what they have to be
        self._mine = False  # because of us
        self._condition_due = False
        self._watcher: NodeWatcher | None = None

    # -- before there is a lease -----------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """What it is called, which upstream's log says as well."""
        return f"Kubernetes Subnet Manager - {self.node_name}"

    def network_config(self) -> str:
        """Return the text of the network configuration's file."""
        try:
            with open(self._conf_path, encoding="utf-8", errors="replace") as file:
                return file.read()
        except OSError as error:
            raise StoreError(f"cannot read the network configuration {self._conf_path}: {error.strerror}") from None

    def remembered(self) -> Remembered:
        """What the node's annotations say: an operator's word on its address, and what was published last."""
        node = self._persist(f"reading the node {self.node_name!r}", self._get_node)
        try:
            alone6 = self._keys.public_ip not in node.annotations and self._keys.public_ip6 in node.annotations
            before = published(node, self._keys, 6 if alone6 else 4) if is_managed(node, self._keys) else None
        except ValueError as error:
            before = None
            self._log("warning", f"What this node published before cannot be read: {error}")
        keys, texts = self._keys, node.annotations
        for name in keys.strange(texts):
            self._log("warning", f"nobody reads the annotation {quoted(name)} of node {self.node_name!r}")
        return Remembered(texts.get(keys.node_public_ip, ""), before, texts.get(keys.node_public_ip6, ""))

    def published_by(self, public: Address) -> LeaseAttrs | None:
        """Nothing: a node's annotations are its own, whatever its address is, and `remembered` has said them."""
        return None

    def _get_node(self) -> Node:
        try:
            return read_node(self._client.get(self._path))
        except ValueError as error:
            raise StoreError(f"the Kubernetes API answered with {error}") from None

    def _persist(self, what: str, call: Callable[[], T]) -> T:
        """Try until it holds, for as long as upstream does. Raises the last StoreError."""
        deadline, told = time.monotonic() + self._patience.whole, ""
        while True:
            try:
                return call()
            except _FinalError:
                raise
            except StoreError as error:
                wait = max(self._patience.between, error.retry_after if isinstance(error, RefusedError) else 0.0)
                if time.monotonic() + wait > deadline or self._closed.is_set():
                    raise StoreError(f"{what}: {error}; given up after {self._patience.whole:.0f} s") from error
                if str(error) != told:
                    told = str(error)
                    self._log("warning", f"{what}: {error}; trying again every {self._patience.between:.0f} s")
            self._closed.wait(wait)

    # -- the own lease ---------------------------------------------------------------------------------------------

    def acquire(
        self, conf: NetConf, attrs: LeaseAttrs, previous: Network | None, previous6: IPv6Network | None = None
    ) -> Lease:  # fmt: skip
        """Annotate the node, and return the subnet that Kubernetes gave it."""
        lease, addresses = self._persist("acquiring a lease", lambda: self._claim(conf, attrs))
        for now, before in ((lease.subnet, previous), (lease.subnet6, previous6)):
            if before is not None and before != now:
                self._log("warning", f"The node's podCIDR is {now}, and was {before}: pods made then are cut off")
        with self._changed:
            self._network, self._network6, self._attrs = conf.network, _network6(conf), attrs
            self._generation += 1
            self._own = Own(lease, _all_of(attrs, addresses), self._generation)
            self._condition_due = self._set_condition
            self._changed.notify_all()
        if self._watcher is not None:
            self._watcher.relist()
        return lease

    def _claim(self, conf: NetConf, attrs: LeaseAttrs) -> tuple[Lease, Addresses]:
        node, network6 = self._get_node(), _network6(conf)
        try:
            cidrs = pod_cidrs(node)
        except ValueError as error:
            raise _FinalError(f"node {self.node_name!r}: {error}") from None
        first, second = counted(cidrs, conf.network.version, network6 is not None)
        if first is None or (network6 is not None and second is None):
            version = ", of IPv6" if first is not None or conf.network.version == 6 else ""
            raise StoreError(
                f"node {self.node_name!r}: pod cidr not assigned{version}; Kubernetes' controller-manager assigns one "
                "with --allocate-node-cidrs and --cluster-cidr, or whoever makes the node sets spec.podCIDR"
            )
        outside = None
        if not _within(first, conf.network):
            outside = f"{first} is not within the {'IPv6' if first.version == 6 else ''}Network {conf.network}"
        elif network6 is not None and second is not None and not second.subnet_of(network6):
            outside = f"{second} is not within the IPv6Network {network6}"
        if outside:
            raise _FinalError(
                f"node {self.node_name!r}: its podCIDR {outside} of {self._conf_path}; it and Kubernetes' "
                "--cluster-cidr have to agree"
            )
        addresses = self._addresses(node, attrs)
        self._write_annotations(node, attrs, addresses)
        return Lease(first, attrs, subnet6=second), addresses

    def _write_annotations(self, node: Node, attrs: LeaseAttrs, addresses: Addresses) -> list[str]:
        """Patch those annotations that are not what they have to be; return their names."""
        wanted = wanted_annotations(attrs, addresses, self._keys)
        changed = {key: text for key, text in wanted.items() if node.annotations.get(key) != text}
        if changed:
            self._client.patch(f"{self._path}/status", annotations_patch(changed))
        return sorted(changed)

    def _addresses(self, node: Node, attrs: LeaseAttrs) -> Addresses:
        """The addresses that peers are to use."""
        addresses, faults = overwritten(node, self._keys, attrs)
        told, self._faults = self._faults, faults
        for fault in faults if faults != told else ():
            self._log("error", f"Node {self.node_name!r}: {fault}")
        return addresses

    # -- keeping it ------------------------------------------------------------------------------------------------

    def watch(self, post: Post) -> None:
        """Start both threads."""
        self._post = post
        self._watcher = NodeWatcher(self._client, self._keys, self._log, self, post, self._timing)
        threading.Thread(target=self._watcher.run, name="flannel-watch", daemon=True).start()
        threading.Thread(target=self._keep, name="flannel-keep", daemon=True).start()

    def update(self, attrs: LeaseAttrs) -> None:
        """Publish new data with the own lease."""
        with self._changed:
            self._attrs = attrs
            own = self._own
            if own is None:
                return  # the next acquire brings its own
            lease = own.lease._replace(attrs=attrs)
            self._own = own._replace(lease=lease, addresses=own.addresses | _all_of(attrs))
            self._unwritten = self._mine = True
            self._changed.notify_all()
            if self._watcher is not None:
                return
        self._persist("publishing new data", self._write_own)

    def close(self) -> None:
        """Stop the threads; the annotations stay, as upstream's do."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()
        if self._watcher is not None:
            self._watcher.close()

    def _keep(self) -> None:
        """Keep the node's annotations, and clear its condition, until closed."""
        rest, told = self._patience.between, ""
        while True:
            with self._changed:
                while not self._closed.is_set() and (
                    self._own is None or not (self._unwritten or self._condition_due)
                ):  # fmt: skip
                    self._changed.wait()
                if self._closed.is_set():
                    return
            wait = 0.0
            try:
                if self._write_own():
                    # Whoever else writes them, such as a second flanneld, must not be fought without a pause.
                    wait = self._patience.between
                rest, told = self._patience.between, ""
            except Exception as error:  # noqa: BLE001 - this thread is all that keeps the annotations
                wait = max(rest, error.retry_after if isinstance(error, RefusedError) else 0.0)
                wait *= random.uniform(1.0, 1.5)  # noqa: S311 - it guards nothing
                rest = min(2 * rest, self._patience.longest)
                if str(error) != told:
                    told = str(error)
                    self._log("error", f"Cannot write to the node {self.node_name!r}, trying again: {error}")
            self._closed.wait(wait)

    def _write_own(self) -> bool:
        """Write what is due; return whether annotations were not what they had to be, by no doing of ours."""
        with self._changed:
            own, attrs, mine, condition_due = self._own, self._attrs, self._mine, self._condition_due
            if own is None or attrs is None:
                return False
            self._unwritten = self._mine = False
        repaired = False
        try:
            node = self._get_node()
            addresses = self._addresses(node, attrs)
            self._note_addresses(own.generation, addresses)
            changed = self._write_annotations(node, attrs, addresses)
            if changed and not mine:
                repaired = True
                self._log("warning", f"Somebody changed this node's annotations: wrote {', '.join(changed)} again")
            if condition_due and self._watcher is not None:
                now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                self._client.patch(f"{self._path}/status", network_available_patch(now))
        except BaseException:
            with self._changed:
                self._unwritten, self._mine = True, self._mine or mine
            raise
        with self._changed:
            if condition_due and self._watcher is not None:
                self._condition_due = False
        return repaired

    def _note_addresses(self, generation: int, addresses: Addresses) -> None:
        """No peer may have these: they are about to be published as ours."""
        with self._changed:
            own = self._own
            if own is not None and own.generation == generation:
                self._own = own._replace(addresses=_all_of(own.lease.attrs, addresses))

    # -- what the watcher sees of the own node ---------------------------------------------------------------------

    def own(self) -> Own | None:
        """Return the own lease, if there is one now."""
        with self._changed:
            return self._own

    def own_node_seen(self, node: Node) -> None:
        """The own node was listed, or has changed: does it still say what it has to?"""
        with self._changed:
            own, attrs = self._own, self._attrs
        if own is None or attrs is None:
            return
        try:
            cidrs = pod_cidrs(node)
        except ValueError as error:
            self._log("error", f"Node {self.node_name!r}: {error}")
            return
        now_counted = counted(cidrs, own.lease.subnet.version, self._network6 is not None)
        if now_counted != (own.lease.subnet, own.lease.subnet6):
            now = ", ".join(str(cidr) for cidr in now_counted if cidr is not None) or "empty"
            self.lease_gone(own.generation, f"the podCIDR of node {self.node_name!r} is {now} now")
            return
        addresses = self._addresses(node, attrs)
        self._note_addresses(own.generation, addresses)
        wanted = wanted_annotations(attrs, addresses, self._keys)
        if any(node.annotations.get(key) != text for key, text in wanted.items()):
            # It may be an old view of it: the keeping thread looks for itself.
            with self._changed:
                self._unwritten = True
                self._changed.notify_all()


def _within(subnet: Network, network: Network) -> bool:
    first, last = network.network_address, network.broadcast_address
    return (
        subnet.version == network.version
        and int(first) <= int(subnet.network_address)
        and int(subnet.broadcast_address) <= int(last)
    )


def _network6(conf: NetConf) -> IPv6Network | None:
    return conf.ipv6_network if conf.enable_ipv6 else None


def _all_of(attrs: LeaseAttrs, addresses: Addresses | None = None) -> frozenset[IPv4Address | IPv6Address]:
    """The addresses that only this node may have."""
    both = (attrs.public_ip, attrs.public_ip6, *(addresses or ()))
    return frozenset(address for address in both if address is not None)
