"""A lab as a drawing: spines above leaves above nodes, the outside host on top. Pure; one SVG document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from testbed.model import LabSpec, NodeSpec, Role

WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 148, 46, 22, 74, 24
LINE = 15

ROWS = (Role.OUTSIDE, Role.SPINE, Role.LEAF, Role.NODE)

STYLE = """
  .lab { font: 12px system-ui, sans-serif; }
  .box { stroke-width: 1.5; rx: 6; }
  .name { font-weight: 600; }
  .small { font-size: 10.5px; }
  .link { stroke: #7a8694; stroke-width: 1.4; fill: none; }
  .faulty { stroke: #c92a2a; stroke-dasharray: 6 3; }
  .lab text { fill: #1c2630; text-anchor: middle; }
  .outside { fill: #e9ecef; stroke: #868e96; } .spine { fill: #dbe7fb; stroke: #4a7fd0; }
  .leaf { fill: #d9f2e3; stroke: #3f9b66; } .node { fill: #fff3d6; stroke: #d39a2b; }
  @media (prefers-color-scheme: dark) {
    .lab text { fill: #e6edf3; } .link { stroke: #8b98a5; }
    .faulty { stroke: #ff8787; }
    .outside { fill: #343a40; } .spine { fill: #1d3354; } .leaf { fill: #17402a; } .node { fill: #4a3a12; }
  }
"""


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a machine is drawn: the upper left corner and the height, in pixels."""

    x: float
    y: float
    height: float

    @property
    def middle(self) -> float:
        """Where links meet it."""
        return self.x + WIDTH / 2


def draw(
    lab: LabSpec,
    *,
    pods: Mapping[str, Mapping[str, Any]] | None = None,
    faults: Mapping[str, str] | None = None,
) -> str:
    """Return the lab as an SVG document.

    `pods` are those of its nodes, by endpoint; `faults` are those of its links in words, by the links' names.
    """
    pods, faults = pods or {}, faults or {}
    spots = _lay_out(lab, pods)
    width = max(s.x + WIDTH for s in spots.values()) + MARGIN
    height = max(s.y + s.height for s in spots.values()) + MARGIN
    parts = [
        _link(spots[link.a.node], spots[link.b.node], f"{link.a} – {link.b}", faults.get(link.name, ""))
        for link in lab.links
    ]
    parts += [_machine(node, spots[node.name], _pods_of(node, pods)) for node in lab.nodes]
    title = escape(f"{lab.id}: {lab.topology}, MTU {lab.mtu}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img">\n<title>{title}</title>\n<style>{STYLE}</style>\n<g class="lab">\n'
        + "\n".join(parts)
        + "\n</g>\n</svg>\n"
    )


def _pods_of(node: NodeSpec, pods: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    return [(str(p["pod"]), str(p["address"])) for p in pods.values() if p["node"] == node.name]


def _lay_out(lab: LabSpec, pods: Mapping[str, Mapping[str, Any]]) -> dict[str, Spot]:
    """Nodes side by side by rack, each leaf over the middle of its nodes, spines and the outside host centred."""
    spots: dict[str, Spot] = {}
    rows = [role for role in ROWS if lab.of_role(role)]
    top = {role: MARGIN + index * (HEIGHT + GAP_Y) for index, role in enumerate(rows)}
    x = float(MARGIN)
    for leaf in lab.of_role(Role.LEAF):
        members = [n for n in lab.cluster_nodes if n.rack == leaf.name]
        begin = x
        for node in members:
            spots[node.name] = Spot(x, top[Role.NODE], HEIGHT + LINE * len(_pods_of(node, pods)))
            x += WIDTH + GAP_X
        if not members:
            x += WIDTH + GAP_X
        spots[leaf.name] = Spot((begin + x - GAP_X - WIDTH) / 2, top[Role.LEAF], HEIGHT)
        x += GAP_X
    whole = max(x - 2 * GAP_X, MARGIN + WIDTH)
    for role in (Role.SPINE, Role.OUTSIDE):
        machines = lab.of_role(role)
        need = len(machines) * WIDTH + (len(machines) - 1) * GAP_X * 2
        begin = max(MARGIN, (MARGIN + whole - need) / 2)
        for position, machine in enumerate(machines):
            spots[machine.name] = Spot(begin + position * (WIDTH + 2 * GAP_X), top[role], HEIGHT)
    return spots


def _link(a: Spot, b: Spot, title: str, fault: str) -> str:
    upper, lower = (a, b) if a.y < b.y else (b, a)
    start, end = upper.y + upper.height, lower.y
    bend = (end - start) / 2
    x, y = upper.middle, lower.middle
    path = f"M{x:g} {start:g} C{x:g} {start + bend:g} {y:g} {end - bend:g} {y:g} {end:g}"
    if not fault:
        return f'<path class="link" d="{path}"><title>{escape(title)}</title></path>'
    said = f'<text class="small" x="{(x + y) / 2:g}" y="{start + bend:g}">{escape(fault)}</text>'
    return f'<path class="link faulty" d="{path}"><title>{escape(f"{title}: {fault}")}</title></path>{said}'


def _machine(node: NodeSpec, spot: Spot, pods: list[tuple[str, str]]) -> str:
    rows = [("name", node.name), ("small", _about(node)), *(("small", f"{name} {address}") for name, address in pods)]
    texts = "".join(
        f'<text class="{kind}" x="{spot.middle:g}" y="{spot.y + 19 + LINE * index:g}">{escape(text)}</text>'
        for index, (kind, text) in enumerate(rows)
    )
    box = (
        f'<rect class="box {node.role}" x="{spot.x:g}" y="{spot.y:g}" width="{WIDTH}" height="{spot.height:g}" rx="6"/>'
    )
    return f"<g id={quoteattr(node.name)}>{box}{texts}</g>"


def _about(node: NodeSpec) -> str:
    if node.bridge_address:
        return f"{node.bridge_address} · AS {node.asn}" + (f" · {node.vrf}" if node.vrf else "")
    return f"{node.ip} · AS {node.asn}" if node.asn and node.role is Role.SPINE else str(node.ip)
