"""Reasons at the target, and what ICMP errors say where nothing else explains a loss."""

from __future__ import annotations

from testbed.trace.loss import Loss
from testbed.trace.model import Cause


def _name(loss: Loss) -> str:
    return loss.last.place if loss.last else loss.trace.source


def ignores_echo(loss: Loss) -> Cause | None:
    """The target answers no pings."""
    if loss.site is None or loss.trace.packet["protocol"] != "icmp":
        return None
    key = "icmp/echo_ignore_all" if loss.layout.six else "icmp_echo_ignore_all"
    if loss.site.sysctls.get(key) != "1":
        return None
    name = f"net.{'ipv6' if loss.layout.six else 'ipv4'}.{key.replace('/', '.')}"
    return Cause("not_answered", f"{_name(loss)} answers no pings", (f"{name} = 1",))


def nobody_listens(loss: Loss) -> Cause | None:
    """No program has the port open."""
    site = loss.site
    if site is None or loss.trace.packet["protocol"] == "icmp":
        return None
    if loss.refused or site.moved.get("Udp6NoPorts" if loss.layout.six else "UdpNoPorts"):
        return Cause("no_listener", f"nobody listens on that port in {site.place}")
    return None


def not_answered(loss: Loss) -> Cause | None:
    """It is there, and nothing comes back."""
    return Cause("not_answered", f"{_name(loss)} got it and did not answer", loss.hints(), certain=False)


_BY_ERROR = {
    "port unreachable": "no_listener",
    "TTL exceeded": "ttl",
    "host unreachable": "no_neighbour",
    "address unreachable": "no_neighbour",
    "network unreachable": "no_route",
    "no route": "no_route",
}


def by_error(loss: Loss) -> Cause | None:
    """What an ICMP error says, where nothing else explains it."""
    first = next(iter(loss.trace.errors), None)
    if first is None:
        return None
    tunnelled = loss.last is not None and loss.last.outer is not None
    code = _BY_ERROR.get(first.error, "firewall_rule" if "prohibited" in first.error else "unknown")
    if code == "no_listener" and tunnelled:
        code = "tunnel_missing"
    return Cause(code, f"{first.place} answers: {first.error}", (f"{first.where}: {first.error}",), certain=False)
