"""What `ip -j`, `bridge -j`, `ss` and the counters of the kernel say, as typed values.

A whole node's state is read by two processes (`ip -batch` and `bridge`), because each costs milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Any

from testbed.errors import LabError
from testbed.labs.base import Place


@dataclass(frozen=True, slots=True)
class Link:
    """A network device. `kind` is the driver's (vxlan, bridge, veth, tun), "" for none; `data` its own attributes."""

    index: int
    name: str
    mtu: int
    mac: str
    flags: frozenset[str]
    state: str
    qdisc: str
    queue: int  # transmit queue's length in packets
    peer_index: int  # the other end of a veth; 0 where there is none
    master: str
    kind: str
    data: Mapping[str, Any]
    port: Mapping[str, Any]  # its attributes as a bridge's port
    addresses: tuple[IPv4Interface, ...]
    scopes: tuple[str, ...]  # of the addresses, one each
    rx_packets: int
    tx_packets: int

    @property
    def up(self) -> bool:
        """Whether the device is set up and has its carrier."""
        return {"UP", "LOWER_UP"} <= self.flags


@dataclass(frozen=True, slots=True)
class Route:
    """A route of the main table. `gateways` holds (gateway, device) of each next hop."""

    dst: IPv4Network
    type: str
    protocol: str
    scope: str
    prefsrc: IPv4Address | None
    hops: tuple[tuple[IPv4Address | None, str], ...]
    flags: frozenset[str]
    metric: int

    @property
    def gateway(self) -> IPv4Address | None:
        """The gateway of a route with one next hop."""
        return self.hops[0][0] if len(self.hops) == 1 else None

    @property
    def dev(self) -> str:
        """The device of a route with one next hop."""
        return self.hops[0][1] if len(self.hops) == 1 else ""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """An entry of the neighbour table; `mac` is "" where none is known."""

    address: IPv4Address
    dev: str
    mac: str
    state: frozenset[str]


@dataclass(frozen=True, slots=True)
class FdbEntry:
    """An entry of a forwarding table; `dst` is the tunnel end of a vxlan device's entry."""

    mac: str
    dev: str
    dst: IPv4Address | None
    state: str
    flags: frozenset[str]
    master: str


@dataclass(frozen=True, slots=True)
class State:
    """A node's or a pod's network state, read at one moment."""

    where: str
    links: tuple[Link, ...]
    routes: tuple[Route, ...]
    neighbours: tuple[Neighbour, ...]
    fdb: tuple[FdbEntry, ...] = ()
    _names: Mapping[str, Link] = field(default_factory=dict, repr=False)

    def link(self, name: str) -> Link | None:
        """The device of that name, or None."""
        return self._names.get(name)

    def routes_to(self, dst: IPv4Network) -> tuple[Route, ...]:
        """The routes with exactly that destination."""
        return tuple(r for r in self.routes if r.dst == dst)


def documents(text: str, where: str) -> list[Any]:
    """The JSON documents that `ip -j -batch` prints one after another. Raises LabError for anything else."""
    decoder, found, at = json.JSONDecoder(), [], 0
    text = text.strip()
    try:
        while at < len(text):
            document, at = decoder.raw_decode(text, at)
            found.append(document)
            while at < len(text) and text[at].isspace():
                at += 1
    except ValueError as error:
        raise LabError(
            f"not the JSON that was expected ({error}): {text[max(0, at - 20) : at + 200]!r}", where=where
        ) from error
    return found


def read_state(place: Place, *, fdb: bool = True) -> State:
    """Read links, addresses, routes, neighbours and, on a node, forwarding entries. Raises LabError."""
    commands = "link show\naddress show\nroute show table main\nneighbour show nud all\n"
    text = place.run(["ip", "-4", "-j", "-d", "-s", "-batch", "-"], stdin=commands).stdout
    entries = place.run(["bridge", "-j", "fdb", "show"]).stdout if fdb else "[]"
    return parse_state(text, entries, place.name)


def parse_state(text: str, entries: str, where: str) -> State:
    """Make a State of recorded output; see `read_state`."""
    parts = documents(text, where)
    if len(parts) != 4:
        raise LabError(f"`ip -batch` gave {len(parts)} answers to 4 questions", where=where)
    try:
        addresses = {item["ifname"]: _inet(item) for item in parts[1] if item}
        links = tuple(_link(item, addresses.get(item["ifname"], ())) for item in parts[0])
        routes = tuple(_route(item) for item in parts[2])
        neighbours = tuple(_neighbour(item) for item in parts[3] if ":" not in item["dst"])
        found = documents(entries, where)
        table = tuple(_fdb(item) for item in (found[0] if found else []))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LabError(f"`ip` or `bridge` answered in another form than expected: {error!r}", where=where) from error
    return State(where, links, routes, neighbours, table, {link.name: link for link in links})


