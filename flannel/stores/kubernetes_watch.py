"""Following the nodes in the Kubernetes API: one list in pages, then a watch from there, for as long as it takes."""

from __future__ import annotations

import contextlib
import random
import time
from ipaddress import IPv4Address, IPv6Address, IPv6Network
from typing import Any, NamedTuple, Protocol

from flannel.lease import Lease, Network
from flannel.log import quoted
from flannel.stores.base import Event, Log, Post, StoreError
from flannel.stores.kubernetes_http import KubeClient, Lines, RefusedError, UnreachableError, status_error
from flannel.stores.kubernetes_nodes import Cidrs, Keys, Node, counted, is_managed, pod_cidrs, published, read_node
from flannel.stores.leasecodec import overlap, why_unusable
from flannel.stores.table import LeaseTable
from flannel.stores.watcher import Watcher, why_clashing

NODES = "/api/v1/nodes"
_GONE = 410


class Timing(NamedTuple):
    """In seconds, but for `page`, the nodes of a list's page: 20 KB each, of which next to nothing is kept."""

    first_back_off: float = 0.25
    longest_back_off: float = 15.0
    watch_least: int = 300  # a watch ends by itself between this and twice this
    bookmarks: float = 180.0  # silence that is too long for an API that sends bookmarks, which come every minute
    grace: float = 10.0  # how much later than announced a watch may end
    page: int = 50


TIMING = Timing()


class Own(NamedTuple):
    """The own lease, and the addresses that only this node may have; `generation` counts what was acquired."""

    lease: Lease
    addresses: frozenset[IPv4Address | IPv6Address]
    generation: int


class Owner(Protocol):
    """Who holds the own lease."""

    @property
    def node_name(self) -> str:
        """The own node's name."""

    @property
    def network(self) -> Network | None:
        """The Network, once it is known."""

    @property
    def network6(self) -> IPv6Network | None:
        """The IPv6Network, where there is one."""

    def own(self) -> Own | None:
        """The own lease, if there is one now."""

    def own_node_seen(self, node: Node) -> None:
        """The own node was listed, or has changed."""

    def lease_gone(self, generation: int, reason: str) -> None:
        """The own lease is not there any more."""


