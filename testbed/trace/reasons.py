"""The single reasons for which a packet can be lost: each looks whether it holds where the packet was last seen.

A reason returns its cause, or None where it does not hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from testbed.flannelspec import BACKENDS, OVERHEAD6
from testbed.trace.decisions import gateway_of, neighbour_fact, route_text
from testbed.trace.loss import Loss
from testbed.trace.model import Cause
from testbed.trace.sites import Site

REFUSING = ("blackhole", "unreachable", "prohibit")
FAILED_STATES = {"FAILED", "INCOMPLETE"}
DEAD = {"dead", "linkdown"}


def _name(loss: Loss) -> str:
    return loss.last.place if loss.last else loss.trace.source


# --- rules


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


# --- routing


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
        vtep = _vtep(loss)
        question, towards = (vtep,), vtep
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
    return _down(site, loss.interface)


def _down(site: Site, device: str) -> Cause | None:
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


# --- size


def refused_as_too_large(loss: Loss) -> Cause | None:
    """The sender's own kernel refused it."""
    if loss.error != "Message too long":
        return None
    what = f"it may not be fragmented, and {loss.trace.source} sends no more than {loss.mtu or '?'} bytes"
    return Cause("mtu", what, (f"{loss.trace.packet['size']} bytes of payload", loss.error))


def too_large_by_error(loss: Loss) -> Cause | None:
    """Somebody said so by an ICMP error."""
    errors = [hop for hop in loss.trace.errors if hop.error.startswith("fragmentation needed")]
    if not errors:
        return None
    first = errors[0]
    mtu = first.error.rpartition(" ")[2]
    return Cause("mtu", f"{first.place} can pass on no more than {mtu} bytes", (f"{first.where}: {first.error}",))


def larger_than_egress(loss: Loss) -> Cause | None:
    """It is larger than the device's MTU."""
    site = loss.site
    mtu = site.mtu(loss.interface) if site else 0
    if site is None or not mtu or loss.bytes <= mtu:
        return None
    whole = loss.packet is not None and loss.packet.dont_fragment
    if not whole and not site.master_bridge(loss.interface):
        return None  # it is taken to pieces there
    line = f"{loss.interface} mtu {mtu}, packet of {loss.bytes} bytes"
    return Cause("mtu", f"it is larger than the MTU of {site.place}'s {loss.interface}", (line,))


def larger_than_wire(loss: Loss) -> Cause | None:
    """It is larger than the MTU of the interface at the other end."""
    far = loss.sites.get(loss.place)
    mtu = far.mtu(loss.interface) if far else 0
    if not mtu or loss.bytes <= mtu:
        return None
    line = f"{loss.place}:{loss.interface} mtu {mtu}, packet of {loss.bytes} bytes"
    return Cause("mtu", f"it is larger than the MTU of {loss.place}'s {loss.interface}", (line,))


def larger_than_tunnel(loss: Loss) -> Cause | None:
    """With what the tunnel adds it is larger than the underlay's MTU, and may not be fragmented."""
    site, last = loss.site, loss.last
    if (
        site is None
        or last is None
        or site.link(last.interface).get("linkinfo", {}).get("info_data", {}).get("df") not in ("set", "inherit")
    ):
        return None
    mtu, inner = site.mtu(loss.interface), site.mtu(last.interface)
    added = OVERHEAD6["vxlan"] if loss.layout.six else BACKENDS["vxlan"].overhead
    if not mtu or loss.bytes + added <= mtu:
        return None
    lines = (f"{last.interface} mtu {inner}", f"{loss.interface} mtu {mtu}")
    return Cause(
        "mtu", f"with the tunnel's headers it is larger than the MTU of {site.place}'s {loss.interface}", lines
    )


# --- wires and bridges


def wire_down(loss: Loss) -> Cause | None:
    """One of the wire's ends is down."""
    far, near = loss.sites.get(loss.place), loss.site
    ends = ((far, loss.interface), (near, loss.last.interface if loss.last else ""))
    return next((cause for site, name in ends if site and name and (cause := _down(site, name))), None)


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


# --- tunnels


def _vtep(loss: Loss) -> str:
    """The tunnel's other end for the packet that went into it; "" where it is not known."""
    if loss.last is not None and loss.last.fdb and loss.last.fdb.get("dst"):
        return str(loss.last.fdb["dst"])
    end = loss.trace.target if loss.direction == "request" else loss.trace.source
    return loss.layout.address_of(loss.layout.lab.spec.node(loss.layout.node_of(end).name))


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
    site, vtep = loss.site, _vtep(loss)
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
    if down := _down(site, loss.interface):
        return down
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


# --- at the target


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
