"""A vxlan device: made, kept as it must be, and made again with its MAC address."""

from __future__ import annotations

import errno
import os
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import NamedTuple

from flannel import log
from flannel.backends.base import BackendError, ensure_address
from flannel.kernel import rtnl
from flannel.kernel.netlink import Netlink, NetlinkError
from flannel.kernel.values import Link, Vxlan

_KERNEL_PORT = 8472


class Settings(NamedTuple):
    """What the configuration says of the device; a `port` of 0 leaves it to the kernel. `mtu` is in bytes."""

    vni: int
    port: int
    gbp: bool
    learning: bool
    mtu: int


class VxlanDevice:
    """The device of one IP version. `mac` is its address as it is published, empty before it is known."""

    def __init__(self, name: str, settings: Settings, network: IPv4Network | IPv6Network) -> None:
        self.name = name
        self.mac = b""
        self._settings = settings
        self._network = network
        self.subnet: IPv4Network | IPv6Network | None = None

    def ensure(self, netlink: Netlink, index: int, local: IPv4Address | IPv6Address) -> Link:
        """The device on that interface, from that address; once there is a subnet also addressed, and up.

        Raises BackendError.
        """
        link = self._ensure_link(netlink, index, local)
        if self.subnet is None:
            return link
        ensure_address(netlink, link, self.subnet.network_address, self._network)
        if not link.up:
            self._bring_up(netlink, link)
            again = rtnl.get_link(netlink, index=link.ifindex)
            if again is None or again.mac != self.mac:
                raise BackendError(f"something changed the MAC address of {self.name}, such as a udev policy")
            link = again
        return link

    def _bring_up(self, netlink: Netlink, link: Link) -> None:
        try:
            netlink.request(rtnl.change_link(link.ifindex, up=True))
        except NetlinkError as error:
            hint = ""
            if error.errno == errno.EADDRINUSE:
                hint = f"; another socket or vxlan device holds UDP port {self._settings.port or _KERNEL_PORT}"
            raise BackendError(f"cannot bring {self.name} up: {error.strerror}{hint}") from None

    def _ensure_link(self, netlink: Netlink, index: int, local: IPv4Address | IPv6Address) -> Link:
        link = rtnl.get_link(netlink, name=self.name)
        vni, port, gbp, learning, _ = self._settings
        wanted = Vxlan(vni, index, int(local), port, learning, gbp, version=local.version)
        if link is not None and not self._compatible(link, wanted):
            log.warning(f"{self.name} is there with other settings; making it anew")
            self.mac = self.mac or (link.mac if link.kind == "vxlan" else b"")
            netlink.batch([rtnl.delete_link(link.ifindex)])
            link = None
        link = self._create(netlink, wanted) if link is None else self._adjust(netlink, link)
        self.mac = link.mac
        return link

    def _compatible(self, link: Link, wanted: Vxlan) -> bool:
        there = link.vxlan
        return there is not None and there._replace(learning=wanted.learning) == wanted._replace(
            port=wanted.port or _KERNEL_PORT
        )

    def _create(self, netlink: Netlink, wanted: Vxlan) -> Link:
        self.mac = self.mac or random_mac()
        try:
            netlink.request(rtnl.new_vxlan(self.name, wanted, self._settings.mtu, self.mac))
        except NetlinkError as error:
            raise BackendError(f"cannot make the vxlan device {self.name}: {error.strerror}") from None
        try:
            with open(f"/proc/sys/net/ipv6/conf/{self.name}/accept_ra", "w") as file:
                file.write("0")
        except OSError:
            log.debug(f"accept_ra of {self.name} stays as it is: no IPv6, or /proc/sys cannot be written")
        link = rtnl.get_link(netlink, name=self.name)
        if link is None:
            raise BackendError(f"{self.name} went away while it was made")
        if link.mac != self.mac:
            raise BackendError(f"{self.name} came up with another MAC address than it was given")
        log.info(f"Created {self.name}: MAC {link.mac.hex(':')}, MTU {link.mtu}")
        return link

    def _adjust(self, netlink: Netlink, link: Link) -> Link:
        """Bring what can be changed in place to what is wanted: MTU, learning, a MAC address that was tampered with."""
        changes = []
        if link.mtu != self._settings.mtu:
            log.info(f"{self.name}: MTU {link.mtu} -> {self._settings.mtu}")
            changes.append(rtnl.change_link(link.ifindex, mtu=self._settings.mtu))
        if link.vxlan and link.vxlan.learning != self._settings.learning:
            log.info(f"{self.name}: learning {'on' if self._settings.learning else 'off'}")
            changes.append(rtnl.change_learning(link.ifindex, self._settings.vni, self._settings.learning))
        if self.subnet is not None and link.mac != self.mac:
            log.warning(f"{self.name}: somebody changed its MAC address to {link.mac.hex(':')}; changing it back")
            changes.append(rtnl.change_link(link.ifindex, mac=self.mac))
        if not changes:
            return link
        for failure in netlink.batch(changes):
            log.error(f"cannot change {self.name}: {failure}")
        return rtnl.get_link(netlink, index=link.ifindex) or link


def random_mac() -> bytes:
    """A random, locally administered, unicast address."""
    octets = bytearray(os.urandom(6))
    octets[0] = octets[0] & 0xFC | 0x02
    return bytes(octets)
