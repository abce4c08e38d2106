"""host-gw: a route to each peer's subnet by the peer itself, for nodes that share a link."""

from __future__ import annotations

from flannel import log
from flannel.backends.base import Backend, BackendError, Facts, Ignored, Wants
from flannel.interface import External
from flannel.kernel.netlink import Netlink
from flannel.kernel.values import METRIC6, UNICAST, Link, Route
from flannel.lease import Lease, LeaseAttrs
from flannel.netconf import NetConf, unread_keys


class HostGwBackend(Backend):
    """See flannel-behaviour.md, section 3.2."""

    name = "host-gw"
    moves = True

    def __init__(self, conf: NetConf, external: External) -> None:
        self._take_up(external)
        for note in unread_keys(conf, ()):
            log.warning(note)
        self.mtu = external.mtu

    def _take_up(self, external: External) -> None:
        if external.public != external.address:
            raise BackendError(
                f"host-gw sends pods' packets to the peers' own addresses: the external address {external.public} must "
                f"be the one of {external.name}, {external.address}, so it does not work across NAT"
            )
        self._attrs = LeaseAttrs(external.public, "host-gw", public_ip6=external.public6)

    def device(self, netlink: Netlink, external: External) -> Link | None:
        """There is none; the address may be another one by now."""
        self._take_up(external)
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
        version = lease.subnet.version
        metric = METRIC6 if version == 6 else 0
        routes = (Route(dst, length, gateway, facts.external.ifindex, False, UNICAST, metric, version),)
        if facts.external.public6 is None or lease.subnet6 is None or lease.attrs.public_ip6 is None:
            return Wants(routes=routes)
        gateway6, dst6 = int(lease.attrs.public_ip6), int(lease.subnet6.network_address)
        length6, index = lease.subnet6.prefixlen, facts.external.ifindex
        return Wants(routes=(*routes, Route(dst6, length6, gateway6, index, False, UNICAST, METRIC6, 6)))
