"""alloc: a subnet for the node, and nothing else; how packets get to other nodes is somebody else's business."""

from __future__ import annotations

from ipaddress import IPv4Network

from flannel import log
from flannel.backends.base import NOTHING, Facts, Wants
from flannel.interface import External
from flannel.kernel.netlink import Netlink
from flannel.kernel.rtnl import Link, Route, SeenRoute
from flannel.lease import Lease, LeaseAttrs
from flannel.netconf import NetConf, unread_keys
from flannel.state import Recorded


class AllocBackend:
    """See flannel-behaviour.md, section 3.8."""

    name = "alloc"
    asks_routes = False

    def __init__(self, conf: NetConf, external: External) -> None:
        self.mtu = external.mtu
        self._external = external
        for note in unread_keys(conf, ()):
            log.warning(note)

    def prepare(self, netlink: Netlink, recorded: Recorded) -> LeaseAttrs:
        """Nothing is needed before the lease."""
        recorded.note_device("", b"")
        return self.attrs()

    def attrs(self) -> LeaseAttrs:
        """What is published: the address alone, as upstream does."""
        return LeaseAttrs(self._external.public)

    def start(self, netlink: Netlink, lease: Lease) -> None:
        """There is no device."""

    def device(self, netlink: Netlink, external: External) -> Link | None:
        """There is no device."""
        return None

    def wants(self, lease: Lease, facts: Facts) -> Wants:
        """Nothing."""
        return NOTHING

    def own(self, facts: Facts) -> tuple[Route, ...]:
        """No routes."""
        return ()

    def is_ours(self, seen: SeenRoute, facts: Facts) -> bool:
        """Nothing is ours."""
        return False

    def update(self, leases: dict[IPv4Network, Lease]) -> None:
        """Nobody asks for the peers."""

    def stop(self) -> None:
        """Nothing runs."""
