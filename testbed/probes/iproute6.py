"""What `ip -6 -j` and `bridge -j` say of IPv6, as typed values; devices and their attributes are in `iproute`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv6Address, IPv6Interface, IPv6Network
from typing import Any

from testbed.errors import LabError
from testbed.labs.base import Place
from testbed.probes.iproute import documents


@dataclass(frozen=True, slots=True)
class Route6:
    """A route of the main table with one next hop; `dev` is "" where it has several."""

    dst: IPv6Network
    type: str
    gateway: IPv6Address | None
    dev: str
    metric: int
    flags: frozenset[str]


@dataclass(frozen=True, slots=True)
class Neighbour6:
    """An entry of the neighbour table; `mac` is "" where none is known."""

    address: IPv6Address
    dev: str
    mac: str
    state: frozenset[str]


@dataclass(frozen=True, slots=True)
class FdbEntry6:
    """A forwarding entry of a vxlan device whose tunnel end is an IPv6 address."""

    mac: str
    dev: str
    dst: IPv6Address
    state: str


@dataclass(frozen=True, slots=True)
class State6:
    """A node's or a pod's IPv6 state. `addresses` has the global ones of each device."""

    where: str
    addresses: Mapping[str, tuple[IPv6Interface, ...]]
    routes: tuple[Route6, ...]
    neighbours: tuple[Neighbour6, ...]
    fdb: tuple[FdbEntry6, ...]

    def routes_to(self, dst: IPv6Network) -> tuple[Route6, ...]:
        """The routes with exactly that destination."""
        return tuple(route for route in self.routes if route.dst == dst)

    def of_device(self, name: str) -> tuple[Route6, ...]:
        """The routes by a device, those that the kernel made for its own addresses left out."""
        local = IPv6Network("fe80::/10")
        own = {address.network for address in self.addresses.get(name, ())}
        return tuple(
            route for route in self.routes if route.dev == name and not route.dst.subnet_of(local)
            and not route.dst.is_multicast and route.dst not in own
        )  # fmt: skip


def read_state6(place: Place, *, fdb: bool = True) -> State6:
    """Read addresses, routes, neighbours and, on a node, forwarding entries. Raises LabError."""
    commands = "address show\nroute show table main\nneighbour show nud all\n"
    text = place.run(["ip", "-6", "-j", "-d", "-batch", "-"], stdin=commands).stdout
    entries = place.run(["bridge", "-j", "fdb", "show"]).stdout if fdb else "[]"
    return parse_state6(text, entries, place.name)


def parse_state6(text: str, entries: str, where: str) -> State6:
    """Make a State6 of recorded output; see `read_state6`."""
    parts = documents(text, where)
    if len(parts) != 3:
        raise LabError(f"`ip -6 -batch` gave {len(parts)} answers to 3 questions", where=where)
    try:
        addresses = {item["ifname"]: _addresses(item) for item in parts[0] if item}
        routes = tuple(_route(item) for item in parts[1])
        neighbours = tuple(_neighbour(item) for item in parts[2])
        found = documents(entries, where)
        table = tuple(_fdb(item) for item in (found[0] if found else []) if ":" in item.get("dst", ""))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LabError(f"`ip -6` or `bridge` answered in another form than expected: {error!r}", where=where) from error
    return State6(where, addresses, routes, neighbours, table)


def _addresses(item: Mapping[str, Any]) -> tuple[IPv6Interface, ...]:
    listed = [entry for entry in item.get("addr_info", ()) if entry.get("scope") == "global"]
    return tuple(IPv6Interface((entry["local"], entry["prefixlen"])) for entry in listed)


def _route(item: Mapping[str, Any]) -> Route6:
    return Route6(
        dst=IPv6Network("::/0" if item["dst"] == "default" else item["dst"]),
        type=item.get("type", "unicast"),
        gateway=IPv6Address(item["gateway"]) if "gateway" in item else None,
        dev=item.get("dev", ""),
        metric=item.get("metric", 0),
        flags=frozenset(item.get("flags", ())),
    )


def _neighbour(item: Mapping[str, Any]) -> Neighbour6:
    return Neighbour6(IPv6Address(item["dst"]), item["dev"], item.get("lladdr", ""), frozenset(item.get("state", ())))


def _fdb(item: Mapping[str, Any]) -> FdbEntry6:
    return FdbEntry6(item["mac"], item["ifname"], IPv6Address(item["dst"]), item.get("state", ""))
