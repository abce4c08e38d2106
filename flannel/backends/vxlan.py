"""vxlan: a tunnel device; per peer a neighbour, an FDB entry and a route, or just a route where the peer is near."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

from flannel import log
from flannel.backends.base import NOTHING, Backend, BackendError, Facts, Ignored, Wants, inner_mtu
from flannel.backends.vxlandevice import Settings, VxlanDevice
from flannel.interface import External
from flannel.kernel.netlink import Netlink
from flannel.kernel.values import METRIC6, UNICAST, Fdb, Link, Neigh, Route, SeenRoute
from flannel.lease import Lease, LeaseAttrs
from flannel.netconf import NetConf, backend_bool, backend_int, unread_keys
from flannel.state import Recorded

_KEYS = ("VNI", "Port", "MTU", "GBP", "Learning", "DirectRouting")
#: Outer IPv4, UDP and vxlan headers and the inner Ethernet header, in bytes.
OVERHEAD = 50
#: By how much an outer IPv6 header is longer than an IPv4 one.
LONGER6 = 20
SMALLEST_MTU6 = 1280


class VxlanBackend(Backend):
    """See flannel-behaviour.md, section 3.1."""

    name = "vxlan"
    moves = True

    def __init__(self, conf: NetConf, external: External) -> None:
        self._network = conf.network
        self._vni = backend_int(conf, "VNI", 1, 0, 0xFFFFFF)
        self._port = backend_int(conf, "Port", 0, 0, 0xFFFF)
        self._gbp = backend_bool(conf, "GBP")
        self._learning = backend_bool(conf, "Learning")
        self.asks_routes = backend_bool(conf, "DirectRouting")
        self.mtu = inner_mtu(backend_int(conf, "MTU", external.mtu, 0, 0xFFFF), OVERHEAD)
        alone6 = conf.network.version == 6
        for note in unread_keys(conf, _KEYS):
            log.warning(note)
        log.info(
            f"VXLAN config: VNI={self._vni} Port={self._port} GBP={self._gbp} Learning={self._learning} "
            f"DirectRouting={self.asks_routes}"
        )
        self._external = external
        settings = Settings(self._vni, self._port, self._gbp, self._learning, self.mtu)
        # FLANNEL_MTU stays as upstream's; senders learn of the smaller one from the device of IPv6.
        settings6 = settings._replace(mtu=self.mtu - LONGER6)
        dual = conf.ipv6_network is not None and external.public6 is not None
        if (alone6 or dual) and settings6.mtu < SMALLEST_MTU6:
            raise BackendError(f"an MTU of {self.mtu + OVERHEAD} leaves IPv6 {settings6.mtu} bytes: too few")
        name, name6 = f"flannel.{self._vni}", f"flannel-v6.{self._vni}"
        self._device = VxlanDevice(name6 if alone6 else name, settings6 if alone6 else settings, conf.network)
        self._device6: VxlanDevice | None = None
        if conf.ipv6_network is not None and external.public6 is not None:
            self._device6 = VxlanDevice(name6, settings6, conf.ipv6_network)
        self._recorded = Recorded()

    # -- device ----------------------------------------------------------------------------------------------------

    @property
    def devices(self) -> tuple[str, ...]:
        """One for each IP version."""
        return tuple(device.name for device in (self._device, self._device6) if device)

    def prepare(self, netlink: Netlink, recorded: Recorded) -> LeaseAttrs:
        """Make the devices, for their addresses are part of the lease."""
        self._recorded = recorded
        # The record does not outlive a reboot, but peers know the MAC address that was published.
        known = all(name in recorded.devices for name in self.devices)
        published = None if known else recorded.published()
        if published is not None and published.backend_type != self.name:
            published = None
        for device, version in ((self._device, 4), (self._device6, 6)):
            if device is None:
                continue
            device.mac = recorded.devices.get(device.name, b"")
            if not device.mac and published is not None:
                device.mac = _mac_of(published.backend_data if version == 4 else published.backend_data6) or b""
        self.device(netlink, self._external)
        self.device6(netlink, self._external)
        return self.attrs()

    def attrs(self) -> LeaseAttrs:
        """What is published with the lease: VNI and the devices' addresses."""
        data = {"VNI": self._vni, "VtepMAC": self._device.mac.hex(":")}
        if self._device6 is None:
            return LeaseAttrs(self._external.public, "vxlan", data)
        data6 = {"VNI": self._vni, "VtepMAC": self._device6.mac.hex(":")}
        return LeaseAttrs(self._external.public, "vxlan", data, self._external.public6, data6)

    def start(self, netlink: Netlink, lease: Lease) -> None:
        """Address the devices and bring them up."""
        self._device.subnet = lease.subnet
        self.device(netlink, self._external)
        if self._device6 is not None:
            if lease.subnet6 is None:
                raise BackendError("IPv6 is enabled, but the lease has no IPv6 subnet")
            self._device6.subnet = lease.subnet6
            self.device6(netlink, self._external)

    def device(self, netlink: Netlink, external: External) -> Link | None:
        """The device with its address, up, and with the MAC address that the lease says."""
        self._external = external
        link = self._device.ensure(netlink, external.ifindex, external.public)
        self._recorded.note_device(self._device.name, link.mac)
        return link

    def device6(self, netlink: Netlink, external: External) -> Link | None:
        """The same for IPv6."""
        if self._device6 is None or external.public6 is None:
            return None
        link = self._device6.ensure(netlink, external.ifindex, external.public6)
        self._recorded.note_device(self._device6.name, link.mac)
        return link

    # -- desired state ---------------------------------------------------------------------------------------------

    def wants(self, lease: Lease, facts: Facts) -> Wants:
        """Neighbour, FDB entry and route of a peer; a plain route where it is direct."""
        attrs = lease.attrs
        if attrs.backend_type != "vxlan":
            raise Ignored(f"its backend is {attrs.backend_type or 'udp or none'!r}, not vxlan")
        wanted = self._wants_of(lease.subnet, attrs.public_ip, attrs.backend_data, facts, facts.tunnel)
        if self._device6 is None or lease.subnet6 is None or attrs.public_ip6 is None:
            return wanted
        more = self._wants_of(lease.subnet6, attrs.public_ip6, attrs.backend_data6, facts, facts.tunnel6)
        return Wants(wanted.neighbours + more.neighbours, wanted.fdb + more.fdb, wanted.routes + more.routes)

    def _wants_of(
        self, subnet: IPv4Network | IPv6Network, peer: IPv4Address | IPv6Address, data: Any, facts: Facts,
        tunnel: Link | None,
    ) -> Wants:  # fmt: skip
        mac = _mac_of(data)
        if mac is None:
            raise Ignored(f"its data holds no usable VtepMAC: {log.quoted(data)}")
        dst, length, version = int(subnet.network_address), subnet.prefixlen, subnet.version
        metric = 0 if version == 4 else METRIC6
        if self.asks_routes and peer in facts.direct:
            return Wants(routes=(Route(dst, length, int(peer), facts.direct[peer], False, UNICAST, metric, version),))
        if tunnel is None:
            return NOTHING
        index = tunnel.ifindex
        return Wants(
            (Neigh(index, dst, mac, version),),
            (Fdb(index, mac, int(peer), version),),
            (Route(dst, length, dst, index, True, UNICAST, metric, version),),
        )

    def is_ours(self, seen: SeenRoute, facts: Facts) -> bool:
        """A route out of our device that leads into the Network, or has the form that only flannel gives routes."""
        route = seen.route
        if not seen.plain or all(route.oif != tunnel.ifindex for tunnel in facts.tunnels):
            return False
        form = route.onlink and route.gateway == route.dst
        inside = route.version == 4 and self._network.version == 4 and IPv4Address(route.dst) in self._network
        return form or inside


def _mac_of(data: Any) -> bytes | None:
    text = data.get("VtepMAC") if isinstance(data, dict) else None
    try:
        mac = bytes.fromhex(text.replace(":", "").replace("-", "")) if isinstance(text, str) else b""
    except ValueError:
        mac = b""
    if len(mac) != 6 or mac[0] & 1 or not any(mac):
        return None
    return mac
