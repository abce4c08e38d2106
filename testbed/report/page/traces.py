"""A path trace as the page shows it: one row a hop, there and back; `testbed.trace.model` has the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from testbed.report.page.drawing import both_sizes
from testbed.report.page.lost import Lost, Station

WAYS = {"request": "there", "answer": "back"}


def trace_view(trace: Mapping[str, Any], lab: Mapping[str, Any]) -> dict[str, Any]:
    """A trace as the template shows it, drawn in its lab."""
    missing = trace.get("missing")
    missing_in = WAYS.get(str(missing.get("direction"))) if missing else None
    return {
        "drawing": drawing_of(trace, lab),
        "title": f"{trace.get('source', '')} → {trace.get('target', '')}",
        "packet": trace.get("packet") or {},
        "delivered": bool(trace.get("delivered")),
        "seconds": trace.get("seconds"),
        "notes": [str(note) for note in trace.get("notes") or ()],
        "ways": [
            {"name": name, "hops": [hop_view(hop) for hop in hops]}
            for key, name in WAYS.items()
            if (hops := (trace.get(key) or {}).get("hops") or ()) or name == missing_in
        ],
        "errors": [hop_view(hop) for hop in trace.get("errors") or ()],
        "strays": [hop_view(hop) for hop in trace.get("strays") or ()],
        "missing": missing,
        "missing_in": missing_in,
        "cause": dict(missing.get("cause") or {}) if missing else None,
    }


KINDS = {"underlay": "wire"}


def drawing_of(trace: Mapping[str, Any], lab: Mapping[str, Any]) -> Markup:
    """The way of the packet in its lab; which spine it took is known where one saw it."""
    way: dict[str, Station] = {}
    fabric: set[str] = set()
    for key, there, back in (("request", 1, 0), ("answer", 0, 1)):
        for hop in (trace.get(key) or {}).get("hops") or ():
            if hop.get("kind") in ("fabric", "other"):
                fabric |= {str(hop.get("machine"))} if key == "request" else set()
                continue
            at = f"{hop.get('place', '')}:{hop.get('interface', '')}"
            known = way.get(at)
            counts = (max(there, known.there), max(back, known.back)) if known else (there, back)
            way[at] = _station(hop, *counts, tunnelled=hop.get("encapsulation") is not None)
    found = None
    if missing := trace.get("missing"):
        before = _station(missing, 0, 0)
        way.setdefault(before.at, before)
        last = missing.get("last")
        after = way.get(f"{last.get('place', '')}:{last.get('interface', '')}") if last else None
        found = Lost("there" if missing.get("direction") == "request" else "back", after, before, 1, 0)
    title = f"the path of a packet from {trace.get('source', '')} to {trace.get('target', '')}"
    return both_sizes(lab, list(way.values()), found, title, fabric=fabric)


def _station(hop: Mapping[str, Any], there: int, back: int, *, tunnelled: bool = False) -> Station:
    kind = str(hop.get("kind", "wire"))
    at = f"{hop.get('place', '')}:{hop.get('interface', '')}"
    return Station(at, str(hop.get("machine", "")), KINDS.get(kind, kind), True, there, back, 0, tunnelled)


def hop_view(hop: Mapping[str, Any]) -> dict[str, Any]:
    """A hop as text, the packet itself and what chose its way."""
    packet, outer, around = hop.get("packet"), hop.get("outer"), hop.get("encapsulation")
    nat = hop.get("nat")
    return {
        "where": f"{hop.get('place', '')}:{hop.get('interface', '')}",
        "way": str(hop.get("way", "")),
        "kind": str(hop.get("kind", "")),
        "at": float(hop.get("at") or 0.0),
        "length": hop.get("length"),
        "pieces": int(hop.get("pieces") or 1),
        "frame": _pair(hop.get("inner_frame") or hop.get("frame")),
        "packet": _pair(packet),
        "ttl": packet.get("ttl") if packet else None,
        "outer": _pair(outer),
        "outer_frame": _pair(hop.get("frame")) if hop.get("inner_frame") else "",
        "around": " ".join(f"{value}" if key == "kind" else f"{key} {value}" for key, value in (around or {}).items()),
        "error": str(hop.get("error") or ""),
        "matched": str(hop.get("matched") or ""),
        "decisions": [
            (name, str(hop[name].get("text", ""))) for name in ("route", "neighbour", "fdb") if hop.get(name)
        ],
        "nat": f"{nat.get('kind', '')}: {nat.get('before', '')} → {nat.get('after', '')}" if nat else "",
        "nat_rule": str(nat.get("rule", "")) if nat else "",
    }


def _pair(ends: Mapping[str, Any] | None) -> str:
    return f"{ends.get('src', '')} → {ends.get('dst', '')}" if ends else ""
