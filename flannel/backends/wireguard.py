"""wireguard: encrypted tunnels; one route for the whole Network, and for each node a peer that has its subnet."""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Address, IPv6Network
from typing import Any, NamedTuple

from flannel import log
from flannel.backends.base import (
    NOTHING,
    SMALLEST_MTU,
    Backend,
    BackendError,
    Facts,
    Ignored,
    Wants,
    ensure_address,
    inner_mtu,
)
from flannel.interface import External
from flannel.kernel import rtnl
from flannel.kernel.netlink import Netlink, NetlinkError
from flannel.kernel.rtnl import SCOPE_LINK
from flannel.kernel.values import METRIC6, UNICAST, Link, Route, SeenRoute
from flannel.kernel.wireguard import KEY_BYTES, Endpoint, Peer, Wireguard
from flannel.lease import Address, Lease, LeaseAttrs, Network
from flannel.netconf import NetConf, NetConfError, backend_int, unread_keys
from flannel.state import Recorded

_KEYS = ("ListenPort", "ListenPortV6", "MTU", "PSK", "PersistentKeepaliveInterval", "Mode")
_MODES = ("separate", "auto", "ipv4", "ipv6")
#: Outer IPv6, UDP and WireGuard's own headers and tag, in bytes; upstream takes it for IPv4 as well.
OVERHEAD = 80
DEVICE, DEVICE6 = "flannel-wg", "flannel-wg-v6"
KEY_FILE, KEY_VARIABLE = "/run/flannel/wgkey", "WIREGUARD_KEY_FILE"
_SMALLEST_MTU6 = 1280


class Own(NamedTuple):
    """One of our devices: which IP versions' packets it carries, and its port."""

    name: str
    carries: tuple[int, ...]
    port: int


