"""ipip: one tunnel device for all peers; the route's gateway says which of them a packet goes to."""

from __future__ import annotations

from ipaddress import IPv4Address

from flannel import log
from flannel.backends.base import (
    NOTHING,
    Backend,
    BackendError,
    Facts,
    Ignored,
    Wants,
    ensure_address,
    ensure_up,
    inner_mtu,
)
from flannel.interface import External
from flannel.kernel import rtnl
from flannel.kernel.netlink import Netlink, NetlinkError
from flannel.kernel.values import Ipip, Link, Route, SeenRoute
from flannel.lease import Lease, LeaseAttrs, Network
from flannel.netconf import NetConf, backend_bool, unread_keys
from flannel.state import Recorded

#: The outer IPv4 header, in bytes.
OVERHEAD = 20
DEVICE = "flannel.ipip"


class IpipBackend(Backend):
    """See flannel-behaviour.md, section 3.3."""

    name = "ipip"
    moves = True

    def __init__(self, conf: NetConf, external: External) -> None:
        self._network = conf.network
        self.asks_routes = backend_bool(conf, "DirectRouting")
        self.mtu = inner_mtu(external.mtu, OVERHEAD)
        for note in unread_keys(conf, ("DirectRouting",)):
            log.warning(note)
        self._external = external
        self._subnet: Network | None = None
        self._recorded = Recorded()

    @property
    def devices(self) -> tuple[str, ...]:
        """The one device."""
        return (DEVICE,)

    # -- device ----------------------------------------------------------------------------------------------------

    def prepare(self, netlink: Netlink, recorded: Recorded) -> LeaseAttrs:
        """Nothing is needed before the lease."""
        self._recorded = recorded
        return self.attrs()

    def attrs(self) -> LeaseAttrs:
        """What is published with the lease."""
        return LeaseAttrs(self._external.public, self.name)

    def start(self, netlink: Netlink, lease: Lease) -> None:
        """Make the device."""
        self._subnet = lease.subnet
        self.device(netlink, self._external)

    def device(self, netlink: Netlink, external: External) -> Link | None:
        """The device with its address, up; made again where it is another's way."""
        if self._subnet is None:
            return None
        self._external = external
        local = int(external.address)
        link = rtnl.get_link(netlink, name=DEVICE)
        if link is not None and link.kind != "ipip":
            raise BackendError(f"{DEVICE} is there, but is no ipip tunnel: remove it by `ip link del {DEVICE}`")
        if link is not None and link.ipip != Ipip(local, 0):
            log.warning(f"{DEVICE} is there with other settings; making it anew")
            netlink.batch([rtnl.delete_link(link.ifindex)])
            link = None
        if link is None:
            link = self._create(netlink, local)
        ensure_address(netlink, link, self._subnet.network_address, self._network)
        return ensure_up(netlink, link, self.mtu)

    def _create(self, netlink: Netlink, local: int) -> Link:
        try:
            netlink.request(rtnl.new_ipip(DEVICE, local, self.mtu))
        except NetlinkError as error:
            hint = "; does the kernel have ipip (modprobe ipip)?" if "upported" in str(error) else ""
            raise BackendError(f"cannot make the ipip device {DEVICE}: {error.strerror}{hint}") from None
        link = rtnl.get_link(netlink, name=DEVICE)
        if link is None:
            raise BackendError(f"{DEVICE} went away while it was made")
        self._recorded.note_device(DEVICE, b"")
        log.info(f"Created {DEVICE}: local {IPv4Address(local)}, MTU {self.mtu}")
        return link

    # -- desired state ---------------------------------------------------------------------------------------------

    def wants(self, lease: Lease, facts: Facts) -> Wants:
        """A route by the peer's own address: through the tunnel, or by the link that both are on."""
        if lease.attrs.backend_type != self.name:
            raise Ignored(f"its backend is {lease.attrs.backend_type or 'udp or none'!r}, not ipip")
        dst, length = int(lease.subnet.network_address), lease.subnet.prefixlen
        peer = int(lease.attrs.public_ip)
        if self.asks_routes and lease.attrs.public_ip in facts.direct:
            return Wants(routes=(Route(dst, length, peer, facts.direct[lease.attrs.public_ip], True),))
        if facts.tunnel is None:
            return NOTHING
        return Wants(routes=(Route(dst, length, peer, facts.tunnel.ifindex, True),))

    def is_ours(self, seen: SeenRoute, facts: Facts) -> bool:
        """A route out of our device that only flannel makes: onlink, by a gateway."""
        if facts.tunnel is None or seen.route.oif != facts.tunnel.ifindex or not seen.plain:
            return False
        return (seen.route.onlink and seen.route.gateway != 0) or IPv4Address(seen.route.dst) in self._network
