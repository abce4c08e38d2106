"""IPsec policies of the kernel: as values, and as the messages that make, list and remove them."""

from __future__ import annotations

import socket
import struct
from ipaddress import IPv4Address, IPv4Network
from typing import NamedTuple

from flannel.kernel.netlink import Message, Netlink, attribute, attributes

NETLINK_XFRM = 6
IN, OUT, FORWARD = 0, 1, 2
#: What marks flannel's policies and the associations that charon makes for them.
REQID = 11

_DELETE, _GET, _UPDATE = 0x14, 0x15, 0x19
_TEMPLATE = 5
_ESP, _TUNNEL = 50, 1
_SELECTOR = struct.Struct("=16s16sHHHHHBBB3xiI")
_LIMITS = struct.pack("=8Q", *[0xFFFFFFFFFFFFFFFF] * 4, 0, 0, 0, 0)
_TAIL = struct.Struct("=IIBBBB4x")
_INFO = _SELECTOR.size + 64 + 32 + _TAIL.size
_TMPL = struct.Struct("=16sIB3xH2x16sIBBBxIII")
_ID = struct.Struct("=IB3x")


class Policy(NamedTuple):
    """Packets from one subnet to another go in ESP between two nodes."""

    direction: int
    source: IPv4Network
    target: IPv4Network
    near: IPv4Address  # where ESP comes from
    far: IPv4Address  # and goes to


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
