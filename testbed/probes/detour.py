"""Hand-made routes on the fabric, as an operator would make them: packets for a pod's address by way of a node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

from testbed.errors import LabError
from testbed.labs.base import Lab, Place
from testbed.model import Role
from testbed.probes.iproute import documents


def _hop(route: Mapping[str, Any], via: IPv4Address | IPv6Address) -> list[str]:
    """How a machine reaches `via`, as words of `ip route`: its gateway, of either family, or directly."""
    if "via" in route:
        return ["via", route["via"]["family"], route["via"]["host"], "dev", route["dev"]]
    # FRR writes an IPv6 neighbour as 169.254.0.1, which is in no subnet of the link.
    return ["via", route.get("gateway", str(via)), "dev", route["dev"], "onlink"]


def next_hop(place: Place, via: IPv4Address | IPv6Address) -> list[str]:
    """The next hop towards an address, as words of `ip route add`. Raises LabError where there is none."""
    answer = documents(place.run(["ip", f"-{via.version}", "-j", "route", "get", str(via)]).stdout, place.name)
    try:
        return _hop(answer[0][0], via)
    except (IndexError, KeyError, TypeError) as error:
        raise LabError(f"`ip route get {via}` answered in another form: {answer!r}", where=place.name) from error


@contextmanager
def detour(lab: Lab, subnet: IPv4Network | IPv6Network, node: str) -> Iterator[None]:
    """Send what the outside host has for a pod subnet to `node`, through every router on the way."""
    spec = lab.spec
    entry = spec.node(node).ip if subnet.version == 4 else spec.node(node).ip6
    if entry is None:
        raise LabError("this lab has no IPv6")
    leaf = spec.node(node).rack
    machines = [m.name for m in spec.of_role(Role.OUTSIDE, Role.SPINE)] + ([leaf] if leaf else [])
    made: list[str] = []
    try:
        for name in machines:
            lab.node(name).run(["ip", "route", "add", str(subnet), *next_hop(lab.node(name), entry)])
            made.append(name)
        yield
    finally:
        for name in made:
            lab.node(name).run(["ip", "route", "delete", str(subnet)], check=False)
