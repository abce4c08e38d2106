"""Reasons on a machine that forwards, or sends: rules, routes, neighbours, the device that it was to leave by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from testbed.trace.decisions import gateway_of, neighbour_fact, route_text
from testbed.trace.loss import Loss
from testbed.trace.model import Cause
from testbed.trace.sites import Site

REFUSING = ("blackhole", "unreachable", "prohibit")


FAILED_STATES = {"FAILED", "INCOMPLETE"}


DEAD = {"dead", "linkdown"}


def dropped(loss: Loss) -> Cause | None:
    """A rule or a policy has counted a packet that it drops."""
    site, last = loss.site, loss.last
    if site is None:
        return None
    dropping = [rule for rule in site.rules.values() if rule.action == "drop"]
    counted = [rule for rule in dropping if rule.packets]
    uncounted = [rule for rule in dropping if rule.packets is None and not rule.policy]
    tunnelled = last is not None and (last.outer is not None or (last.kind == "tunnel" and last.way == "out"))
    for rule in [*(r for r in counted if not r.policy), *(r for r in counted if r.policy)]:
        line = f"{rule.table} {rule.chain}: {rule.text} (+{rule.packets})"
        if rule.policy and rule.chain == "FORWARD":
            return Cause("forward_policy", f"{site.place} forwards nothing that no rule accepts", (line,))
        if tunnelled:
            port = f" UDP port {loss.layout.port}" if loss.layout.port else " the tunnel's packets"
            return Cause("port_blocked", f"{site.place} blocks{port}", (line,))
        return Cause("firewall_rule", f"a rule of {site.place} drops it", (line,))
    if uncounted:
        lines = tuple(f"{rule.table} {rule.chain}: {rule.text}" for rule in uncounted)
        code = "port_blocked" if tunnelled else "firewall_rule"
        return Cause(code, f"{site.place} has rules that drop, and do not count", lines, certain=False)
    return None


def bad_route(loss: Loss) -> Cause | None:
    """There is no route, or one that refuses, or whose next hop is dead."""
    site = loss.site
    if site is None:
        return None
    back = loss.at_end and loss.packet is not None
    towards = loss.packet.src if back and loss.packet else loss.destination
    route, chosen = site.longest(towards), site.chosen.get(loss.question)
    where, what = site.place, f"back to {towards}" if back else f"to {towards}"
    if route is None:
        return Cause("no_route", f"{where} has no route {what}", (chosen.error,) if chosen else ())
    kind, text = route.get("type", "unicast"), route_text(route)
    if kind in REFUSING:
        code = "blackhole_route" if kind == "blackhole" else "unreachable_route"
        return Cause(code, f"the route of {where} {what} is a {kind} one", (text,))
    hops = route.get("nexthops", [route])
    if all(DEAD & set(hop.get("flags", ())) for hop in hops):
        return Cause("nexthop_dead", f"every next hop of {where}'s route {what} is dead", (text,))
    if chosen is not None and chosen.route is None and "unreachable" in chosen.error:
        return Cause("no_route", f"{where} finds no route {what}", (chosen.error, text))
    return None


def does_not_forward(loss: Loss) -> Cause | None:
    """Forwarding is off."""
    site, last = loss.site, loss.last
    if site is None or last is None:
        return None
    if loss.layout.six:  # where a device alone says so, the kernel forwards all the same
        if site.sysctls.get("conf/all/forwarding") != "0":
            return None
        return Cause("no_forwarding", f"{site.place} does not forward", ("net.ipv6.conf.all.forwarding = 0",))
    if site.sysctls.get("ip_forward") == "0":
        return Cause("no_forwarding", f"{site.place} does not forward", ("net.ipv4.ip_forward = 0",))
    if site.sysctls.get(f"conf/{last.interface}/forwarding") == "0":
        line = f"net.ipv4.conf.{last.interface}.forwarding = 0"
        return Cause("no_forwarding", f"{site.place} forwards nothing that comes in on {last.interface}", (line,))
    return None


def reverse_path(loss: Loss) -> Cause | None:
    """The reverse path filter has counted it, or refuses it when asked."""
    site, last, packet = loss.site, loss.last, loss.packet
    if site is None or last is None or packet is None:
        return None
    chosen = site.chosen.get((packet.dst, "from", packet.src, "iif", last.interface))
    counted = site.moved.get("TcpExtIPReversePathFilter", 0)
    refused = chosen is not None and "cross-device" in chosen.error
    if not counted and not refused:
        return None
    back = site.chosen.get((packet.src,))
    modes = [f"{key}: {site.sysctls.get(f'conf/{key}/rp_filter', '?')}" for key in ("all", last.interface)]
    lines = [f"rp_filter {', '.join(modes)}"]
    lines += [f"route back: {route_text(back.route)}"] if back and back.route else [f"no route back to {packet.src}"]
    lines += [f"TcpExtIPReversePathFilter +{counted}"] if counted else []
    what = f"{site.place} does not expect {packet.src} on {last.interface}"
    return Cause("rp_filter", what, tuple(lines), certain=bool(counted))


def unknown_neighbour(loss: Loss) -> Cause | None:
    """The next hop's MAC is not known on the device that the packet was to leave by."""
    site = loss.site
    if site is None:
        return None
    tunnelling = loss.last is not None and loss.last.kind == "tunnel" and loss.last.way == "out"
    question, towards, device = loss.question, loss.destination, loss.interface
    if tunnelling:
        question, towards = (loss.vtep,), loss.vtep
    elif loss.at_end and loss.packet is not None:
        towards = loss.packet.src
    chosen = site.chosen.get(question)
    if chosen is None or chosen.route is None or "NOARP" in site.link(device).get("flags", ()):
        return None
    hops: list[Mapping[str, Any]] = chosen.route.get("nexthops", [chosen.route])
    hop = next((one for one in hops if one.get("dev") == device), hops[0])
    device, address = str(hop.get("dev", device)), gateway_of(hop) or towards
    if "NOARP" in site.link(device).get("flags", ()) or site.kind(device) in ("tun", "wireguard"):
        return None
    entry = site.neighbour(address, device)
    if entry is not None and not FAILED_STATES & set(entry.get("state", ())):
        return None
    lines = (route_text(chosen.route), neighbour_fact(entry)["text"] if entry else f"{address} dev {device}: no entry")
    return Cause("no_neighbour", f"{site.place} does not know the MAC of {address} on {device}", lines)


def egress_down(loss: Loss) -> Cause | None:
    """The device that it was to leave by, or to come up on, is away or down."""
    site = loss.site
    if site is None or not loss.interface.strip("?"):
        return None
    return down(site, loss.interface)


def down(site: Site, device: str) -> Cause | None:
    """Whether a device of a place is away or down."""
    link = site.link(device)
    if link and site.up(device):
        return None
    state = f"{device}: {','.join(link['flags'])} state {link.get('operstate')}" if link else f"{device}: not there"
    return Cause("interface_down", f"{device} of {site.place} is {'down' if link else 'not there'}", (state,))


def ttl_over(loss: Loss) -> Cause | None:
    """It had come to the end of its TTL."""
    if loss.packet is not None and loss.packet.ttl <= 1 and loss.site is not None:
        return Cause("ttl", f"its TTL ran out at {loss.site.place}")
    return None
