"""IPsec in the kernel: policies and associations as values, the messages for them, and what the kernel tells."""

from __future__ import annotations

import errno
import socket
import struct
from ipaddress import IPv4Address, IPv4Network
from typing import NamedTuple, TypeAlias

from flannel.kernel.netlink import Message, Netlink, attribute, attributes, grow_receive_buffer, messages

NETLINK_XFRM = 6
IN, OUT, FORWARD = 0, 1, 2
#: What marks flannel's policies and the associations that charon makes for them.
REQID = 11

_NEW, _DELETE, _GET, _UPDATE, _FLUSH = 0x13, 0x14, 0x15, 0x19, 0x1D
_DELETE_STATE, _GET_STATE, _FLUSH_STATE = 0x11, 0x12, 0x1C
_TEMPLATE, _POLICY = 5, 7
_GROUPS = 0x4 | 0x8  # XFRMNLGRP_SA, XFRMNLGRP_POLICY
_ESP, _TUNNEL = 50, 1
_SELECTOR = struct.Struct("=16s16sHHHHHBBB3xiI")
_LIMITS = struct.pack("=8Q", *[0xFFFFFFFFFFFFFFFF] * 4, 0, 0, 0, 0)
_TAIL = struct.Struct("=IIBBBB4x")
_INFO = _SELECTOR.size + 64 + 32 + _TAIL.size
_TMPL = struct.Struct("=16sIB3xH2x16sIBBBxIII")
_ID = struct.Struct("=IB3x")
#: A state: selector, target, SPI, protocol, source, limits, counters, sequence number, reqid, family, mode.
_STATE = struct.Struct("=56x16sIB3x16s64x32x12x4xIHB9x")
_STATE_ID = struct.Struct("=16sIHBx")

Packets: TypeAlias = "tuple[int, IPv4Network, IPv4Network]"


class Policy(NamedTuple):
    """Packets from one subnet to another go in ESP between two nodes."""

    direction: int
    source: IPv4Network
    target: IPv4Network
    near: IPv4Address  # where ESP comes from
    far: IPv4Address  # and goes to

    @property
    def packets(self) -> Packets:
        """Direction, source and target: the kernel has one policy for each."""
        return self.direction, self.source, self.target


class Association(NamedTuple):
    """One direction of ESP between two nodes, with keys."""

    near: IPv4Address
    far: IPv4Address
    spi: int


class Change(NamedTuple):
    """What the kernel tells of policies: which packets' (None: all of them), and their policy now, if any is known."""

    packets: Packets | None
    policy: Policy | None


def policies_of(own: IPv4Network, here: IPv4Address, peer: IPv4Network, there: IPv4Address) -> tuple[Policy, ...]:
    """The three policies for a peer."""
    return (
        Policy(OUT, own, peer, here, there),
        Policy(IN, peer, own, there, here),
        Policy(FORWARD, peer, own, there, here),
    )


def _selector(policy: Policy) -> bytes:
    target, source = policy.target, policy.source
    return _SELECTOR.pack(
        target.network_address.packed, source.network_address.packed, 0, 0, 0, 0, socket.AF_INET,
        target.prefixlen, source.prefixlen, 0, 0, 0,
    )  # fmt: skip


def set_policy(policy: Policy) -> Message:
    """Make a policy, or replace the one for the same packets."""
    body = _selector(policy) + _LIMITS + bytes(32) + _TAIL.pack(0, 0, policy.direction, 0, 0, 0)
    every = 0xFFFFFFFF
    template = _TMPL.pack(
        policy.far.packed, 0, _ESP, socket.AF_INET, policy.near.packed, REQID, _TUNNEL, 0, 0, every, every, every
    )  # fmt: skip
    return Message(_UPDATE, 0, body + attribute(_TEMPLATE, template))


def delete_policy(policy: Policy) -> Message:
    """Remove a policy by the packets that it is for."""
    return Message(_DELETE, 0, _selector(policy) + struct.pack("=IB3x", 0, policy.direction))


