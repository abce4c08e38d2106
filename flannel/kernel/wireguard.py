"""WireGuard devices by generic netlink: key, port and peers, as values and as messages."""

from __future__ import annotations

import errno
import socket
import struct
import sys
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import NamedTuple, TypeAlias

from flannel.kernel.netlink import Message, Netlink, NetlinkError, attribute, attributes

NETLINK_GENERIC = 16
KEY_BYTES = 32

_CONTROLLER, _GET_FAMILY, _FAMILY_ID, _FAMILY_NAME = 16, 3, 1, 2
_GENERIC = struct.Struct("=BBxx")
_GET_DEVICE, _SET_DEVICE, _VERSION = 0, 1, 1
_NESTED = 0x8000
# WGDEVICE_A_*
_IFNAME, _PRIVATE_KEY, _PUBLIC_KEY, _LISTEN_PORT, _PEERS = 2, 3, 4, 6, 8
# WGPEER_A_*
_PEER_KEY, _PSK, _PEER_FLAGS, _ENDPOINT, _KEEPALIVE, _ALLOWED_IPS = 1, 2, 3, 4, 5, 9
_REMOVE_ME, _REPLACE_ALLOWED_IPS = 1, 2
# WGALLOWEDIP_A_*
_IP_FAMILY, _IP_ADDRESS, _IP_LENGTH = 1, 2, 3
_SOCKADDR4, _SOCKADDR6 = struct.Struct("=H2s4s8x"), struct.Struct("=H2sI16sI")
_U16, _U32 = struct.Struct("=H"), struct.Struct("=I")
#: So many peers go into one message, whose attributes cannot be longer than 64 KiB.
_PEERS_A_MESSAGE = 100

Endpoint: TypeAlias = "tuple[IPv4Address | IPv6Address, int]"


class Peer(NamedTuple):
    """A peer. `psk` is None where there is none, `keepalive` in seconds, 0 for never."""

    key: bytes
    endpoint: Endpoint | None
    allowed: frozenset[IPv4Network | IPv6Network]
    keepalive: int = 0
    psk: bytes | None = None


class Device(NamedTuple):
    """A device's own key (empty where it has none), its port and its peers by key."""

    private_key: bytes
    public_key: bytes
    port: int
    peers: dict[bytes, Peer]


def _elements(data: bytes) -> Iterator[bytes]:
    """The elements of a nested list, in order."""
    start = 0
    while start + 4 <= len(data):
        length = _U16.unpack_from(data, start)[0]
        if length < 4 or start + length > len(data):
            return
        yield data[start + 4 : start + length]
        start += (length + 3) & ~3


# -- writing -----------------------------------------------------------------------------------------------------------


def pack_endpoint(endpoint: Endpoint) -> bytes:
    """A sockaddr."""
    address, port = endpoint
    if address.version == 4:
        return _SOCKADDR4.pack(socket.AF_INET, port.to_bytes(2, "big"), address.packed)
    return _SOCKADDR6.pack(socket.AF_INET6, port.to_bytes(2, "big"), 0, address.packed, 0)


def pack_peer(peer: Peer, *, remove: bool = False) -> bytes:
    """A peer's attributes: its allowed addresses become exactly these, or it goes."""
    flags = _REMOVE_ME if remove else _REPLACE_ALLOWED_IPS
    body = attribute(_PEER_KEY, peer.key) + attribute(_PEER_FLAGS, _U32.pack(flags))
    if remove:
        return body
    body += attribute(_PSK, peer.psk or bytes(KEY_BYTES))
    if peer.endpoint is not None:
        body += attribute(_ENDPOINT, pack_endpoint(peer.endpoint))
    body += attribute(_KEEPALIVE, _U16.pack(peer.keepalive))
    allowed = b""
    for network in sorted(peer.allowed, key=str):
        family = socket.AF_INET if network.version == 4 else socket.AF_INET6
        one = attribute(_IP_FAMILY, _U16.pack(family)) + attribute(_IP_ADDRESS, network.network_address.packed)
        allowed += attribute(_NESTED, one + attribute(_IP_LENGTH, bytes([network.prefixlen])))
    return body + attribute(_ALLOWED_IPS | _NESTED, allowed)


