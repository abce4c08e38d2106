"""Connections that the kernel tracks, and how it translated them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from testbed.errors import LabError
from testbed.labs.base import Place


@dataclass(frozen=True, slots=True)
class Tuple:
    """One direction of a connection. Ports are 0 for ICMP, `id` is 0 for everything else."""

    src: IPv4Address | IPv6Address
    dst: IPv4Address | IPv6Address
    sport: int = 0
    dport: int = 0
    id: int = 0

    @property
    def mirrored(self) -> Tuple:
        """The same direction seen from the other end: what an answer looks like where nothing is translated."""
        return Tuple(self.dst, self.src, self.dport, self.sport, self.id)


@dataclass(frozen=True, slots=True)
class Connection:
    """A tracked connection: the packet that opened it, and the answer the kernel waits for."""

    protocol: str  # udp, tcp, icmp
    original: Tuple
    reply: Tuple
    flags: frozenset[str]  # UNREPLIED, ASSURED
    mark: int

    @property
    def translated(self) -> bool:
        """Whether an address or a port is changed on the way."""
        return self.reply != self.original.mirrored


def read_connections(place: Place, family: str = "ipv4") -> tuple[Connection, ...]:
    """Every connection of a family (`ipv4`, `ipv6`) tracked on a node. Raises LabError."""
    return parse_conntrack(place.run(["conntrack", "-L", "-f", family, "-o", "extended"]).stdout, place.name)


def connections_between(
    place: Place, protocol: str, source: IPv4Address | IPv6Address, target: IPv4Address | IPv6Address
) -> list[Connection]:
    """What a node tracks of a protocol from one address to another. Raises LabError."""
    found = read_connections(place, f"ipv{source.version}")
    return [c for c in found if (c.protocol, c.original.src, c.original.dst) == (protocol, source, target)]


def read_counters(place: Place) -> dict[str, int]:
    """The tracker's own counters on a node, such as `insert_failed`, all processors together. Raises LabError."""
    return parse_counters(place.run(["conntrack", "-S"]).stdout, place.name)


def parse_counters(text: str, where: str) -> dict[str, int]:
    """Read what `conntrack -S` prints, a line for each processor. Raises LabError for a line of another form."""
    found: dict[str, int] = {}
    try:
        for line in text.splitlines():
            cpu, *pairs = (word.partition("=") for word in line.split())
            if cpu[0] != "cpu":
                raise ValueError(cpu[0])
            for key, _, value in pairs:
                found[key] = found.get(key, 0) + int(value)
    except ValueError as error:
        raise LabError(f"conntrack -S printed a line of another form: {text[:300]!r}", where=where) from error
    return found


def parse_conntrack(text: str, where: str) -> tuple[Connection, ...]:
    """Read what `conntrack -L -o extended` prints. Raises LabError for a line of another form."""
    return tuple(_connection(line, where) for line in text.splitlines() if line.strip())


def _connection(line: str, where: str) -> Connection:
    words = line.split()
    flags = frozenset(word.strip("[]") for word in words if word.startswith("["))
    pairs = [(key, value) for key, equals, value in (word.partition("=") for word in words) if equals]
    starts = [index for index, (key, _) in enumerate(pairs) if key == "src"]
    try:
        if words[0] not in ("ipv4", "ipv6") or len(starts) != 2:
            raise ValueError("not an IP connection with two directions")
        original = _tuple(pairs[starts[0] : starts[1]])
        reply = _tuple(pairs[starts[1] :])
        mark = next((int(value) for key, value in pairs if key == "mark"), 0)
        return Connection(words[2], original, reply, flags, mark)
    except (ValueError, IndexError, KeyError) as error:
        raise LabError(f"conntrack printed a line of another form ({error}): {line!r}", where=where) from error


def _tuple(pairs: Iterable[tuple[str, str]]) -> Tuple:
    found: dict[str, str] = {}
    for key, value in pairs:
        found.setdefault(key, value)
    return Tuple(
        ip_address(found["src"]),
        ip_address(found["dst"]),
        int(found.get("sport", 0)),
        int(found.get("dport", 0)),
        int(found.get("id", 0)),
    )
