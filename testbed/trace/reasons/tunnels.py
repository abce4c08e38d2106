"""Reasons on the way into a tunnel and out of it."""

from __future__ import annotations

from testbed.trace.decisions import route_text
from testbed.trace.loss import Loss
from testbed.trace.model import Cause
from testbed.trace.reasons.forwarding import REFUSING, down


def no_forwarding_entry(loss: Loss) -> Cause | None:
    """The vxlan device has no entry for the MAC."""
    last, site = loss.last, loss.site
    if last is None or site is None or last.frame is None or site.kind(last.interface) != "vxlan":
        return None
    if site.forwarding(last.frame.dst, last.interface) is not None:
        return None
    line = f"{last.frame.dst} dev {last.interface}: no entry"
    return Cause("no_fdb", f"{site.place} does not know behind which node {last.frame.dst} is", (line,))


def no_way_to_vtep(loss: Loss) -> Cause | None:
    """There is no way to the tunnel's other end."""
    site, vtep = loss.site, loss.vtep
    chosen = site.chosen.get((vtep,)) if site else None
    if site is None or chosen is None or chosen.route is not None:
        return None
    route = site.longest(vtep)
    lines = (chosen.error, *((route_text(route),) if route else ()))
    kind = route.get("type", "unicast") if route else ""
    code = "blackhole_route" if kind == "blackhole" else "unreachable_route" if kind in REFUSING else "no_route"
    return Cause(code, f"{site.place} cannot reach the tunnel's other end {vtep}", lines)


def tunnel_not_there(loss: Loss) -> Cause | None:
    """The tunnel device is away, down, or another one than the packet is for."""
    site, last = loss.site, loss.last
    if site is None or last is None:
        return None
    link = site.link(loss.interface)
    if not link:
        return Cause("tunnel_missing", f"{site.place} has no {loss.interface}", ())
    if cause := down(site, loss.interface):
        return cause
    data, carried = link.get("linkinfo", {}).get("info_data", {}), last.encapsulation or {}
    pairs = (("vni", "id", "VNI"), ("port", "port", "port"))
    for key, own, word in pairs:
        if site.kind(loss.interface) == "vxlan" and carried.get(key) not in (None, data.get(own)):
            what = f"{site.place}'s {loss.interface} has {word} {data.get(own)}, and the packet {carried[key]}"
            return Cause("tunnel_missing", what, ())
    return None


def flanneld_does_not_carry(loss: Loss) -> Cause | None:
    """With the udp backend it is flanneld that packets go through."""
    site = loss.site
    if loss.layout.backend != "udp" or site is None or site.flanneld in ("S", "R", "D"):
        return None
    state = {"": "does not run", "T": "is stopped"}.get(site.flanneld, f"is in state {site.flanneld}")
    return Cause("flanneld_gone", f"flanneld of {site.place}, which carries the packets, {state}", ())
