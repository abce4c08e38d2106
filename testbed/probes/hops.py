"""Which routers answer on the way to an address, as traceroute finds out: by packets that do not live long enough."""

from __future__ import annotations

import re
from ipaddress import IPv4Address

from testbed.labs.base import Place

MOST = 6
_FROM = re.compile(r"^(?:From|\d+ bytes from) (\d+\.\d+\.\d+\.\d+)", re.MULTILINE)


def hops(source: Place, target: IPv4Address) -> tuple[IPv4Address | None, ...]:
    """Who answers a ping of TTL 1, 2, … until the target does, or at most six; None for one that nobody answered."""
    found: list[IPv4Address | None] = []
    for ttl in range(1, MOST + 1):
        found.append(parse_hop(source.run(_argv(target, ttl), check=False).stdout))
        if found[-1] == target:
            break
    return tuple(found)


def _argv(target: IPv4Address, ttl: int) -> list[str]:
    return ["ping", "-n", "-c", "1", "-W", "1", "-t", str(ttl), str(target)]


def parse_hop(text: str) -> IPv4Address | None:
    """Who answered one ping, by what it printed; None for nobody."""
    answer = _FROM.search(text)
    return IPv4Address(answer[1]) if answer else None
