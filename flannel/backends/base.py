"""What a backend is: for a lease, the kernel state that it wants, computed without touching the kernel."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import NamedTuple

from flannel.interface import External
from flannel.kernel import rtnl
from flannel.kernel.netlink import Netlink, NetlinkError
from flannel.kernel.values import Fdb, Link, Neigh, Route, SeenRoute
from flannel.lease import Lease, LeaseAttrs, Network
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

    `tunnel` is None for a backend without a device, `tunnel6` (what carries IPv6) also without IPv6; they may be one
    device. `direct` maps a peer's address to the interface by which the kernel reaches it without a gateway.
    """

    external: External
    tunnel: Link | None
    direct: dict[IPv4Address | IPv6Address, int]
    tunnel6: Link | None = None

    @property
    def tunnels(self) -> tuple[Link, ...]:
        """Our devices, each once."""
        first, second = self.tunnel, self.tunnel6
        if first is None or second is None or first.ifindex == second.ifindex:
            return tuple(one for one in (first or second,) if one is not None)
        return first, second


class Backend:
    """One way of reaching other nodes' pods; what it does not say is nothing.

    `asks_routes`: its answers depend on how the kernel reaches a peer. `moves`: `device` takes up a changed address of
    the external interface; without that the daemon starts anew.
    """

    name = ""
    mtu = 0
    asks_routes = False
    moves = False

    @property
    def devices(self) -> tuple[str, ...]:
        """The names of the devices that it leaves in the kernel."""
        return ()

    def prepare(self, netlink: Netlink, recorded: Recorded) -> LeaseAttrs:
        """Make what must be there before the lease, and say what to publish with it. Raises BackendError."""
        return self.attrs()

    def attrs(self) -> LeaseAttrs:
        """What is published with the lease now."""
        raise NotImplementedError

    def start(self, netlink: Netlink, lease: Lease) -> None:
        """Take up the own lease: device up and addressed. Raises BackendError."""

    def device(self, netlink: Netlink, external: External) -> Link | None:
        """Make our device as it must be, again if need be, and return it. Raises BackendError."""
        return None

    def device6(self, netlink: Netlink, external: External) -> Link | None:
        """The same for what carries IPv6. Called after `device`."""
        return None

    def wants(self, lease: Lease, facts: Facts) -> Wants:
        """The kernel state for a peer's lease; pure. Raises Ignored."""
        return NOTHING

    def own(self, facts: Facts) -> tuple[Route, ...]:
        """Routes that are wanted whatever the leases are."""
        return ()

    def is_ours(self, seen: SeenRoute, facts: Facts) -> bool:
        """Whether a route that nobody recorded can only be ours."""
        return False

    def update(self, leases: dict[Network, Lease], may_remove: bool) -> None:
        """Learn the peers' leases, where the backend does more with them than `wants` says.

        `may_remove`: whether what none of them wants may go.
        """

    def watched(self) -> int | None:
        """A descriptor to wait for besides rtnetlink's, once it is started; None where there is none."""
        return None

    def noticed(self) -> bool:
        """Read what has come by it; whether everything has to be compared."""
        return False

    def stop(self) -> None:
        """Stop what runs, leave in the kernel what must outlive the daemon."""


#: The least that IPv4 has to be able to send, in bytes.
SMALLEST_MTU = 68


def inner_mtu(outer: int, overhead: int, smallest: int = SMALLEST_MTU) -> int:
    """What a tunnel leaves of an MTU. Raises BackendError where that is too little."""
    if outer - overhead < smallest:
        raise BackendError(f"an MTU of {outer} leaves {outer - overhead} bytes inside the tunnel: too few")
    return outer - overhead


def ensure_up(netlink: Netlink, link: Link, mtu: int) -> Link | None:
    """Give a device its MTU, bring it up, and return it as it is then. Raises BackendError."""
    try:
        if link.mtu != mtu:
            netlink.request(rtnl.change_link(link.ifindex, mtu=mtu))
        if not link.up:
            netlink.request(rtnl.change_link(link.ifindex, up=True))
    except NetlinkError as error:
        raise BackendError(f"cannot bring {link.name} up: {error.strerror}") from None
    return rtnl.get_link(netlink, index=link.ifindex)


def ensure_address(
    netlink: Netlink, link: Link, ip: IPv4Address | IPv6Address, network: IPv4Network | IPv6Network
) -> None:  # fmt: skip
    """Give a device its host address and take other addresses of the Network off it. Raises BackendError."""
    changes = []
    present = False
    version, bits = ip.version, ip.max_prefixlen
    for address in rtnl.dump_addresses(netlink, link.ifindex, version):
        if (address.ip, address.length) == (int(ip), bits):
            present = True
        elif type(ip)(address.ip) in network:
            changes.append(rtnl.delete_address(link.ifindex, address.ip, address.length, version))
    if not present:
        changes.append(rtnl.new_address(link.ifindex, int(ip), bits, version))
    for failure in netlink.batch(changes):
        raise BackendError(f"cannot set the address of {link.name}: {failure}")
