"""What a backend is: for a lease, the kernel state that it wants, computed without touching the kernel."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from typing import NamedTuple, Protocol

from flannel.interface import External
from flannel.kernel import rtnl
from flannel.kernel.netlink import Netlink
from flannel.kernel.rtnl import Fdb, Link, Neigh, Route, SeenRoute
from flannel.lease import Lease, LeaseAttrs
from flannel.state import Recorded


class BackendError(Exception):
    """The backend cannot run here; the text says what is wrong and what to do."""


class Ignored(Exception):
    """A lease that this backend does not program; the text says why."""


class Wants(NamedTuple):
    """The kernel state that one lease wants."""

    neighbours: tuple[Neigh, ...] = ()
    fdb: tuple[Fdb, ...] = ()
    routes: tuple[Route, ...] = ()


NOTHING = Wants()


class Facts(NamedTuple):
    """What the backend's answer depends on besides the lease: our devices, and which peers are on our own links.

    `tunnel` is None for a backend without a device; `direct` maps a peer's address to the interface by which the kernel
    reaches it without a gateway.
    """

    external: External
    tunnel: Link | None
    direct: dict[IPv4Address, int]


class Backend(Protocol):
    """One way of reaching other nodes' pods. `asks_routes`: answers depend on how the kernel reaches a peer."""

    name: str
    mtu: int
    asks_routes: bool

    def prepare(self, netlink: Netlink, recorded: Recorded) -> LeaseAttrs:
        """Make what must be there before the lease, and say what to publish with it. Raises BackendError."""

    def start(self, netlink: Netlink, lease: Lease) -> None:
        """Take up the own lease: device up and addressed. Raises BackendError."""

    def device(self, netlink: Netlink, external: External) -> Link | None:
        """Make our device as it must be, again if need be, and return it. Raises BackendError."""

    def attrs(self) -> LeaseAttrs:
        """What is published with the lease now."""

    def wants(self, lease: Lease, facts: Facts) -> Wants:
        """The kernel state for a peer's lease; pure. Raises Ignored."""

    def own(self, facts: Facts) -> tuple[Route, ...]:
        """Routes that are wanted whatever the leases are."""

    def is_ours(self, seen: SeenRoute, facts: Facts) -> bool:
        """Whether a route that nobody recorded can only be ours."""

    def update(self, leases: dict[IPv4Network, Lease]) -> None:
        """Learn the peers' leases, where packets are moved by the backend itself."""

    def stop(self) -> None:
        """Stop what runs, leave in the kernel what must outlive the daemon."""


def ensure_address(netlink: Netlink, link: Link, ip: IPv4Address, network: IPv4Network) -> None:
    """Give a device its /32 and take other addresses of the Network off it. Raises BackendError."""
    changes = []
    present = False
    for address in rtnl.dump_addresses(netlink, link.ifindex):
        if (address.ip, address.length) == (int(ip), 32):
            present = True
        elif IPv4Address(address.ip) in network:
            changes.append(rtnl.delete_address(link.ifindex, address.ip, address.length))
    if not present:
        changes.append(rtnl.new_address(link.ifindex, int(ip), 32))
    for failure in netlink.batch(changes):
        raise BackendError(f"cannot set the address of {link.name}: {failure}")
