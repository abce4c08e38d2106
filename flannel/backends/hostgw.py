"""host-gw: a route to each peer's subnet by the peer itself, for nodes that share a link."""

from __future__ import annotations

from ipaddress import IPv4Network

from flannel import log
from flannel.backends.base import BackendError, Facts, Ignored, Wants
from flannel.interface import External
from flannel.kernel.netlink import Netlink
from flannel.kernel.rtnl import Link, Route, SeenRoute
from flannel.lease import Lease, LeaseAttrs
from flannel.netconf import NetConf, unread_keys
from flannel.state import Recorded


class HostGwBackend:
    """See flannel-behaviour.md, section 3.2."""

    name = "host-gw"
    asks_routes = False

    def __init__(self, conf: NetConf, external: External) -> None:
        if external.public != external.address:
            raise BackendError(
                f"host-gw sends pods' packets to the peers' own addresses: the external address {external.public} must "
                f"be the one of {external.name}, {external.address}, so it does not work across NAT"
            )
        for note in unread_keys(conf, ()):
            log.warning(note)
        self.mtu = external.mtu
        self._attrs = LeaseAttrs(external.public, "host-gw")

    def prepare(self, netlink: Netlink, recorded: Recorded) -> LeaseAttrs:
        """Nothing is needed before the lease."""
        recorded.note_device("", b"")
        return self._attrs

    def start(self, netlink: Netlink, lease: Lease) -> None:
        """There is no device."""

    def device(self, netlink: Netlink, external: External) -> Link | None:
        """There is no device."""
        return None

    def attrs(self) -> LeaseAttrs:
        """What is published with the lease."""
        return self._attrs

    def wants(self, lease: Lease, facts: Facts) -> Wants:
        """A route by the peer's address; the kernel refuses it where the peer is not on the link."""
        if lease.attrs.backend_type != self.name:
            raise Ignored(f"its backend is {lease.attrs.backend_type or 'udp or none'!r}, not host-gw")
        gateway = int(lease.attrs.public_ip)
        dst, length = int(lease.subnet.network_address), lease.subnet.prefixlen
        return Wants(routes=(Route(dst, length, gateway, facts.external.ifindex),))

    def own(self, facts: Facts) -> tuple[Route, ...]:
        """No route but the peers'."""
        return ()

    def is_ours(self, seen: SeenRoute, facts: Facts) -> bool:
        """Nothing tells such a route from an operator's: only what was recorded is ours."""
        return False

    def update(self, leases: dict[IPv4Network, Lease]) -> None:
        """The kernel moves the packets."""

    def stop(self) -> None:
        """Routes stay."""
