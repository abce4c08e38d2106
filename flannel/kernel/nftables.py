"""Whether rules changed: nftables' own notifications, and its ruleset's generation. Blind to legacy iptables."""

from __future__ import annotations

import errno
import socket
from collections.abc import Collection

from flannel.kernel.netlink import (
    NETLINK_NETFILTER,
    Message,
    Netlink,
    NetlinkError,
    attribute,
    attributes,
    grow_receive_buffer,
    join_group,
    messages,
)

_SUBSYSTEM = 10 << 8
_GETTABLE, _DELTABLE, _NEWCHAIN, _GETCHAIN, _DELCHAIN, _NEWRULE, _DELRULE, _GETGEN = 1, 2, 3, 4, 5, 6, 8, 16
_GROUP = 7
_NFGENMSG = b"\0\0\0\0"


def generation(netlink: Netlink) -> int:
    """The ruleset's generation: another number means that something changed. Raises NetlinkError."""
    for _, payload in netlink.request(Message(_SUBSYSTEM | _GETGEN, 0, _NFGENMSG)):
        return int.from_bytes(attributes(payload, 4).get(1, b""), "big")
    return 0


def exists(netlink: Netlink, version: int, table: str, chain: str = "") -> bool:
    """Whether the kernel has a table, or a chain in it; never raises where nftables is not there at all."""
    header = bytes([socket.AF_INET if version == 4 else socket.AF_INET6]) + _NFGENMSG[1:]
    body = header + attribute(1, table.encode() + b"\0")
    kind = _GETTABLE
    if chain:
        kind, body = _GETCHAIN, body + attribute(3, chain.encode() + b"\0")
    try:
        return bool(netlink.request(Message(_SUBSYSTEM | kind, 0, body)))
    except NetlinkError:
        return False


class RuleWatch:
    """A subscription to changes of rules. Raises OSError where nftables cannot be watched."""

    def __init__(self) -> None:
        flags = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._socket = socket.socket(socket.AF_NETLINK, flags, NETLINK_NETFILTER)
        grow_receive_buffer(self._socket)
        self._socket.bind((0, 0))
        join_group(self._socket, _GROUP)

    def fileno(self) -> int:
        """The descriptor to wait for."""
        return self._socket.fileno()

    def close(self) -> None:
        """End the subscription."""
        self._socket.close()

    def touched(self, chains: Collection[tuple[str, str]]) -> bool:
        """Read what has arrived; whether any of it may concern one of the chains, given as (table, chain)."""
        wanted = {(table.encode(), chain.encode()) for table, chain in chains}
        tables = {table for table, _ in wanted}
        found = False
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                return found
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                found = True
                continue
            found |= any(concerns(kind, payload, wanted, tables) for kind, _, _, payload in messages(data))


def concerns(kind: int, payload: bytes, wanted: Collection[tuple[bytes, bytes]], tables: Collection[bytes]) -> bool:
    """Whether a notification may be about one of the chains (table, chain), or one of the tables."""
    kind &= 0xFF
    if kind in (_NEWRULE, _DELRULE):
        name = 2
    elif kind in (_NEWCHAIN, _DELCHAIN):
        name = 3
    elif kind == _DELTABLE:
        name = 0
    else:
        return False
    found = attributes(payload, 4)
    table = found.get(1, b"").rstrip(b"\0")
    return table in tables if not name else (table, found.get(name, b"").rstrip(b"\0")) in wanted