class WireguardBackend(Backend):
    """See flannel-behaviour.md, section 3.5. The devices outlive the daemon, as vxlan's do."""

    name = "wireguard"
    moves = True

    def __init__(self, conf: NetConf, external: External) -> None:
        self._networks: dict[int, IPv4Network | IPv6Network] = {conf.network.version: conf.network}
        if conf.ipv6_network is not None:
            self._networks[6] = conf.ipv6_network
        self._port = backend_int(conf, "ListenPort", 51820, 1, 0xFFFF)
        self._port6 = backend_int(conf, "ListenPortV6", 51821, 1, 0xFFFF)
        self._keepalive = backend_int(conf, "PersistentKeepaliveInterval", 0, 0, 0xFFFF)
        self._mode = conf.backend.get("mode", "separate")
        if self._mode not in _MODES:
            raise NetConfError(f"Backend.Mode is {self._mode!r}, not one of {', '.join(_MODES)}")
        self._alone6 = conf.network.version == 6
        if self._alone6 and self._mode == "ipv4":
            raise NetConfError("Backend.Mode is 'ipv4': without EnableIPv4 no node is spoken to by IPv4")
        self._psk = read_key(conf.backend.get("psk") or None, "Backend.PSK") if conf.backend.get("psk") else None
        smallest = _SMALLEST_MTU6 if 6 in self._networks else SMALLEST_MTU
        self.mtu = inner_mtu(backend_int(conf, "MTU", external.mtu, 0, 0xFFFF), OVERHEAD, smallest)
        for note in unread_keys(conf, _KEYS):
            log.warning(note)
        self._external = external
        self._own_devices = self._devices_of_mode()
        self._wireguard: Wireguard | None = None
        self._private = b""
        self._public = b""
        self._subnets: dict[int, IPv4Network | IPv6Network] = {}
        self._recorded = Recorded()
        # The peers that we gave each device, and the devices whose peers have to be looked up all the same.
        self._given: dict[str, dict[bytes, Peer]] = {}
        self._unsure: set[str] = set()
        self._told: dict[Network, str] = {}

    def _devices_of_mode(self) -> tuple[Own, ...]:
        if self._mode != "separate":
            return (Own(DEVICE, tuple(self._networks), self._port),)
        both = (Own(DEVICE, (4,), self._port), Own(DEVICE6, (6,), self._port6))
        return tuple(one for one in both if one.carries[0] in self._networks)

    @property
    def devices(self) -> tuple[str, ...]:
        """One device, or one for each IP version."""
        return tuple(one.name for one in self._own_devices)

    # -- devices -------------------------------------------------------------------------------------------------------

    def prepare(self, netlink: Netlink, recorded: Recorded) -> LeaseAttrs:
        """Make the devices: the public key is part of the lease, and the kernel makes it from ours."""
        self._recorded = recorded
        path = os.environ.get(KEY_VARIABLE) or KEY_FILE
        self._private = load_private_key(path)
        for own in self._own_devices:
            self._ensure(netlink, own)
        return self.attrs()

    def attrs(self) -> LeaseAttrs:
        """What is published: the public key, and the port of each IP version."""
        key = base64.b64encode(self._public).decode()
        # In one device for both there is one port; upstream publishes another one, which is closed.
        port6 = self._port6 if self._mode == "separate" else self._port
        data, data6 = {"PublicKey": key, "Port": self._port}, {"PublicKey": key, "Port": port6}
        if len(self._networks) == 1:
            return LeaseAttrs(self._external.public, self.name, data6 if self._alone6 else data)
        return LeaseAttrs(self._external.public, self.name, data, self._external.public6, data6)

    def start(self, netlink: Netlink, lease: Lease) -> None:
        """Address the devices and bring them up."""
        self._subnets = {lease.subnet.version: lease.subnet}
        if lease.subnet6 is not None and 6 in self._networks:
            self._subnets[6] = lease.subnet6
        self.device(netlink, self._external)
        self.device6(netlink, self._external)

    def device(self, netlink: Netlink, external: External) -> Link | None:
        """The device of IPv4's packets; of IPv6's where there are no others."""
        self._external = external
        self._unsure.update(self.devices)
        return self._ensure(netlink, self._own_devices[0])

    def device6(self, netlink: Netlink, external: External) -> Link | None:
        """The device of IPv6's packets beside IPv4's, which may be the same."""
        carrying = [own for own in self._own_devices if 6 in own.carries and not self._alone6]
        return self._ensure(netlink, carrying[0]) if carrying else None

    def _ensure(self, netlink: Netlink, own: Own) -> Link:
        link = rtnl.get_link(netlink, name=own.name)
        if link is not None and link.kind != "wireguard":
            raise BackendError(
                f"{own.name} is there, but is no wireguard device: remove it by `ip link del {own.name}`"
            )
        if link is None:
            link = self._create(netlink, own)
        self._configure(own)
        self._recorded.note_device(own.name, b"")
        try:
            if link.mtu != self.mtu:
                netlink.request(rtnl.change_link(link.ifindex, mtu=self.mtu))
            for version in own.carries:
                if version in self._subnets:
                    base = self._subnets[version].network_address
                    ensure_address(netlink, link, base, self._networks[version])
            if self._subnets and not link.up:
                netlink.request(rtnl.change_link(link.ifindex, up=True))
        except NetlinkError as error:
            raise BackendError(f"cannot bring {own.name} up: {error.strerror}") from None
        return rtnl.get_link(netlink, index=link.ifindex) or link

    def _create(self, netlink: Netlink, own: Own) -> Link:
        try:
            netlink.request(rtnl.new_plain(own.name, "wireguard", self.mtu))
        except NetlinkError as error:
            hint = "; does the kernel have wireguard (modprobe wireguard)?" if "upported" in str(error) else ""
            raise BackendError(f"cannot make the wireguard device {own.name}: {error.strerror}{hint}") from None
        link = rtnl.get_link(netlink, name=own.name)
        if link is None:
            raise BackendError(f"{own.name} went away while it was made")
        log.info(f"Created {own.name}: UDP port {own.port}, MTU {self.mtu}")
        return link

    def _configure(self, own: Own) -> None:
        """Give a device our key and port where it has others."""
        try:
            if self._wireguard is None:
                self._wireguard = Wireguard()
            device = self._wireguard.get(own.name)
            if device is None or device.private_key != self._private or device.port != own.port:
                self._wireguard.configure(own.name, self._private, own.port)
                device = self._wireguard.get(own.name)
        except NetlinkError as error:
            raise BackendError(f"cannot configure {own.name} with UDP port {own.port}: {error.strerror}") from None
        if device is None or not device.public_key:
            raise BackendError(f"{own.name} went away while it was made")
        self._public = device.public_key

    # -- desired state -------------------------------------------------------------------------------------------------

    def wants(self, lease: Lease, facts: Facts) -> Wants:
        """No routes of its own: that a peer has this subnet is said to the device, by `update`."""
        if lease.attrs.backend_type != self.name:
            raise Ignored(f"its backend is {lease.attrs.backend_type or 'udp or none'!r}, not wireguard")
        if read_peer_data(lease.attrs.backend_data, 0)[0] == self._public:
            raise Ignored("its public key is this node's own")
        for own in self._own_devices:
            self._peer(own, lease)
        return NOTHING

    def own(self, facts: Facts) -> tuple[Route, ...]:
        """One route for each whole Network."""
        found = []
        for version, tunnel in ((4, facts.tunnel), (6, facts.tunnel if self._alone6 else facts.tunnel6)):
            network = self._networks.get(version)
            if network is not None and tunnel is not None:
                scope, metric = (SCOPE_LINK, 0) if version == 4 else (0, METRIC6)
                base, length = int(network.network_address), network.prefixlen
                found.append(Route(base, length, 0, tunnel.ifindex, False, UNICAST, metric, version, scope))
        return tuple(found)

    def is_ours(self, seen: SeenRoute, facts: Facts) -> bool:
        """A route out of our device that leads into the Network: an earlier run's, of another Network."""
        return seen.plain and not seen.route.gateway and any(seen.route.oif == one.ifindex for one in facts.tunnels)

    # -- peers ---------------------------------------------------------------------------------------------------------

    def update(self, leases: dict[Network, Lease], may_remove: bool) -> None:
        """Make the devices' peers those of the leases."""
        if self._wireguard is None:
            return
        wanted = self._wanted_peers(leases)
        for own in self._own_devices:
            try:
                self._update_device(own, wanted[own.name], may_remove)
            except NetlinkError as error:
                self._unsure.add(own.name)
                log.error(f"cannot set the peers of {own.name}: {error.strerror}")

    def _update_device(self, own: Own, wanted: Mapping[bytes, Peer], may_remove: bool) -> None:
        assert self._wireguard is not None
        given = self._given.get(own.name, {})
        there: Mapping[bytes, Peer] = given
        if own.name in self._unsure:
            device = self._wireguard.get(own.name)
            there = device.peers if device else {}
        changed = [peer for key, peer in wanted.items() if not _is_as_wanted(there.get(key), given.get(key), peer)]
        # What we gave goes with its lease; what an earlier run gave needs evidence.
        gone = [key for key in there if key not in wanted and (may_remove or key in given)]
        if changed or gone:
            self._wireguard.change_peers(own.name, changed, gone)
        self._given[own.name] = dict(wanted)
        self._unsure.discard(own.name)

    def _wanted_peers(self, leases: Mapping[Network, Lease]) -> dict[str, dict[bytes, Peer]]:
        wanted: dict[str, dict[bytes, Peer]] = {own.name: {} for own in self._own_devices}
        holders: dict[bytes, Network] = {}
        told, self._told = self._told, {}
        for subnet, lease in leases.items():
            if lease.attrs.backend_type != self.name:
                continue
            try:
                for own in self._own_devices:
                    peer = self._peer(own, lease)
                    if peer is None:
                        continue
                    if holders.setdefault(peer.key, subnet) != subnet:
                        raise Ignored(f"its public key is that of {holders[peer.key]}")
                    wanted[own.name][peer.key] = peer
            except Ignored as reason:
                if told.get(subnet) != str(reason):
                    log.warning(f"ignoring the lease of {subnet} from {lease.attrs.public_ip}: {reason}")
                self._told[subnet] = str(reason)
        return wanted

    def _peer(self, own: Own, lease: Lease) -> Peer | None:
        """The peer that a lease is on one of our devices; None where it has nothing for it. Raises Ignored."""
        attrs = lease.attrs
        subnets: dict[int, Network | None] = {6: lease.subnet6, lease.subnet.version: lease.subnet}
        allowed = frozenset(one for version in own.carries if (one := subnets.get(version)) is not None)
        by = own.carries[0] if self._mode == "separate" else self._family(attrs)
        is_first = by == 4 or self._alone6
        address = attrs.public_ip if is_first else attrs.public_ip6
        data = attrs.backend_data if is_first else attrs.backend_data6
        if not allowed or address is None:
            return None
        key, port = read_peer_data(data if data is not None else attrs.backend_data, own.port)
        if key == self._public:
            raise Ignored("its public key is this node's own")
        endpoint: Endpoint = (address, port)
        return Peer(key, endpoint, allowed, self._keepalive, self._psk)

    def _family(self, attrs: LeaseAttrs) -> int:
        """By which IP version a peer is spoken to where one device carries both."""
        if self._mode in ("ipv4", "ipv6"):
            return int(self._mode[-1])
        ours, theirs = self._external.public6, attrs.public_ip6
        if theirs is None or ours is None or not _is_private(attrs.public_ip):
            return 4
        return 4 if _is_unique_local(theirs) or _is_unique_local(ours) else 6