def device_body(name: str, *, private_key: bytes = b"", port: int = 0, peers: Iterable[bytes] = ()) -> bytes:
    """The body of a change of a device: what is not given stays."""
    body = _GENERIC.pack(_SET_DEVICE, _VERSION) + attribute(_IFNAME, name.encode() + b"\0")
    if private_key:
        body += attribute(_PRIVATE_KEY, private_key)
    if port:
        body += attribute(_LISTEN_PORT, _U16.pack(port))
    packed = b"".join(attribute(_NESTED, peer) for peer in peers)
    return body + (attribute(_PEERS | _NESTED, packed) if packed else b"")


# -- reading -----------------------------------------------------------------------------------------------------------


def _read_endpoint(data: bytes) -> Endpoint | None:
    if len(data) >= _SOCKADDR4.size and _U16.unpack_from(data)[0] == socket.AF_INET:
        return IPv4Address(data[4:8]), int.from_bytes(data[2:4], "big")
    if len(data) >= _SOCKADDR6.size and _U16.unpack_from(data)[0] == socket.AF_INET6:
        return IPv6Address(data[8:24]), int.from_bytes(data[2:4], "big")
    return None


def _read_peer(data: bytes) -> Peer:
    found = attributes(data)
    allowed = set()
    for element in _elements(found.get(_ALLOWED_IPS, b"")):
        one = attributes(element)
        address, length = one.get(_IP_ADDRESS, b""), int.from_bytes(one.get(_IP_LENGTH, b""), sys.byteorder)
        if len(address) in (4, 16) and length <= 8 * len(address):
            allowed.add(ip_network((address, length), strict=False))
    psk = found.get(_PSK, b"")
    return Peer(
        found.get(_PEER_KEY, b""),
        _read_endpoint(found.get(_ENDPOINT, b"")),
        frozenset(allowed),
        int.from_bytes(found.get(_KEEPALIVE, b""), sys.byteorder),
        psk if any(psk) else None,
    )


def read_device(payloads: Iterable[bytes]) -> Device:
    """Put a device together from its dump: a peer with many allowed addresses is told in several messages."""
    first: dict[int, bytes] = {}
    peers: dict[bytes, Peer] = {}
    for payload in payloads:
        found = attributes(payload, _GENERIC.size)
        first = first or found
        for element in _elements(found.get(_PEERS, b"")):
            peer = _read_peer(element)
            known = peers.get(peer.key)
            peers[peer.key] = known._replace(allowed=known.allowed | peer.allowed) if known else peer
    private, public = first.get(_PRIVATE_KEY, b""), first.get(_PUBLIC_KEY, b"")
    port = int.from_bytes(first.get(_LISTEN_PORT, b""), sys.byteorder)
    return Device(private if any(private) else b"", public if any(public) else b"", port, peers)


# -- asking ------------------------------------------------------------------------------------------------------------


class Wireguard:
    """The kernel's WireGuard. Raises NetlinkError where it has none."""

    def __init__(self) -> None:
        self._netlink = Netlink(NETLINK_GENERIC)
        body = _GENERIC.pack(_GET_FAMILY, 1) + attribute(_FAMILY_NAME, b"wireguard\0")
        (_, payload), *_ = self._netlink.request(Message(_CONTROLLER, 0, body))
        self._family = _U16.unpack(attributes(payload, _GENERIC.size)[_FAMILY_ID])[0]

    def get(self, name: str) -> Device | None:
        """A device; None where no WireGuard device has that name. Raises NetlinkError."""
        body = _GENERIC.pack(_GET_DEVICE, _VERSION) + attribute(_IFNAME, name.encode() + b"\0")
        try:
            return read_device(self._netlink.dump(self._family, body))
        except NetlinkError as error:
            if error.errno not in (errno.ENODEV, errno.EOPNOTSUPP):
                raise
            return None

    def configure(self, name: str, private_key: bytes, port: int) -> None:
        """Give a device its key and port; its peers stay. Raises NetlinkError."""
        self._netlink.request(Message(self._family, 0, device_body(name, private_key=private_key, port=port)))

    def change_peers(self, name: str, wanted: Iterable[Peer], gone: Iterable[bytes]) -> None:
        """Set peers, then remove others: addresses move from one to the other without a gap. Raises NetlinkError."""
        packed = [pack_peer(peer) for peer in wanted]
        packed += [pack_peer(Peer(key, None, frozenset()), remove=True) for key in gone]
        for start in range(0, len(packed), _PEERS_A_MESSAGE):
            part = packed[start : start + _PEERS_A_MESSAGE]
            self._netlink.request(Message(self._family, 0, device_body(name, peers=part)))