class NodeWatcher(Watcher[str]):
    """The `Watcher` of the API's nodes."""

    def __init__(self, client: KubeClient, keys: Keys, log: Log, owner: Owner, post: Post, timing: Timing) -> None:
        super().__init__("The Kubernetes API", log, post, timing.first_back_off, timing.longest_back_off)
        self._client, self._keys, self._owner = client, keys, owner
        self._timing = timing
        self._version = ""  # resource version up to which all is known; "": list before watching

    def _knows_its_place(self) -> bool:
        return bool(self._version)

    def _forget_place(self) -> None:
        self._version = ""

    def _own(self) -> Lease | None:
        own = self._owner.own()
        return None if own is None else own.lease

    def _failed(self, error: StoreError) -> tuple[str, float]:
        return (self._refused(error), error.retry_after) if isinstance(error, RefusedError) else (str(error), 0.0)

    def _refused(self, error: RefusedError) -> str:
        """Decide what a refusal means; return why the store is down, "" if it is not."""
        # Apart from what passes by itself, a watch that is refused would be refused for ever from that version on.
        passing = error.status in (401, 403, 408, 429) or (error.status >= 500 and not error.too_new)
        if not passing:
            self._version = ""
        if error.status == _GONE or error.too_new:
            self._log("info", f"The watch cannot go on from where it was: listing again ({error})")
            return ""
        return str(error)

    # -- the list --------------------------------------------------------------------------------------------------

    def _list(self) -> None:
        self._version = ""
        before = self._owner.own()
        table: LeaseTable[str] = LeaseTable()
        own_listed, version, token = False, "", ""
        with contextlib.closing(self._client.link()) as link:
            while True:
                query: dict[str, str | int] = {"limit": self._timing.page}
                if token:
                    query["continue"] = token
                page = _page(link.get(NODES, query), version)
                version = page.version
                for item in page.items:
                    own_listed |= self._take_listed(item, table)
                if not page.token or page.token == token:
                    break
                token = page.token
                del page  # two pages at once would cost twice the memory
        if before is not None and not own_listed:
            self._owner.lease_gone(before.generation, f"the API has no node {self._owner.node_name!r} any more")
        self._table, self._version = table, version
        self._name_shadowed()
        self._recovered()
        self._post_snapshot()

    def _take_listed(self, item: Any, table: LeaseTable[str]) -> bool:
        """Take in a listed node; return whether it is the own one."""
        try:
            node = read_node(item)
        except ValueError as error:
            self._warn("?", str(error))
            return False
        if node.name == self._owner.node_name:
            self._owner.own_node_seen(node)
            return True
        lease = self._judge(node) or self._last_good(node)
        if lease is not None:
            table.put(node.name, (node.created, node.name), lease)
        return False

    def _last_good(self, node: Node) -> Lease | None:
        """A node whose annotations have gone or become unreadable is still there: its last good data holds."""
        lease, own = self._table.get(node.name), self._owner.own()
        if lease is None or (own is not None and overlap(lease.subnet, own.lease.subnet)):
            return None
        try:
            return lease if self._usable(pod_cidrs(node)) == (lease.subnet, lease.subnet6) else None
        except ValueError:
            return lease

    def _usable(self, cidrs: Cidrs) -> tuple[Network | None, IPv6Network | None]:
        """Those podCIDRs that count in this network."""
        network = self._owner.network
        return counted(cidrs, network.version if network is not None else 4, self._owner.network6 is not None)

    def _name_shadowed(self) -> None:
        for name, lease in self._table.shadowed_leases():
            self._warn(name, f"another, older node has the podCIDR {lease.subnet}")

    # -- the watch -------------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Watch until the stream ends in good order; raises StoreError when it does not."""
        if self._down and self._history_is_another():
            self._version = ""
            return
        timing = self._timing
        seconds = timing.watch_least + random.randrange(timing.watch_least)  # noqa: S311 - it guards nothing
        query: dict[str, str | int] = {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": seconds,
        }
        stream = self._client.watch(NODES, query, seconds + timing.grace)
        started, progress = time.monotonic(), False
        try:
            with self._reading(stream):
                if self._down:
                    self._recovered()
                    self._post_snapshot()
                for event in stream:
                    self._take(event, stream)
                    progress, self._back_off = True, timing.first_back_off
        finally:
            if time.monotonic() - started > 2 * timing.first_back_off:
                self._back_off = timing.first_back_off
        if not progress and time.monotonic() - started < 1.0:
            raise UnreachableError("the Kubernetes API ended the watch at once")

    def _history_is_another(self) -> bool:
        """Whether an API that was away has come back from a backup: a watch from a version yet to come is silent."""
        version = _page(self._client.get(NODES, {"limit": 1}), "").version
        if not (version.isdigit() and self._version.isdigit() and int(version) < int(self._version)):
            return False
        self._log("warning", "The Kubernetes API's history is another one than before: listing again")
        return True

    def _take(self, event: dict[str, Any], stream: Lines) -> None:
        kind, value = event.get("type"), event.get("object")
        if kind == "ERROR":
            raise status_error(value if isinstance(value, dict) else {}, 500, "the watch of the nodes")
        metadata = value.get("metadata") if isinstance(value, dict) else None
        version = metadata.get("resourceVersion") if isinstance(metadata, dict) else None
        if not isinstance(version, str) or not version:
            raise UnreachableError(f"the watch sent an event without a resource version: {quoted(event)}")
        if kind == "BOOKMARK":
            stream.allow_silence(self._timing.bookmarks)
        elif kind in ("ADDED", "MODIFIED", "DELETED"):
            try:
                node = read_node(value)
            except ValueError as error:
                self._warn("?", str(error))
            else:
                self._take_node(node, deleted=kind == "DELETED")
        else:
            self._warn("?", f"the watch sent an event of the unknown type {quoted(kind)}")
        self._version = version

    def _take_node(self, node: Node, *, deleted: bool) -> None:
        if node.name == self._owner.node_name:
            own = self._owner.own()
            if not deleted:
                self._owner.own_node_seen(node)
            elif own is not None:
                self._owner.lease_gone(own.generation, f"the node {node.name!r} was deleted")
            return
        held = self._table.get(node.name)
        lease = None if deleted else self._judge(node) or self._last_good(node)
        events: list[Event] = []
        if held is not None and (lease is None or lease.subnet != held.subnet):
            events += self._table.remove(node.name)
        if lease is not None:
            events += self._table.put(node.name, (node.created, node.name), lease)
            if self._table.shadowed(lease):
                self._warn(node.name, f"another, older node has the podCIDR {lease.subnet}")
        self._post_all(events)

    # -- a stranger's word ------------------------------------------------------------------------------------------

    def _judge(self, node: Node) -> Lease | None:
        """Return a peer's lease, or None if it has none, or, with a warning, if it cannot be used."""
        if not is_managed(node, self._keys):
            return None
        network, own = self._owner.network, self._owner.own()
        if network is None:
            return None
        try:
            attrs, (subnet, subnet6) = published(node, self._keys, network.version), self._usable(pod_cidrs(node))
            if subnet is None:
                raise ValueError(f"it has no IPv{network.version} podCIDR")
        except ValueError as error:
            self._warn(node.name, str(error))
            return None
        lease = Lease(subnet, attrs, subnet6=subnet6)
        why = why_unusable(lease, network, self._owner.network6) or why_clashing(lease, self._own(), "podCIDR")
        ours = own.addresses & {attrs.public_ip, attrs.public_ip6} if own is not None else None
        if not why and ours:
            why = f"its address {', '.join(map(str, ours))} is this node's own"
        if why:
            self._warn(node.name, why)
            return None
        return lease

    def _shown(self, key: str) -> str:
        return f"node {quoted(key)}"


class _Page(NamedTuple):
    items: list[Any]
    version: str
    token: str


def _page(answer: dict[str, Any], expected: str) -> _Page:
    """Read a page of a list. Raises UnreachableError unless it is of version `expected`, where one is."""
    items, metadata = answer.get("items"), answer.get("metadata")
    if items is None:
        items = []  # how Go writes a list that was never filled
    version = metadata.get("resourceVersion") if isinstance(metadata, dict) else None
    token = metadata.get("continue", "") if isinstance(metadata, dict) else ""
    if not isinstance(items, list) or not isinstance(version, str) or not version or not isinstance(token, str):
        raise UnreachableError("the Kubernetes API's list of nodes is no list")
    if expected and version != expected:
        raise UnreachableError(f"the list of nodes changed its version from {quoted(expected)} to {quoted(version)}")
    return _Page(items, version, token)