def parse_policy(payload: bytes) -> Policy | None:
    """A policy of flannel's: ESP in tunnel mode with its mark; None for any other."""
    if len(payload) < _INFO:
        return None
    target, source, _, _, _, _, family, target_length, source_length, *_ = _SELECTOR.unpack_from(payload)
    direction = payload[_INFO - _TAIL.size + 8]
    template = attributes(payload, _INFO).get(_TEMPLATE, b"")
    if family != socket.AF_INET or len(template) != _TMPL.size:
        return None
    far, _, protocol, _, near, reqid, mode, *_ = _TMPL.unpack(template)
    if (protocol, reqid, mode) != (_ESP, REQID, _TUNNEL):
        return None
    return Policy(
        direction, IPv4Network((source[:4], source_length)), IPv4Network((target[:4], target_length)),
        IPv4Address(near[:4]), IPv4Address(far[:4]),
    )  # fmt: skip


def dump_policies(netlink: Netlink) -> list[Policy]:
    """Flannel's policies. Raises NetlinkError where the kernel has no IPsec."""
    return [one for row in netlink.dump(_GET, b"") if (one := parse_policy(row)) is not None]


def parse_association(payload: bytes) -> Association | None:
    """An association of flannel's: ESP in tunnel mode with its mark and keys; None for any other."""
    if len(payload) < _STATE.size:
        return None
    far, spi, protocol, near, reqid, family, mode = _STATE.unpack_from(payload)
    if (family, protocol, reqid, mode) != (socket.AF_INET, _ESP, REQID, _TUNNEL) or not spi:
        return None
    return Association(IPv4Address(near[:4]), IPv4Address(far[:4]), socket.ntohl(spi))


def dump_associations(netlink: Netlink) -> list[Association]:
    """Flannel's associations. Raises NetlinkError where the kernel has no IPsec."""
    return [one for row in netlink.dump(_GET_STATE, b"") if (one := parse_association(row)) is not None]


def delete_association(association: Association) -> Message:
    """Remove an association."""
    body = _STATE_ID.pack(association.far.packed, socket.htonl(association.spi), socket.AF_INET, _ESP)
    return Message(_DELETE_STATE, 0, body)


# -- what the kernel tells ---------------------------------------------------------------------------------------------


def _packets_of(selector: bytes, direction: int) -> Packets | None:
    """What a policy is for; None where that is not IPv4."""
    if len(selector) < _SELECTOR.size:
        return None
    target, source, _, _, _, _, family, target_length, source_length, *_ = _SELECTOR.unpack_from(selector)
    if family != socket.AF_INET or target_length > 32 or source_length > 32:
        return None
    return (
        direction, IPv4Network((source[:4], source_length), strict=False),
        IPv4Network((target[:4], target_length), strict=False),
    )  # fmt: skip


def parse_change(kind: int, payload: bytes) -> Change | None:
    """What a notification says of policies; None where it says nothing of IPv4's."""
    if kind == _FLUSH:
        return Change(None, None)
    if kind in (_NEW, _UPDATE) and len(payload) >= _INFO:
        packets = _packets_of(payload, payload[_INFO - _TAIL.size + 8])
        return Change(packets, parse_policy(payload)) if packets else None
    if kind == _DELETE and len(payload) >= _SELECTOR.size + _ID.size:
        _, direction = _ID.unpack_from(payload, _SELECTOR.size)
        # One that was removed by its index is told of by that alone, with the policy as an attribute.
        told = attributes(payload, _SELECTOR.size + _ID.size).get(_POLICY, payload)
        packets = _packets_of(told, direction)
        return Change(packets, None) if packets else None
    return None


class Monitor:
    """A subscription to what happens to policies and associations, without blocking."""

    def __init__(self) -> None:
        flags = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._socket = socket.socket(socket.AF_NETLINK, flags, NETLINK_XFRM)
        grow_receive_buffer(self._socket)
        self._socket.bind((0, _GROUPS))

    def fileno(self) -> int:
        """The descriptor to wait for."""
        return self._socket.fileno()

    def close(self) -> None:
        """End the subscription."""
        self._socket.close()

    def read(self) -> tuple[list[Change], bool]:
        """What happened to policies, and whether associations went. Lost notifications count as both."""
        changes: list[Change] = []
        gone = False
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                return changes, gone
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                changes, gone = [Change(None, None)], True
                continue
            for kind, _, _, payload in messages(data):
                gone |= kind in (_DELETE_STATE, _FLUSH_STATE)
                change = parse_change(kind, payload)
                if change is not None:
                    changes.append(change)
