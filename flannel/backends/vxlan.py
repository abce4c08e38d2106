"""vxlan: a tunnel device; per peer a neighbour, an FDB entry and a route, or just a route where the peer is near."""

from __future__ import annotations

import errno
import os
from ipaddress import IPv4Address, IPv4Network

from flannel import log
from flannel.backends.base import NOTHING, Backend, BackendError, Facts, Ignored, Wants, ensure_address
from flannel.interface import External
from flannel.kernel import rtnl
from flannel.kernel.netlink import Netlink, NetlinkError
from flannel.kernel.rtnl import Fdb, Link, Neigh, Route, SeenRoute
from flannel.lease import Lease, LeaseAttrs
from flannel.netconf import NetConf, backend_bool, backend_int, unread_keys
from flannel.state import Recorded

_KEYS = ("VNI", "Port", "MTU", "GBP", "Learning", "DirectRouting")
#: Outer IPv4, UDP and vxlan headers and the inner Ethernet header, in bytes.
OVERHEAD = 50
_KERNEL_PORT = 8472
_SMALLEST_MTU = 68


class VxlanBackend(Backend):
    """See flannel-behaviour.md, section 3.1."""

    name = "vxlan"

    def __init__(self, conf: NetConf, external: External) -> None:
        self._network = conf.network
        self._vni = backend_int(conf, "VNI", 1, 0, 0xFFFFFF)
        self._port = backend_int(conf, "Port", 0, 0, 0xFFFF)
        self._gbp = backend_bool(conf, "GBP")
        self._learning = backend_bool(conf, "Learning")
        self.asks_routes = backend_bool(conf, "DirectRouting")
        self.mtu = backend_int(conf, "MTU", external.mtu, 0, 0xFFFF) - OVERHEAD
        if self.mtu < _SMALLEST_MTU:
            raise BackendError(f"an MTU of {self.mtu + OVERHEAD} leaves {self.mtu} bytes inside the tunnel: too few")
        for note in unread_keys(conf, _KEYS):
            log.warning(note)
        log.info(
            f"VXLAN config: VNI={self._vni} Port={self._port} GBP={self._gbp} Learning={self._learning} "
            f"DirectRouting={self.asks_routes}"
        )
        self._external = external
        self._device = f"flannel.{self._vni}"
        self._mac = b""
        self._recorded = Recorded()
        self._subnet: IPv4Network | None = None

    # -- device ----------------------------------------------------------------------------------------------------

    def prepare(self, netlink: Netlink, recorded: Recorded) -> LeaseAttrs:
        """Make the device, for its address is part of the lease."""
        self._recorded = recorded
        if recorded.device == self._device:
            self._mac = recorded.mac
        elif recorded.published is not None and recorded.published.backend_type == self.name:
            # The record does not outlive a reboot, but peers know the MAC address that was published.
            self._mac = _mac_of(recorded.published) or b""
        self._ensure_link(netlink, self._external)
        return self.attrs()

    def attrs(self) -> LeaseAttrs:
        """What is published with the lease: VNI and the device's address."""
        mac = self._mac.hex(":")
        return LeaseAttrs(self._external.public, "vxlan", {"VNI": self._vni, "VtepMAC": mac})

    def start(self, netlink: Netlink, lease: Lease) -> None:
        """Address the device and bring it up."""
        self._subnet = lease.subnet
        self.device(netlink, self._external)

    def device(self, netlink: Netlink, external: External) -> Link | None:
        """The device with its address, up, and with the MAC address that the lease says."""
        self._external = external
        link = self._ensure_link(netlink, external)
        if self._subnet is None:
            return link
        ensure_address(netlink, link, self._subnet.network_address, self._network)
        if not link.up:
            self._bring_up(netlink, link)
            again = rtnl.get_link(netlink, index=link.ifindex)
            if again is None or again.mac != self._mac:
                raise BackendError(f"something changed the MAC address of {self._device}, such as a udev policy")
            link = again
        return link

    def _bring_up(self, netlink: Netlink, link: Link) -> None:
        try:
            netlink.request(rtnl.change_link(link.ifindex, up=True))
        except NetlinkError as error:
            hint = ""
            if error.errno == errno.EADDRINUSE:
                hint = f"; another socket or vxlan device holds UDP port {self._port or _KERNEL_PORT}"
            raise BackendError(f"cannot bring {self._device} up: {error.strerror}{hint}") from None

    def _ensure_link(self, netlink: Netlink, external: External) -> Link:
        link = rtnl.get_link(netlink, name=self._device)
        wanted = rtnl.Vxlan(
            self._vni, external.ifindex, int(external.public), self._port, self._learning, self._gbp
        )  # fmt: skip
        if link is not None and not self._compatible(link, wanted):
            log.warning(f"{self._device} is there with other settings; making it anew")
            self._mac = self._mac or (link.mac if link.kind == "vxlan" else b"")
            netlink.batch([rtnl.delete_link(link.ifindex)])
            link = None
        link = self._create(netlink, wanted) if link is None else self._adjust(netlink, link)
        self._mac = link.mac
        self._recorded.note_device(self._device, self._mac)
        return link

    def _compatible(self, link: Link, wanted: rtnl.Vxlan) -> bool:
        there = link.vxlan
        return there is not None and there._replace(learning=wanted.learning) == wanted._replace(
            port=wanted.port or _KERNEL_PORT
        )

    def _create(self, netlink: Netlink, wanted: rtnl.Vxlan) -> Link:
        self._mac = self._mac or random_mac()
        try:
            netlink.request(rtnl.new_vxlan(self._device, wanted, self.mtu, self._mac))
        except NetlinkError as error:
            raise BackendError(f"cannot make the vxlan device {self._device}: {error.strerror}") from None
        try:
            with open(f"/proc/sys/net/ipv6/conf/{self._device}/accept_ra", "w") as file:
                file.write("0")
        except OSError:
            log.debug(f"accept_ra of {self._device} stays as it is: no IPv6, or /proc/sys cannot be written")
        link = rtnl.get_link(netlink, name=self._device)
        if link is None:
            raise BackendError(f"{self._device} went away while it was made")
        if link.mac != self._mac:
            raise BackendError(f"{self._device} came up with another MAC address than it was given")
        log.info(f"Created {self._device}: MAC {link.mac.hex(':')}, MTU {link.mtu}")
        return link

    def _adjust(self, netlink: Netlink, link: Link) -> Link:
        """Bring what can be changed in place to what is wanted: MTU, learning, a MAC address that was tampered with."""
        changes = []
        if link.mtu != self.mtu:
            log.info(f"{self._device}: MTU {link.mtu} -> {self.mtu}")
            changes.append(rtnl.change_link(link.ifindex, mtu=self.mtu))
        if link.vxlan and link.vxlan.learning != self._learning:
            log.info(f"{self._device}: learning {'on' if self._learning else 'off'}")
            changes.append(rtnl.change_learning(link.ifindex, self._vni, self._learning))
        if self._subnet is not None and link.mac != self._mac:
            log.warning(f"{self._device}: somebody changed its MAC address to {link.mac.hex(':')}; changing it back")
            changes.append(rtnl.change_link(link.ifindex, mac=self._mac))
        if not changes:
            return link
        for failure in netlink.batch(changes):
            log.error(f"cannot change {self._device}: {failure}")
        return rtnl.get_link(netlink, index=link.ifindex) or link

    # -- desired state ---------------------------------------------------------------------------------------------

    def wants(self, lease: Lease, facts: Facts) -> Wants:
        """Neighbour, FDB entry and route of a peer; a plain route where it is direct."""
        if lease.attrs.backend_type != "vxlan":
            raise Ignored(f"its backend is {lease.attrs.backend_type or 'udp or none'!r}, not vxlan")
        mac = _mac_of(lease.attrs)
        if mac is None:
            raise Ignored(f"its data holds no usable VtepMAC: {lease.attrs.backend_data!r}")
        dst, length = int(lease.subnet.network_address), lease.subnet.prefixlen
        peer = int(lease.attrs.public_ip)
        if self.asks_routes and lease.attrs.public_ip in facts.direct:
            return Wants(routes=(Route(dst, length, peer, facts.direct[lease.attrs.public_ip]),))
        if facts.tunnel is None:
            return NOTHING
        index = facts.tunnel.ifindex
        return Wants((Neigh(index, dst, mac),), (Fdb(index, mac, peer),), (Route(dst, length, dst, index, True),))

    def is_ours(self, seen: SeenRoute, facts: Facts) -> bool:
        """A route out of our device that leads into the Network, or has the form that only flannel gives routes."""
        if facts.tunnel is None or seen.route.oif != facts.tunnel.ifindex or not seen.plain:
            return False
        form = seen.route.onlink and seen.route.gateway == seen.route.dst
        return form or IPv4Address(seen.route.dst) in self._network


def _mac_of(attrs: LeaseAttrs) -> bytes | None:
    data = attrs.backend_data
    text = data.get("VtepMAC") if isinstance(data, dict) else None
    try:
        mac = bytes.fromhex(text.replace(":", "").replace("-", "")) if isinstance(text, str) else b""
    except ValueError:
        mac = b""
    if len(mac) != 6 or mac[0] & 1 or not any(mac):
        return None
    return mac


def random_mac() -> bytes:
    """A random, locally administered, unicast address."""
    octets = bytearray(os.urandom(6))
    octets[0] = octets[0] & 0xFC | 0x02
    return bytes(octets)
