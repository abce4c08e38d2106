"""A batch of changes to the kernel's state, in the order that loses no packet."""

from __future__ import annotations

from flannel.backends.base import Wants
from flannel.kernel import rtnl
from flannel.kernel.netlink import Message
from flannel.kernel.values import Fdb, Neigh, Route
from flannel.lease import Network


class Changes:
    """What is to be made and removed, each with the lease it is for."""

    def __init__(self) -> None:
        self.remove_routes: dict[Route, Network] = {}
        self.remove_entries: dict[Neigh | Fdb, Network] = {}
        self.entries: dict[Neigh | Fdb, Network] = {}
        self.routes: dict[Route, Network] = {}
        # What a route of ours takes the place of.
        self.superseded: list[tuple[Route, Network]] = []

    def want(self, subnet: Network, wanted: Wants) -> None:
        """Make what a lease wants."""
        for neighbour in wanted.neighbours:
            self.entries[neighbour] = subnet
        for entry in wanted.fdb:
            self.entries[entry] = subnet
        for route in wanted.routes:
            self.routes[route] = subnet

    def messages(self) -> tuple[list[Message], list[Network], range]:
        """The batch: routes go first; then neighbours, FDB entries and at last routes come, so that no packet of ours
        finds a route whose neighbour is not there yet. With it whose each message is, and which ones remove."""
        removals = [rtnl.delete_route(route) for route in self.remove_routes]
        removals += [rtnl.delete_entry(entry) for entry in self.remove_entries]
        owners = [*self.remove_routes.values(), *self.remove_entries.values()]
        made = sorted(self.entries.items(), key=lambda item: isinstance(item[0], Fdb))
        requests = removals + [rtnl.set_entry(entry) for entry, _ in made]
        owners += [subnet for _, subnet in made]
        requests += [rtnl.set_route(route) for route in self.routes]
        owners += self.routes.values()
        return requests, owners, range(len(removals))
