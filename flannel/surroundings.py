"""What flannel depends on in its node: the external interface and its addresses, our devices, the underlay's routes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv6Address

from flannel import log
from flannel.backends.base import Backend, BackendError, Facts
from flannel.interface import External, InterfaceError
from flannel.kernel import rtnl
from flannel.kernel.netlink import Netlink, NetlinkError
from flannel.kernel.values import READY, UNICAST, Address
from flannel.lease import Lease


class Surroundings:
    """Looks at what the backend's wishes depend on, and brings its devices up to date.

    `choose_again` chooses the external interface once more, for when its address is gone.
    """

    def __init__(
        self, netlink: Netlink, backend: Backend, external: External, choose_again: Callable[[], External] | None
    ) -> None:
        self._netlink = netlink
        self._backend = backend
        self._choose_again = choose_again
        self._complaint = ""
        self.facts = Facts(external, None, {})
        self.external_flags = -1
        #: Addresses that no peer can have, and why.
        self.no_peers: dict[IPv4Address | IPv6Address, str] = {}

    def refresh(self) -> bool:
        """Bring our device, and what we know of the external interface, up to date; False to be called again."""
        external = self.facts.external
        link = rtnl.get_link(self._netlink, name=external.name)
        if link is None:
            return self._cannot(f"the external interface {external.name} is gone; waiting for it")
        self.external_flags = link.flags & READY
        external = external._replace(ifindex=link.ifindex)
        try:
            external = self._whereabouts(external)
            tunnel = self._backend.device(self._netlink, external)
            tunnel6 = self._backend.device6(self._netlink, external)
        except (BackendError, NetlinkError, InterfaceError) as error:
            return self._cannot(str(error))
        for before in self.facts.tunnels:
            if any(one and one.name == before.name and one.ifindex != before.ifindex for one in (tunnel, tunnel6)):
                log.warning(f"{before.name} was gone; made it again")
        self.facts = Facts(external, tunnel, self.facts.direct, tunnel6)
        self._complaint = ""
        return True

    def _whereabouts(self, external: External) -> External:
        """The external interface with the addresses that it has now. Raises InterfaceError where it has none."""
        here = {}
        self.no_peers.clear()
        for ip in (external.address, external.address6):
            if ip is not None:
                there = rtnl.dump_addresses(self._netlink, external.ifindex, ip.version)
                here[ip.version] = any(one.ip == int(ip) for one in there)
                for one in there:
                    self.no_peers.update(_nobodys(one, type(ip)))
        if self._choose_again is None or all(here.values()):
            return external
        try:
            again = self._choose_again()
            if again.name != external.name:
                raise InterfaceError(f"{external.name} has lost its address {_shown(external)}; waiting for another")
        except InterfaceError:
            if any(here.values()):
                return external  # a link that goes down loses its addresses of IPv6 for a while
            raise
        if again[3:] != external[3:]:
            log.warning(f"this node's address was {_shown(external)} and is {_shown(again)} now")
        return again._replace(ifindex=external.ifindex, mtu=external.mtu)

    def _cannot(self, what: str) -> bool:
        if what != self._complaint:
            log.error(what)
        self._complaint = what
        return False

    def ask_routes(self, leases: Iterable[Lease]) -> None:
        """Ask the kernel which peers it reaches without a gateway."""
        for lease in leases:
            self._ask_route(lease.attrs.public_ip)
            if lease.attrs.public_ip6 is not None:
                self._ask_route(lease.attrs.public_ip6)

    def _ask_route(self, peer: IPv4Address | IPv6Address) -> None:
        try:
            route = rtnl.lookup_route(self._netlink, int(peer), peer.version).route
        except NetlinkError:
            route = None
        if route is not None and route.kind == UNICAST and not route.gateway and route.oif:
            self.facts.direct[peer] = route.oif
        else:
            self.facts.direct.pop(peer, None)


def _nobodys(
    address: Address, ip: type[IPv4Address] | type[IPv6Address]
) -> dict[IPv4Address | IPv6Address, str]:  # fmt: skip
    """Addresses that no peer can have because of one of ours, and why."""
    found: dict[IPv4Address | IPv6Address, str] = {ip(address.ip): "this node's own"}
    if address.version == 4 and address.length < 31:
        rest = (1 << (32 - address.length)) - 1
        found[ip(address.ip | rest)] = found[ip(address.ip & ~rest)] = "that of a whole network"
    return found


def _shown(external: External) -> str:
    return " and ".join(str(ip) for ip in (external.address, external.address6) if ip is not None)