def _inet(item: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    return tuple(entry for entry in item.get("addr_info", ()) if entry["family"] == "inet")


def _link(item: Mapping[str, Any], addresses: Iterable[Mapping[str, Any]]) -> Link:
    info = item.get("linkinfo", {})
    stats = item.get("stats64", {})
    return Link(
        index=item["ifindex"],
        name=item["ifname"],
        mtu=item["mtu"],
        mac=item.get("address", ""),
        flags=frozenset(item["flags"]),
        state=item["operstate"],
        qdisc=item.get("qdisc", ""),
        queue=item.get("txqlen", 0),
        peer_index=item.get("link_index", 0),
        master=item.get("master", ""),
        kind=info.get("info_kind", ""),
        data=info.get("info_data", {}),
        port=info.get("info_slave_data", {}),
        addresses=tuple(IPv4Interface((entry["local"], entry["prefixlen"])) for entry in addresses),
        scopes=tuple(entry["scope"] for entry in addresses),
        rx_packets=stats.get("rx", {}).get("packets", 0),
        tx_packets=stats.get("tx", {}).get("packets", 0),
    )


def _destination(text: str) -> IPv4Network:
    return IPv4Network("0.0.0.0/0" if text == "default" else text)


def _gateway(hop: Mapping[str, Any]) -> IPv4Address | None:
    return IPv4Address(hop["gateway"]) if "gateway" in hop else None


def _route(item: Mapping[str, Any]) -> Route:
    hops = item.get("nexthops", [item])
    return Route(
        dst=_destination(item["dst"]),
        type=item.get("type", "unicast"),
        protocol=item.get("protocol", ""),
        scope=item.get("scope", "global"),
        prefsrc=IPv4Address(item["prefsrc"]) if "prefsrc" in item else None,
        hops=tuple((_gateway(hop), hop.get("dev", "")) for hop in hops),
        flags=frozenset(flag for hop in [item, *item.get("nexthops", [])] for flag in hop.get("flags", ())),
        metric=item.get("metric", 0),
    )


def _neighbour(item: Mapping[str, Any]) -> Neighbour:
    return Neighbour(IPv4Address(item["dst"]), item["dev"], item.get("lladdr", ""), frozenset(item.get("state", ())))


def _fdb(item: Mapping[str, Any]) -> FdbEntry:
    dst = item.get("dst")
    return FdbEntry(
        mac=item["mac"],
        dev=item["ifname"],
        dst=IPv4Address(dst) if dst and ":" not in dst else None,
        state=item.get("state", ""),
        flags=frozenset(item.get("flags", ())),
        master=item.get("master", ""),
    )


def route_get(place: Place, *addresses: IPv4Address) -> tuple[Route | None, ...]:
    """The route that wins for each address (`fibmatch`: the table's entry); None where there is none."""
    found: list[Route | None] = []
    for address in addresses:
        result = place.run(["ip", "-4", "-j", "-d", "route", "get", "fibmatch", str(address)], check=False)
        if not result.ok:
            found.append(None)
            continue
        answer = documents(result.stdout, place.name)
        try:
            found.append(_route(answer[0][0]))
        except (IndexError, KeyError, ValueError, TypeError) as error:
            raise LabError(f"`ip route get` answered in another form: {error!r}", where=place.name) from error
    return tuple(found)


@dataclass(frozen=True, slots=True)
class UdpSocket:
    """A listening UDP socket; `owners` names the processes that hold it, none for the kernel's own."""

    address: str
    port: int
    owners: tuple[tuple[str, int], ...]


def udp_sockets(place: Place) -> tuple[UdpSocket, ...]:
    """The UDP sockets bound on a node, the kernel's among them. Raises LabError."""
    return parse_ss(place.run(["ss", "-H", "-u", "-a", "-n", "-p"]).stdout, place.name)


def parse_ss(text: str, where: str) -> tuple[UdpSocket, ...]:
    """Read `ss -Huanp`."""
    found = []
    for line in text.splitlines():
        fields = line.split()
        if not fields:
            continue
        try:
            address, _, port = fields[3].rpartition(":")
            owners = _owners(fields[5]) if len(fields) > 5 else ()
            found.append(UdpSocket(address.split("%")[0].strip("[]"), int(port) if port != "*" else 0, owners))
        except (IndexError, ValueError) as error:
            raise LabError(f"`ss` printed a line of another form: {line!r}", where=where) from error
    return tuple(found)


def _owners(text: str) -> tuple[tuple[str, int], ...]:
    """Read `users:(("flanneld",pid=7,fd=5),…)`."""
    owners = []
    for part in text.removeprefix("users:(").removesuffix(")").split("),("):
        name, pid, *_ = part.strip("()").split(",")
        owners.append((name.strip('"'), int(pid.removeprefix("pid="))))
    return tuple(owners)


def counters(place: Place, *names: str) -> dict[str, int]:
    """Counters of the network stack by name (`IpFragCreates`), absolute. Raises LabError for an unknown one."""
    result = place.run(["nstat", "-a", "-s", "-z", "-j", *names])
    try:
        kernel = json.loads(result.stdout)["kernel"]
        return {name: int(kernel[name]) for name in names}
    except (ValueError, KeyError, TypeError) as error:
        raise LabError(f"`nstat` did not tell {', '.join(names)}: {result.stdout[:200]!r}", where=place.name) from error
