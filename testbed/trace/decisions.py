"""What chose each hop: the route, the neighbour and the forwarding entry, and what translated its addresses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from testbed.trace.copies import Sorted
from testbed.trace.model import Hop, PacketFacts, with_port
from testbed.trace.sites import Question, Site


def seen_by_ip(hop: Hop) -> PacketFacts | None:
    """The packet as routing saw it that sent it out of that interface: the outermost one."""
    return hop.outer or hop.packet


def question(hops: Sequence[Hop], position: int) -> Question | None:
    """What to ask a place's routing about the hop there that goes out; None where routing had no part in it."""
    hop = hops[position]
    packet = seen_by_ip(hop)
    if hop.way != "out" or packet is None:
        return None
    earlier = _arrival(hops, position)
    if earlier is None or (hop.outer is not None and earlier.outer is None):  # made here
        return (packet.dst, "from", packet.src) if hop.kind != "pod" else (packet.dst,)
    came = (earlier.packet if earlier.outer is None or hop.outer is None else earlier.outer) or packet
    return packet.dst, "from", came.src, "iif", earlier.interface


def _arrival(hops: Sequence[Hop], position: int) -> Hop | None:
    """How the packet came into the place that sends it out: the last hop inwards of that visit."""
    place, found = hops[position].place, None
    for hop in reversed(hops[:position]):
        if hop.place != place:
            break
        if hop.way == "in":
            found = hop
            break
    return found


def questions(sorted_hops: Sorted) -> dict[str, set[Question]]:
    """Everything to ask routing, by place."""
    found: dict[str, set[Question]] = {}
    for hops in (sorted_hops.request, sorted_hops.answer):
        for position, hop in enumerate(hops):
            asked = question(hops, position)
            if asked is not None:
                found.setdefault(hop.place, set()).add(asked)
    return found


def decide(sorted_hops: Sorted, sites: Mapping[str, Site]) -> None:
    """Write into every hop what chose it."""
    for hops in (sorted_hops.request, sorted_hops.answer):
        for position, hop in enumerate(hops):
            site = sites.get(hop.place)
            if site is not None:
                _choose(hops, position, site)
        _translate(hops, sites)


def _choose(hops: Sequence[Hop], position: int, site: Site) -> None:
    hop = hops[position]
    if hop.way != "out":
        return
    asked = question(hops, position)
    if bridge := site.master_bridge(hop.interface):
        entry = site.port(hop.frame.dst, bridge) if hop.frame else None
        hop.fdb = None if entry is None else {"text": fdb_text(entry), "dst": None}
        return
    answer = site.chosen.get(asked) if asked else None
    via = None
    if answer is not None and answer.route is not None:
        route = answer.route
        hop.route = {
            "text": route_text(route),
            "type": route.get("type", "unicast"),
            "table": route.get("table", "main"),
        }
        packet = seen_by_ip(hop)
        via = gateway_of(_next_hop(route, hop.interface)) or (packet.dst if packet else None)
    if via:
        entry = site.neighbour(via, hop.interface)
        if entry is not None and entry.get("state") != ["NOARP"]:  # a device without MACs has no neighbours to choose
            hop.neighbour = neighbour_fact(entry)
    if hop.frame is not None and hop.kind == "tunnel":
        found = site.forwarding(hop.frame.dst, hop.interface)
        hop.fdb = None if found is None else {"text": fdb_text(found), "dst": found.get("dst")}


def gateway_of(hop: Mapping[str, Any]) -> str:
    """A next hop's gateway, which may be of the other family; "" where it is on the link."""
    return str(hop.get("gateway") or hop.get("via", {}).get("host") or "")


def _next_hop(route: Mapping[str, Any], interface: str) -> Mapping[str, Any]:
    """The next hop by that interface, of a route that may have several."""
    found: list[Mapping[str, Any]] = route.get("nexthops", [route])
    return next((one for one in found if one.get("dev") == interface), found[0])


