"""What the kernel says about links, addresses, neighbours and routes while the daemon runs."""

from __future__ import annotations

import errno
import socket
import struct
from typing import NamedTuple

from flannel.kernel import rtnl
from flannel.kernel.netlink import NETLINK_ROUTE, grow_receive_buffer, leave_out, messages
from flannel.kernel.values import Address, Link, SeenEntry, SeenRoute

_GROUPS = 0x1 | 0x4 | 0x10 | 0x40  # RTMGRP_LINK, RTMGRP_NEIGH, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE
_GROUPS6 = 0x100 | 0x400  # RTMGRP_IPV6_IFADDR, RTMGRP_IPV6_ROUTE
_RECEIVE = 1 << 16


class Change(NamedTuple):
    """One notification: the message's type, and what it is about."""

    kind: int
    what: Link | Address | SeenEntry | SeenRoute


class Monitor:
    """A subscription to rtnetlink's multicast groups, without blocking.

    New routes and neighbours that the socket of port `without_echo_of` made are left out by the kernel itself.
    """

    def __init__(self, *, ipv6: bool = False, without_echo_of: int = 0) -> None:
        flags = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._socket = socket.socket(socket.AF_NETLINK, flags, NETLINK_ROUTE)
        grow_receive_buffer(self._socket)
        if without_echo_of:
            leave_out(self._socket, (rtnl.NEWROUTE, rtnl.NEWNEIGH), without_echo_of)
        self._buffer = memoryview(bytearray(_RECEIVE))
        self._socket.bind((0, _GROUPS | (_GROUPS6 if ipv6 else 0)))

    def fileno(self) -> int:
        """The descriptor to wait for."""
        return self._socket.fileno()

    def close(self) -> None:
        """End the subscription."""
        self._socket.close()

    def read(self, limit: int = 512) -> tuple[list[Change], bool]:
        """Return what has arrived, at most about `limit` of it, and whether the kernel lost notifications."""
        changes: list[Change] = []
        lost = False
        while len(changes) < limit:
            try:
                data = bytes(self._buffer[: self._socket.recv_into(self._buffer)])
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                lost = True
                continue
            for kind, _, _, payload in messages(data):
                change = decode(kind, payload)
                if change is not None:
                    changes.append(change)
        return changes, lost


def decode(kind: int, payload: bytes) -> Change | None:
    """What a notification says; None for what is of no interest, or cannot be read."""
    try:
        return _decode(kind, payload)
    except (struct.error, IndexError):
        return None


def _decode(kind: int, payload: bytes) -> Change | None:
    if kind in (rtnl.NEWNEIGH, rtnl.DELNEIGH):
        return Change(kind, rtnl.parse_entry(payload))
    if kind in (rtnl.NEWROUTE, rtnl.DELROUTE):
        route = rtnl.parse_route(payload)
        return Change(kind, route) if route.table == rtnl.MAIN_TABLE else None
    if kind in (rtnl.NEWADDR, rtnl.DELADDR):
        return Change(kind, rtnl.parse_address(payload))
    if kind in (rtnl.NEWLINK, rtnl.DELLINK):
        # A bridge tells about its ports in messages of its own family; they say nothing about the link itself.
        return Change(kind, rtnl.parse_link(payload)) if payload[0] == socket.AF_UNSPEC else None
    return None
