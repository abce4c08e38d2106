"""Reasons on wires and bridges: an end that is down, a port that blocks, a MAC that is another machine's."""

from __future__ import annotations

from testbed.trace.loss import Loss
from testbed.trace.model import Cause
from testbed.trace.reasons.forwarding import down


def wire_down(loss: Loss) -> Cause | None:
    """One of the wire's ends is down."""
    far, near = loss.sites.get(loss.place), loss.site
    ends = ((far, loss.interface), (near, loss.last.interface if loss.last else ""))
    return next((cause for site, name in ends if site and name and (cause := down(site, name))), None)


def wrong_mac_behind_bridge(loss: Loss) -> Cause | None:
    """The MAC that it was sent to is not that of the pod which has the address."""
    last, packet = loss.last, loss.packet
    if last is None or last.frame is None or packet is None:
        return None
    end = next((e for e in (loss.trace.source, loss.trace.target)
                if e in loss.sites and e in loss.layout.pods and loss.sites[e].owns(packet.dst)), "")  # fmt: skip
    mac = loss.sites[end].link("eth0").get("address", "") if end else ""
    if not mac or mac == last.frame.dst:
        return None
    lines = (f"{end} has {mac}", *((last.neighbour["text"],) if last.neighbour else ()))
    return Cause("wrong_mac", f"{last.place} sends it to {last.frame.dst}, which is not {end}", lines)


def port_blocks(loss: Loss) -> Cause | None:
    """The bridge's port passes nothing on."""
    state = (
        loss.site.link(loss.last.interface).get("linkinfo", {}).get("info_slave_data", {})
        if loss.site and loss.last
        else {}
    )
    if state.get("state") in (None, "forwarding"):
        return None
    assert loss.last
    return Cause("interface_down", f"the bridge's port {loss.last.interface} is {state['state']}", ())


def not_its_mac(loss: Loss) -> Cause | None:
    """It carries a MAC that is not the receiver's."""
    last = loss.last
    if last is None or last.frame is None or not loss.found.copy(last).alien:
        return None
    own = loss.site.link(last.interface).get("address", "?") if loss.site else "?"
    lines = [f"{last.where} has {own}"]
    hops = loss.trace.request if loss.direction == "request" else loss.trace.answer
    chose = next((hop.neighbour for hop in hops if hop.neighbour and hop.neighbour["mac"] == last.frame.dst), None)
    lines += [f"the sender's neighbour entry: {chose['text']}"] if chose else []
    what = "VTEP MAC" if last.kind == "tunnel" else "MAC"
    return Cause("wrong_mac", f"its {what} {last.frame.dst} is not that of {last.where}", tuple(lines))


def went_astray(loss: Loss) -> Cause | None:
    """It came to a node that is not its target's, in the tunnel."""
    if loss.direction == "request" and loss.trace.arrived:
        return None
    after = loss.last.at if loss.last else 0.0
    stray = next((hop for hop in loss.trace.strays if hop.at >= after and hop.kind == "underlay" and hop.way == "in"
                  and loss.found.copy(hop).alien is False), None)  # fmt: skip
    if stray is None:
        return None
    hops = loss.trace.request if loss.direction == "request" else loss.trace.answer
    chose = next((hop for hop in reversed(hops) if hop.fdb and hop.kind == "tunnel"), None)
    lines = [f"{chose.place}: {chose.fdb['text']}"] if chose and chose.fdb else []
    routed = next((hop for hop in hops if hop.route and hop.kind in ("underlay", "tunnel")), None)
    lines += [f"{routed.place}: {routed.route['text']}"] if routed and routed.route else []
    end = loss.trace.target if loss.direction == "request" else loss.trace.source
    return Cause("wrong_vtep", f"it was sent to {stray.machine}, and {end} is elsewhere", tuple(lines))


def bad_checksum(loss: Loss) -> Cause | None:
    """It came in with a wrong checksum."""
    last, site = loss.last, loss.site
    if last is None or site is None:
        return None
    facts = last.outer or last.packet
    counter = "Udp6InCsumErrors" if loss.layout.six else "UdpInCsumErrors"
    counted = site.moved.get(counter, 0)
    if (facts is None or facts.checksum != "bad") and not counted:
        return None
    hops = loss.trace.request if loss.direction == "request" else loss.trace.answer
    wrong = [hop for hop in hops if (one := hop.outer or hop.packet) and one.checksum == "bad"]
    lines = [f"wrong from {wrong[0].where} on"] if wrong else []
    lines += [f"{counter} +{counted}"] if counted else []
    what = "its outer" if last.outer else "its"
    text = f"{what} UDP checksum is wrong where {last.where} gets it: a device on the way was to compute it"
    return Cause("checksum", text, tuple(lines), certain=bool(counted))