def route_text(route: Mapping[str, Any]) -> str:
    """A route as `ip route` shows it, shortened to what decides."""
    kind = route.get("type", "unicast")
    words = [] if kind == "unicast" else [kind]
    words.append(str(route.get("dst", "default")))
    for hop in route.get("nexthops", [route]):
        words += ["nexthop"] if "nexthops" in route else []
        words += ["via", gateway_of(hop)] if gateway_of(hop) else []
        words += ["dev", hop["dev"]] if "dev" in hop else []
        words += [flag for flag in hop.get("flags", ()) if flag]
    if "nexthops" in route:
        words += [flag for flag in route.get("flags", ()) if flag]
    if route.get("table") not in (None, "main"):
        words += ["table", str(route["table"])]
    return " ".join(words)


def neighbour_fact(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A neighbour's entry as hops have it."""
    state = list(entry.get("state", ()))
    mac = entry.get("lladdr", "")
    text = f"{entry['dst']} dev {entry.get('dev', '?')} {f'lladdr {mac} ' if mac else ''}{' '.join(state)}"
    return {"text": text, "mac": mac, "state": state}


def fdb_text(entry: Mapping[str, Any]) -> str:
    """A forwarding entry as `bridge fdb` shows it."""
    words = [entry["mac"], "dev", entry["ifname"]]
    words += ["dst", entry["dst"]] if "dst" in entry else []
    words += ["master", entry["master"]] if "master" in entry else []
    return " ".join([*words, *entry.get("flags", ()), *([entry["state"]] if entry.get("state") else [])])


# --- addresses that change


def _visits(hops: Sequence[Hop]) -> Iterator[list[Hop]]:
    """The hops one after the other in one place, each visit of it."""
    visit: list[Hop] = []
    for hop in hops:
        if visit and visit[-1].place != hop.place:
            yield visit
            visit = []
        visit.append(hop)
    if visit:
        yield visit


def translations(hops: Sequence[Hop]) -> Iterator[tuple[str, Hop, PacketFacts, PacketFacts]]:
    """The hops at which the source or destination is another one than at the hop before, within one place."""
    for visit in _visits(hops):
        for before, after in pairwise(visit):
            old, new = before.packet, after.packet
            if old is None or new is None:
                continue
            if (old.src, old.sport) != (new.src, new.sport):
                yield "source", after, old, new
            if (old.dst, old.dport) != (new.dst, new.dport):
                yield "destination", after, old, new


def _translate(hops: Sequence[Hop], sites: Mapping[str, Site]) -> None:
    for kind, hop, old, new in translations(hops):
        hop.nat = _translation(sites.get(hop.place), kind, old, new)


def _translation(site: Site | None, kind: str, old: PacketFacts, new: PacketFacts) -> dict[str, Any]:
    own = new.src if kind == "source" else new.dst
    was = old.src if kind == "source" else old.dst
    ports = (old.sport, new.sport) if kind == "source" else (old.dport, new.dport)
    with_ports = ports[0] != ports[1]
    fact: dict[str, Any] = {
        "kind": kind,
        "before": with_port(was, ports[0] if with_ports else 0),
        "after": with_port(own, ports[1] if with_ports else 0),
        "rule": "",
        "conntrack": "",
    }
    if site is None:
        return fact
    ends = {f"={end}" for end in (old.src, old.dst, new.src, new.dst)}
    fact["conntrack"] = next(
        (
            line
            for line in site.connections
            if any(word.startswith(old.protocol) for word in line.split()[:3]) and all(_has(line, end) for end in ends)
        ),
        "",
    )
    used = [rule for rule in site.rules.values() if rule.action == "nat" and rule.packets]
    unknown = [rule for rule in site.rules.values() if rule.action == "nat" and rule.packets is None]
    if used:
        fact["rule"] = used[0].text
    elif len(unknown) == 1:
        fact["rule"] = unknown[0].text
    elif unknown:
        fact["rule"] = "one of: " + "; ".join(rule.text for rule in unknown)
    return fact


def _has(line: str, end: str) -> bool:
    return any(word.endswith(end) for word in line.split())
