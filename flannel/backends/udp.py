"""udp: a TUN device and a socket, and this process in between; for kernels that have nothing better."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import sys
import threading
from ipaddress import IPv4Network

from flannel import log
from flannel.backends.base import NOTHING, Backend, BackendError, Facts, Wants, ensure_address, ensure_up, inner_mtu
from flannel.backends.udpoffload import OFFLOADS
from flannel.backends.udpproxy import Proxy, Table
from flannel.interface import External
from flannel.kernel import rtnl
from flannel.kernel.netlink import Netlink, grow_receive_buffer
from flannel.kernel.values import Link, Route, SeenRoute
from flannel.lease import Lease, LeaseAttrs, Network
from flannel.netconf import NetConf, backend_int, unread_keys
from flannel.state import Recorded

#: Outer IPv4 and UDP headers, in bytes.
OVERHEAD = 28
_TUN = "/dev/net/tun"
_TUNSETIFF, _TUNGETFEATURES, _TUNSETOFFLOAD = 0x400454CA, 0x800454CF, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x1, 0x1000, 0x4000
_REQUEST = struct.Struct("16sH22x")


class UdpBackend(Backend):
    """See flannel-behaviour.md, section 3.4."""

    name = "udp"

    def __init__(self, conf: NetConf, external: External) -> None:
        self._network = conf.network
        self._port = backend_int(conf, "Port", 8285, 1, 0xFFFF)
        for note in unread_keys(conf, ("Port",)):
            log.warning(note)
        self.mtu = inner_mtu(external.mtu, OVERHEAD)
        self._external = external
        self._subnet: Network | None = None
        self._socket: socket.socket | None = None
        self._proxy: Proxy | None = None
        self._ifindex = 0
        self._offload = False
        self._peers: dict[IPv4Network, tuple[str, int]] = {}

    def prepare(self, netlink: Netlink, recorded: Recorded) -> LeaseAttrs:
        """Nothing is needed before the lease."""
        return self.attrs()

    def attrs(self) -> LeaseAttrs:
        """What is published: the address alone, as upstream does."""
        return LeaseAttrs(self._external.public)

    def start(self, netlink: Netlink, lease: Lease) -> None:
        """Bind the socket and make the device."""
        log.warning("udp: every packet goes through this process; that is for debugging, and for kernels without vxlan")
        self._subnet = lease.subnet
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        address = str(self._external.address)
        try:
            self._socket.bind((address, self._port))
            grow_receive_buffer(self._socket)
        except OSError as error:
            raise BackendError(f"cannot bind UDP {address}:{self._port}: {error.strerror}") from None
        self.device(netlink, self._external)

    def device(self, netlink: Netlink, external: External) -> Link | None:
        """The TUN device with its address, up; made again, with a proxy of its own, where somebody deleted it."""
        assert self._subnet is not None
        link = rtnl.get_link(netlink, index=self._ifindex) if self._ifindex else None
        if link is None:
            link = self._open(netlink)
        ensure_address(netlink, link, self._subnet.network_address, self._network)
        return ensure_up(netlink, link, self.mtu)

    def _open(self, netlink: Netlink) -> Link:
        assert self._socket is not None
        assert self._subnet is not None
        try:
            tun = os.open(_TUN, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise BackendError(f"cannot open {_TUN}: {error.strerror}; the udp backend needs a TUN device") from None
        try:
            name = self._make(tun)
        except OSError as error:
            os.close(tun)
            raise BackendError(f"cannot make a TUN device: {error.strerror}") from None
        link = rtnl.get_link(netlink, name=name)
        if link is None:
            os.close(tun)
            raise BackendError(f"{name} went away while it was made")
        self._answer_from_own_address(name)
        self._ifindex = link.ifindex
        log.info(f"Created {name}, MTU {self.mtu}, UDP port {self._port}")
        self._replace_proxy(tun)
        return link

    def _make(self, tun: int) -> str:
        """Make the device, one that takes and gives large packets where the kernel has that, and return its name."""
        features = fcntl.ioctl(tun, _TUNGETFEATURES, bytes(4))
        self._offload = bool(int.from_bytes(features, sys.byteorder) & _IFF_VNET_HDR)
        flags = _IFF_TUN | _IFF_NO_PI | (_IFF_VNET_HDR if self._offload else 0)
        answer = fcntl.ioctl(tun, _TUNSETIFF, _REQUEST.pack(b"flannel%d", flags))
        if self._offload:
            try:
                fcntl.ioctl(tun, _TUNSETOFFLOAD, OFFLOADS)
            except OSError as error:
                log.info(f"the TUN device hands over packets one by one: {error.strerror}")
        return str(_REQUEST.unpack(answer)[0].rstrip(b"\0").decode())

    def _answer_from_own_address(self, name: str) -> None:
        """Let the kernel take our ICMP errors from the device: they come from the device's own address."""
        try:
            with open(f"/proc/sys/net/ipv4/conf/{name}/accept_local", "w") as file:
                file.write("1")
        except OSError as error:
            log.warning(f"pods will not be told of addresses of no node: accept_local of {name}: {error.strerror}")

    def _replace_proxy(self, tun: int) -> None:
        assert self._socket is not None
        assert self._subnet is not None
        if self._proxy is not None:
            # The thread that takes packets in goes on with the same socket; only its device changes.
            os.dup2(tun, self._proxy.tun, inheritable=False)
            os.close(tun)
        else:
            own = int(self._subnet.network_address), int(self._subnet.netmask)
            self._proxy = Proxy(tun, self._socket, own, offload=self._offload)
            threading.Thread(target=self._proxy.take_in, name="udp-in", daemon=True).start()
        arguments = (self._proxy, self._ifindex)
        threading.Thread(target=self._send_out, args=arguments, name="udp-out", daemon=True).start()

    def _send_out(self, proxy: Proxy, ifindex: int) -> None:
        """Carry packets out for as long as the device is there: where another is made, another thread is started."""
        try:
            proxy.send_out()
        except OSError as error:
            if error.errno in (errno.EBADFD, errno.EFAULT):
                return  # the device was deleted, and the reconciler sees that
            log.error(f"cannot read from the TUN device, making it again: {error.strerror}")
            netlink = Netlink()
            netlink.batch([rtnl.delete_link(ifindex)])
            netlink.close()

    def wants(self, lease: Lease, facts: Facts) -> Wants:
        """Nothing of the kernel: packets are moved here. What backend the peer names is not looked at, as upstream."""
        return NOTHING

    def own(self, facts: Facts) -> tuple[Route, ...]:
        """One route for the whole Network."""
        if facts.tunnel is None:
            return ()
        return (Route(int(self._network.network_address), self._network.prefixlen, 0, facts.tunnel.ifindex),)

    def is_ours(self, seen: SeenRoute, facts: Facts) -> bool:
        """Nothing of ours outlives the device."""
        return False

    def update(self, leases: dict[Network, Lease], may_remove: bool) -> None:
        """Take over who has which subnet; all peers are spoken to on our own port."""
        peers = {
            subnet: (str(lease.attrs.public_ip), self._port)
            for subnet, lease in leases.items()
            if isinstance(subnet, IPv4Network)
        }
        if self._proxy is not None and peers != self._peers:
            self._peers = peers
            self._proxy.table = Table(peers)