def _is_private(address: Address) -> bool:
    return any(address in IPv4Network(one) for one in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"))


def _is_unique_local(address: IPv6Address) -> bool:
    return address in IPv6Network("fc00::/7")


def _is_as_wanted(there: Peer | None, given: Peer | None, wanted: Peer) -> bool:
    """Whether a peer needs no change. One that roams keeps the address that it was heard from last."""
    if there is None or there._replace(endpoint=None) != wanted._replace(endpoint=None):
        return False
    roams = given is not None and given.endpoint == wanted.endpoint and there.endpoint is not None
    return roams or there.endpoint == wanted.endpoint


# -- keys --------------------------------------------------------------------------------------------------------------


def read_key(text: Any, what: str) -> bytes:
    """Read a key as wireguard's tools write it. Raises NetConfError that names `what`, without the key."""
    try:
        key = base64.b64decode(text.strip() if isinstance(text, str) else "", validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise NetConfError(f"{what} is not {KEY_BYTES} bytes in base64, such as `wg genkey` prints")
    return key


def read_peer_data(data: Any, port: int) -> tuple[bytes, int]:
    """A peer's public key, and its port, `port` where it names none. Raises Ignored."""
    fields = {name.lower(): value for name, value in data.items()} if isinstance(data, dict) else {}
    try:
        key = read_key(fields.get("publickey"), "key")
    except NetConfError:
        raise Ignored(f"its data holds no usable PublicKey: {log.quoted(data)}") from None
    theirs = fields.get("port", 0)
    if not isinstance(theirs, int) or isinstance(theirs, bool) or not 0 <= theirs <= 0xFFFF:
        raise Ignored(f"its data holds no usable Port: {log.quoted(data)}")
    if not any(key):
        raise Ignored("its PublicKey is all zeros")
    return key, theirs or port


def load_private_key(path: str) -> bytes:
    """The node's own key: the file's, which is made where there is none. Raises BackendError."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return _clamped(read_key(file.read(), f"the key in {path}"))
    except FileNotFoundError:
        pass
    except (OSError, NetConfError) as error:
        raise BackendError(f"cannot use the private key {path}: {error}") from None
    key = _clamped(os.urandom(KEY_BYTES))
    temporary = f"{path}.{os.urandom(4).hex()}"
    try:
        os.makedirs(os.path.dirname(path) or ".", mode=0o755, exist_ok=True)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400), "wb") as output:
            output.write(base64.b64encode(key))
        os.rename(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise BackendError(f"cannot write the private key {path}: {error.strerror}") from None
    return key


def _clamped(key: bytes) -> bytes:
    """The key as the kernel keeps it, so that it can be compared."""
    return bytes([key[0] & 248, *key[1:31], key[31] & 127 | 64])
