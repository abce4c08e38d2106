"""The reconciler: what the leases want against what the kernel has, and the difference in one batch.

There is one code path. Every cause (a lease, a kernel notification, start-up, a lost notification, a timer) does
nothing but mark lease keys dirty or ask for a full comparison; `run` then acts. Writing is idempotent, so the echo
of our own writes finds what it expects and marks nothing.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Iterator
from ipaddress import IPv6Network, ip_address

from flannel import log
from flannel.backends.base import Backend, Facts
from flannel.changes import Changes
from flannel.claims import Claims
from flannel.interface import External
from flannel.kernel import rtnl
from flannel.kernel.monitor import Change
from flannel.kernel.netlink import Failure, Message, Netlink, NetlinkError
from flannel.kernel.values import BLACKHOLE, READY, Address, Fdb, Link, Neigh, Route, SeenEntry, SeenRoute
from flannel.known import KnownLeases
from flannel.lease import Network
from flannel.state import OffDevice, Recorded
from flannel.stores.base import Event, Snapshot
from flannel.surroundings import Surroundings

#: Seconds for which a list that lost every peer removes nothing.
GRACE = 300.0
#: Seconds between full comparisons when nothing happens.
SLOW = 60.0
_RETRY_FIRST, _RETRY_LONGEST = 1.0, 10.0
_SETTLE = 0.05
_GONE = (errno.ENOENT, errno.ESRCH, errno.ENODEV, errno.EADDRNOTAVAIL)
#: Larger than any connected route's metric, so that the bridge's own route wins over the blackhole at all times.
_BLACKHOLE_METRIC = 4278198272
_NEVER = float("inf")


class Reconciler:
    """Keeps the kernel as the leases want it. Used by one thread."""

    def __init__(
        self,
        netlink: Netlink,
        backend: Backend,
        external: External,
        network: Network,
        own: Network,
        recorded: Recorded,
        *,
        network6: IPv6Network | None = None,
        own6: IPv6Network | None = None,
        blackhole: bool = False,
        grace: float = GRACE,
        clock: Callable[[], float] = time.monotonic,
        choose_again: Callable[[], External] | None = None,
    ) -> None:
        """`choose_again` chooses the external interface once more, for when its address is gone."""
        self._netlink = netlink
        self._backend = backend
        self._networks: dict[int, Network] = {network.version: network}
        self._own = own
        # Our subnets' first addresses, which our devices have.
        self._bases = {(own.version, int(own.network_address))}
        self._own_subnets: tuple[Network, ...] = (own,)
        if network6 is not None and own6 is not None:
            self._networks[6] = network6
            self._bases.add((6, int(own6.network_address)))
            self._own_subnets = (own, own6)
        self._recorded = recorded
        self._blackhole = blackhole
        self._clock = clock
        self._around = Surroundings(netlink, backend, external, choose_again)
        self._known = KnownLeases(own, grace, clock, self._leftovers)
        self._claims = Claims(backend, self._known, self._own_subnets, self._around.no_peers, dual=6 in self._networks)
        self._own_routes: tuple[Route, ...] = ()
        self._full_at = _NEVER
        self._retry_at = _NEVER
        self._retry_after = _RETRY_FIRST
        self._failing: dict[Network, str] = {}
        self.compare_soon(0)

    @property
    def _facts(self) -> Facts:
        return self._around.facts

    # -- what happened ---------------------------------------------------------------------------------------------

    def take(self, message: Event | Snapshot) -> None:
        """Learn from the store. Nothing is done before `run`."""
        self._known.take(message)
        if isinstance(message, Snapshot):
            self.compare_soon(0)

    def lost_own_key(self) -> None:
        """Our own key vanished from the store: it may have lost the others' keys too."""
        self._known.lost_own_key()

    def _leftovers(self) -> bool:
        """Whether an earlier run left peers in the kernel."""
        if self._recorded.routes:
            return True
        if not self._facts.tunnels:
            self._around.refresh()  # the first list may come before the first comparison
        own = self._backend.own(self._facts)
        return bool(self._facts.tunnels) and any(
            self._backend.is_ours(seen, self._facts) and seen.route not in own
            for version in self._networks
            for seen in rtnl.dump_routes(self._netlink, version)
        )

    def compare_soon(self, delay: float = _SETTLE) -> None:
        """Ask for a full comparison, a moment from now so that what comes in a burst is met once."""
        self._full_at = min(self._full_at, self._clock() + delay)

    def notice(self, changes: Iterable[Change], lost: bool) -> None:
        """Learn from the kernel. What is as we want it marks nothing: that is the echo of our own writes."""
        if lost:
            log.warning("the kernel dropped notifications; comparing everything")
            self.compare_soon(0)
        for kind, what in changes:
            if isinstance(what, SeenEntry):
                self._notice_entry(kind, what)
            elif isinstance(what, SeenRoute):
                self._notice_route(kind, what)
            elif isinstance(what, Link):
                self._notice_link(kind, what)
            else:
                self._notice_address(kind, what)

    def _notice_entry(self, kind: int, seen: SeenEntry) -> None:
        entry = seen.entry
        if entry is None or all(seen.ifindex != tunnel.ifindex for tunnel in self._facts.tunnels):
            return
        if isinstance(entry, Neigh):
            subnet = self._claims.holders.of((entry.version, entry.ip))
            wanted: tuple[Neigh | Fdb, ...] = self._claims.had(subnet).neighbours
        else:
            subnet = self._claims.holders.of(entry.mac)
            wanted = self._claims.had(subnet).fdb
        if not subnet or not wanted:
            return
        if kind == rtnl.NEWNEIGH:
            spoiled = entry not in wanted or not seen.state & rtnl.PERMANENT
        else:
            spoiled = isinstance(entry, Neigh) or entry in wanted
        if spoiled:
            self._known.dirty.add(subnet)

    def _notice_route(self, kind: int, seen: SeenRoute) -> None:
        route = seen.route
        subnet = self._claims.holders.of((route.version, route.dst))
        for one in self._claims.had(subnet).routes:
            if subnet and one.key == route.key:
                if _harms(kind, seen, one):
                    self._known.dirty.add(subnet)
                return
        underlay = (self._backend.asks_routes or self._failing) and not self._inside(route)
        if underlay or any(one.key == route.key and _harms(kind, seen, one) for one in self._own_routes):
            self.compare_soon()

    def _inside(self, route: Route) -> bool:
        network = self._networks.get(route.version)
        return network is not None and rtnl.network_of(route).network_address in network

    def _notice_link(self, kind: int, link: Link) -> None:
        external = self._facts.external
        tunnel = next((one for one in self._facts.tunnels if one.name == link.name), None)
        if tunnel is not None:
            same = kind == rtnl.NEWLINK and link.ifindex == tunnel.ifindex and link.shape == tunnel.shape
            if not same:
                self.compare_soon()
        elif link.name == external.name:
            flags = link.flags & READY
            if kind == rtnl.DELLINK or link.ifindex != external.ifindex or flags != self._around.external_flags:
                self._around.external_flags = flags if kind == rtnl.NEWLINK else -1
                self.compare_soon()

    def _notice_address(self, kind: int, address: Address) -> None:
        if any(address.ifindex == tunnel.ifindex for tunnel in self._facts.tunnels):
            linklocal = address.version == 6 and address.ip >> 118 == 0xFE80 >> 6
            own = (address.version, address.ip) in self._bases
            if own != (kind == rtnl.NEWADDR) and not linklocal and address.version in self._networks:
                self.compare_soon()
        elif address.ifindex == self._facts.external.ifindex:
            self.compare_soon()

    # -- acting ----------------------------------------------------------------------------------------------------

    def next_run(self) -> float:
        """When `run` has something to do, on this reconciler's clock."""
        if self._known.dirty:
            return 0.0
        grace_until = self._known.grace_until
        return min(self._full_at, self._retry_at, _NEVER if grace_until is None else grace_until)

    def run(self) -> None:
        """Do what is due."""
        now = self._clock()
        if self._known.end_grace(now):
            self.compare_soon(0)
        if now >= self._retry_at:
            self._retry_at = _NEVER
            self._known.dirty.update(self._failing.keys() - {self._own})
        if self._clock() >= self._full_at:
            self._compare_all()
        elif self._known.dirty:
            self._compare_dirty()

    def _compare_dirty(self) -> None:
        dirty, self._known.dirty = self._known.dirty, set()
        if self._backend.asks_routes:
            self._around.ask_routes(self._known.leases[one] for one in dirty if one in self._known.leases)
        changes = Changes()
        for subnet in dirty:
            wanted, applied = self._claims.wants(subnet, self._facts), self._claims.had(subnet)
            for route in applied.routes:
                if all(one.key != route.key for one in wanted.routes):
                    changes.remove_routes[route] = subnet
                elif route not in wanted.routes:
                    changes.superseded.append((route, subnet))
            changes.want(subnet, wanted)
            for neighbour in applied.neighbours:
                replaced = any((one.version, one.ip) == (neighbour.version, neighbour.ip) for one in wanted.neighbours)
                if not replaced and self._claims.holders.alone((neighbour.version, neighbour.ip), subnet):
                    changes.remove_entries[neighbour] = subnet
            for entry in applied.fdb:
                replaced = any(one.mac == entry.mac for one in wanted.fdb)
                if not replaced and self._claims.holders.alone(entry.mac, subnet):
                    changes.remove_entries[entry] = subnet
            self._claims.note(subnet, wanted)
        self._backend.update(self._claims.usable(), self._known.may_remove)
        self._apply(changes)

    def _compare_all(self) -> None:
        self._full_at = self._clock() + SLOW
        self._known.dirty.clear()
        if not self._around.refresh():
            self._full_at = min(self._full_at, self._clock() + _RETRY_FIRST)
            return
        if self._backend.asks_routes:
            self._facts.direct.clear()
            self._around.ask_routes(self._known.leases.values())
        everything = Changes()
        for subnet in self._claims.begin_anew():
            wanted = self._claims.wants(subnet, self._facts)
            everything.want(subnet, wanted)
            self._claims.note(subnet, wanted)
        own = self._backend.own(self._facts)
        if self._blackhole:
            own += tuple(
                Route(int(one.network_address), one.prefixlen, 0, 0, False, BLACKHOLE, _BLACKHOLE_METRIC, one.version)
                for one in self._own_subnets
            )
        self._own_routes = own
        for route in own:
            everything.routes[route] = self._own
        may_remove = self._known.may_remove
        changes = Changes()
        try:
            self._compare_routes(everything, changes, may_remove)
            self._compare_entries(everything, changes, may_remove)
        except NetlinkError as error:
            log.error(f"cannot read the kernel's state: {error}")
            self._full_at = min(self._full_at, self._clock() + _RETRY_FIRST)
            return
        self._backend.update(self._claims.usable(), self._known.may_remove)
        self._apply(changes, tuple(self._failing))

    def _compare_routes(self, everything: Changes, changes: Changes, may_remove: bool) -> None:
        wanted = {route.key: route for route in everything.routes}
        there: set[Route] = set()
        names: dict[int, str] = {}
        for seen in (seen for version in self._networks for seen in rtnl.dump_routes(self._netlink, version)):
            route = seen.route
            one = wanted.get(route.key)
            if one is not None:
                if seen.bare:
                    there.add(route)
                if route != one and (self._backend.is_ours(seen, self._facts) or self._is_recorded(seen, names)):
                    changes.superseded.append((route, everything.routes[one]))
            elif may_remove and (self._backend.is_ours(seen, self._facts) or self._is_recorded(seen, names)):
                log.info(f"removing the route {route}: no lease wants it")
                changes.remove_routes[route] = self._own
        for route, subnet in everything.routes.items():
            if route not in there:
                changes.routes[route] = subnet
        if may_remove:
            wanted_off = self._off_device(everything.routes)
            removed = self._off_device(changes.remove_routes)
            self._recorded.remove(self._recorded.routes - wanted_off - removed)

    def _is_recorded(self, seen: SeenRoute, names: dict[int, str]) -> bool:
        route = seen.route
        if not self._recorded.routes or not route.gateway or not seen.plain:
            return False
        return bool(self._off_device([route], names) & self._recorded.routes)

    def _off_device(self, routes: Iterable[Route], names: dict[int, str] | None = None) -> set[OffDevice]:
        """Those of the routes that go through the underlay, as they are recorded."""
        names = {} if names is None else names
        found = set()
        tunnels = {0, *(tunnel.ifindex for tunnel in self._facts.tunnels)}
        names[self._facts.external.ifindex] = self._facts.external.name
        for route in routes:
            if route.oif in tunnels or not route.gateway:
                continue
            if route.oif not in names:
                link = rtnl.get_link(self._netlink, index=route.oif)
                names[route.oif] = link.name if link else ""
            gateway = ip_address(rtnl.packed(route.gateway, route.version))
            found.add(OffDevice(rtnl.network_of(route), gateway, names[route.oif]))
        return found

    def _compare_entries(self, everything: Changes, changes: Changes, may_remove: bool) -> None:
        wanted_ips = {(one.version, one.ip) for one in everything.entries if isinstance(one, Neigh)}
        there: set[Neigh | Fdb] = set()
        for seen in self._seen_entries():
            entry = seen.entry
            if entry is None or not seen.state & (rtnl.PERMANENT if isinstance(entry, Neigh) else 0xC0):
                continue
            if entry in everything.entries:
                there.add(entry)
            elif may_remove and not (isinstance(entry, Neigh) and (entry.version, entry.ip) in wanted_ips):
                changes.remove_entries[entry] = self._own
        for one, subnet in everything.entries.items():
            if one not in there:
                changes.entries[one] = subnet

    def _seen_entries(self) -> Iterator[SeenEntry]:
        """Neighbours and FDB entries of our vxlan devices."""
        for version, tunnel in ((self._own.version, self._facts.tunnel), (6, self._facts.tunnel6)):
            if tunnel is not None and tunnel.vxlan is not None:
                yield from rtnl.dump_neighbours(self._netlink, tunnel.ifindex, version)
                yield from rtnl.dump_fdb(self._netlink, tunnel.ifindex)

    def _apply(self, changes: Changes, looked_at: Iterable[Network] = ()) -> None:
        """Send the changes in one batch, and keep for another try what the kernel refused.

        `looked_at` are leases that failed before and were compared again: they may need nothing any more.
        """
        self._recorded.add(self._off_device(changes.routes))
        requests, owners, removals = changes.messages()
        failures = self._make_way(self._netlink.batch(requests), requests, changes)
        failed: dict[Network, Failure] = {}
        for failure in failures:
            if failure.position in removals:
                if failure.errno not in _GONE:
                    log.error(f"cannot remove what the lease of {owners[failure.position]} had: {failure}")
            else:
                failed.setdefault(owners[failure.position], failure)
        # A route that could not be replaced is wrong by now: better none.
        wrong = [route for route, subnet in changes.superseded if subnet in failed]
        self._netlink.batch([rtnl.delete_route(route) for route in wrong])
        self._recorded.remove(self._off_device([*changes.remove_routes, *wrong]))
        for subnet in {*owners, *looked_at}:
            self._judge(subnet, failed.get(subnet))
        if failed:
            self._retry_at = self._clock() + self._retry_after
            self._retry_after = min(self._retry_after * 2, _RETRY_LONGEST)
        elif not self._failing:
            self._retry_after = _RETRY_FIRST

    def _make_way(self, failures: list[Failure], requests: list[Message], changes: Changes) -> list[Failure]:
        """Try routes of IPv6 again that the kernel refused because of the very routes that they replace.

        It looks the gateway up first, and finds that it lies behind another device.
        """
        routes = dict(zip(range(len(requests) - len(changes.routes), len(requests)), changes.routes, strict=True))
        left = []
        for failure in failures:
            route = routes.get(failure.position)
            if route is None or route.version == 4 or failure.errno != errno.EINVAL:
                left.append(failure)
                continue
            self._netlink.batch([rtnl.delete_route(route._replace(gateway=0, oif=0, onlink=False))])
            left += [
                again._replace(position=failure.position) for again in self._netlink.batch([rtnl.set_route(route)])
            ]
        return left

    def _judge(self, subnet: Network, failure: Failure | None) -> None:
        if failure is None:
            if self._failing.pop(subnet, None) and subnet in self._known.leases:
                log.info(f"the lease of {subnet} is programmed now")
            return
        lease = self._known.leases.get(subnet)
        where = f" by {lease.attrs.public_ip}" if lease else ""
        text = f"cannot reach {subnet}{where}: {failure}; trying again"
        if self._failing.get(subnet) != text:
            log.error(text)
        self._failing[subnet] = text
        if subnet == self._own:
            self.compare_soon(_RETRY_FIRST)


def _harms(kind: int, seen: SeenRoute, wanted: Route) -> bool:
    """Whether a change leaves a route of ours away, or another one than it was made."""
    return seen.route == wanted if kind == rtnl.DELROUTE else seen.route != wanted or not seen.bare
