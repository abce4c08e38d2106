"""Links, addresses, neighbours, FDB entries and routes as values: what is wanted of the kernel, and what it shows."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

UNICAST, BLACKHOLE = 1, 6
#: What the kernel makes of a route of IPv6 without a metric.
METRIC6 = 1024
PROTOCOL_BOOT = 3
IFF_UP, IFF_LOWER_UP, IFF_RUNNING = 0x1, 0x10000, 0x40
#: Whether packets can leave by a link at all.
READY = IFF_UP | IFF_LOWER_UP | IFF_RUNNING


class Vxlan(NamedTuple):
    """What makes a vxlan device what it is; addresses as integers, `group` is its default destination."""

    vni: int
    link: int
    local: int
    port: int
    learning: bool
    gbp: bool
    group: int = 0
    l2miss: bool = False
    version: int = 4


class Ipip(NamedTuple):
    """What makes an ipip device what it is; addresses as integers, a `remote` of 0 for any."""

    local: int
    remote: int


class Link(NamedTuple):
    """A network interface as the kernel shows it."""

    ifindex: int
    name: str
    mtu: int
    mac: bytes
    flags: int
    kind: str
    vxlan: Vxlan | None
    master: int = 0
    ipip: Ipip | None = None

    @property
    def up(self) -> bool:
        """Whether it is administratively up."""
        return bool(self.flags & IFF_UP)

    @property
    def shape(self) -> tuple[object, ...]:
        """What of a tunnel device has to stay as we made it."""
        return self.up, self.mtu, self.mac, self.vxlan, self.ipip


class Address(NamedTuple):
    """An address of an interface. `flags` are the kernel's IFA_F_*; `version` is IP's."""

    ifindex: int
    ip: int
    length: int
    scope: int
    flags: int
    version: int = 4


class Neigh(NamedTuple):
    """A permanent neighbour entry."""

    ifindex: int
    ip: int
    mac: bytes
    version: int = 4


class Fdb(NamedTuple):
    """A permanent forwarding entry of the vxlan device itself."""

    ifindex: int
    mac: bytes
    dst: int
    version: int = 4


class Route(NamedTuple):
    """A route of the main table; `gateway` and `oif` are 0 where there is none.

    `metric` is what the kernel shows, and so never 0 for IPv6; `scope` is IPv4's, 0 for global.
    """

    dst: int
    length: int
    gateway: int
    oif: int
    onlink: bool = False
    kind: int = UNICAST
    metric: int = 0
    version: int = 4
    scope: int = 0

    @property
    def key(self) -> tuple[int, int, int, int]:
        """What two routes of one table cannot share."""
        return self.version, self.dst, self.length, self.metric

    def __str__(self) -> str:
        ip = IPv4Address if self.version == 4 else IPv6Address
        kind = "blackhole " if self.kind == BLACKHOLE else ""
        via = f" via {ip(self.gateway)}" if self.gateway else ""
        dev = f" dev #{self.oif}" if self.oif else ""
        metric = f" metric {self.metric}" if self.metric else ""
        return f"{kind}{ip(self.dst)}/{self.length}{via}{dev}{' onlink' if self.onlink else ''}{metric}"


class SeenRoute(NamedTuple):
    """A route together with what we do not set but must tell apart: who made it, its TOS, paths and table.

    `preferred` is its source address; `more` whether it has an MTU or another metric of its own, a realm, or an
    encapsulation.
    """

    route: Route
    protocol: int
    tos: int
    multipath: bool
    table: int
    preferred: int = 0
    more: bool = False

    @property
    def bare(self) -> bool:
        """Whether it says nothing that `route` does not."""
        return not (self.tos or self.multipath or self.preferred or self.more)

    @property
    def plain(self) -> bool:
        """Whether it has the marks of a route that flannel makes: protocol boot, no metric, TOS or second path."""
        usual = 0 if self.route.version == 4 else METRIC6
        return self.protocol == PROTOCOL_BOOT and not (self.route.metric != usual or self.tos or self.multipath)


class SeenEntry(NamedTuple):
    """A neighbour or FDB entry and its state (NUD_*)."""

    entry: Neigh | Fdb | None
    ifindex: int
    state: int
