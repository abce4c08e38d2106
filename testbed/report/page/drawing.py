"""The lab of a check as a drawing, with the way of its packets on it. Pure; colours are the page's style sheet's.

Fabric above, nodes below.  The two ends of the way show their interfaces, the wire on top and the pod at the bottom,
so that the way is a line down, up and across; it ends in a cross where the packet was lost.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from testbed.report.page.lost import Lost, Station

WIDTH, GAP, MARGIN = 156, 20, 14
HEAD, CHIP, CHIP_GAP = 44, 26, 14
ROW_GAP = 58
MOST_NODES = 12
"""Nodes that are all drawn; of a larger lab only those on the way."""

ROWS = ("outside", "spine", "leaf", "node")
DEPTH = {"wire": 0, "tunnel": 1, "bridge": 2, "veth": 3, "pod": 4}


@dataclass(frozen=True, slots=True)
class Point:
    """A place on the drawing, in pixels."""

    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Box:
    """A machine on the drawing."""

    x: float
    y: float
    height: float

    @property
    def top(self) -> Point:
        """Where cables from above end."""
        return Point(self.x + WIDTH / 2, self.y)

    @property
    def bottom(self) -> Point:
        """Where cables from below end."""
        return Point(self.x + WIDTH / 2, self.y + self.height)


class Drawing:
    """A lab with a way on it; `markup` is the SVG."""

    def __init__(
        self,
        lab: Mapping[str, Any],
        way: Sequence[Station] = (),
        found: Lost | None = None,
        fabric: Collection[str] = (),
        *,
        narrow: bool = False,
    ) -> None:
        self.lab = lab
        self.narrow = narrow  # what is on the way, nothing else: for a phone
        self.fabric = set(fabric)  # the routers that it came through, where that is known
        self.way = list(way)
        self.found = found
        self.direction = found.direction if found else "there"
        self.machines = self._shown()
        self.boxes: dict[str, Box] = {}
        self.chips: dict[str, Point] = {}
        self._lay_out()

    def _shown(self) -> list[Mapping[str, Any]]:
        machines = list(self.lab.get("machines", ()))
        if not self.narrow and sum(machine["role"] == "node" for machine in machines) <= MOST_NODES:
            return machines
        ends = {station.machine for station in self.way}
        racks = {machine["rack"] for machine in machines if machine["name"] in ends}
        spines = [m for m in machines if m["role"] == "spine" and not (self.narrow and len(racks) < 2)][:4]
        return [m for m in machines if m["name"] in ends or m["name"] in racks or m in spines]

    @property
    def whole(self) -> bool:
        """Whether nothing of the lab is left out."""
        return len(self.machines) == len(self.lab.get("machines", ()))

    def _of(self, role: str) -> list[Mapping[str, Any]]:
        return [machine for machine in self.machines if machine["role"] == role]

    def _stack(self, machine: str) -> list[Station]:
        """A node's interfaces on the way, the wire first."""
        own = [s for s in self.way if s.machine == machine and not s.at.startswith("outside:")]
        if len({station.machine for station in self.way}) == 1:
            return own  # from pod to pod on one node
        return sorted(own, key=lambda station: DEPTH.get(station.kind, 0))

    def _lay_out(self) -> None:
        rows = [role for role in ROWS if self._of(role)]
        top = {role: MARGIN + index * (HEAD + ROW_GAP) for index, role in enumerate(rows)}
        x = float(MARGIN)
        for rack in self._racks():
            begin = x
            for node in rack:
                stack = self._stack(str(node["name"]))
                height = HEAD + (len(stack) * (CHIP + CHIP_GAP) + 4 if stack else 0)
                self.boxes[str(node["name"])] = Box(x, top["node"], height)
                self._place_chips(stack, x, top["node"] + HEAD)
                x += WIDTH + GAP
            leaf = next((m for m in self._of("leaf") if m["name"] == rack[0]["rack"]), None)
            if leaf is not None:
                self.boxes[str(leaf["name"])] = Box((begin + x - GAP - WIDTH) / 2, top["leaf"], HEAD)
            x += GAP
        whole = max(x - 2 * GAP, MARGIN + WIDTH)
        for role in ("spine", "outside"):
            row = self._of(role)
            begin = max(MARGIN, (MARGIN + whole - len(row) * (WIDTH + 2 * GAP) + 2 * GAP) / 2)
            for position, machine in enumerate(row):
                self.boxes[str(machine["name"])] = Box(begin + position * (WIDTH + 2 * GAP), top[role], HEAD)

    def _racks(self) -> list[list[Mapping[str, Any]]]:
        racks: dict[str, list[Mapping[str, Any]]] = {}
        for node in self._of("node"):
            racks.setdefault(str(node["rack"]), []).append(node)
        return list(racks.values())

    def _place_chips(self, stack: Sequence[Station], x: float, y: float) -> None:
        """The interfaces of a node below each other; two pods of one node side by side would not fit a phone."""
        for position, station in enumerate(stack):
            self.chips[station.at] = Point(x + WIDTH / 2, y + position * (CHIP + CHIP_GAP) + CHIP / 2)

    # --- the markup

    def markup(self, title: str) -> Markup:
        """The drawing as SVG."""
        if not self.boxes:
            return Markup()
        width = max(box.x + WIDTH for box in self.boxes.values()) + MARGIN
        height = max(box.y + box.height for box in self.boxes.values()) + MARGIN
        nodes, others = self._of("node"), [machine for machine in self.machines if machine["role"] != "node"]
        parts = [*self._cables(), *map(self._frame, nodes), *self._way_lines(), *map(self._name, nodes)]
        for machine in others:
            parts += [self._frame(machine), self._name(machine)]
        parts += [*self._chip_marks(), *self._cross()]
        label = Markup('<svg class="lab{n}" viewBox="0 0 {w:g} {h:g}" width="{w:g}" height="{h:g}" role="img">').format(
            n=" narrow" if self.narrow else "", w=width, h=height
        )
        return label + Markup("<title>{}</title>").format(title) + Markup("").join(parts) + Markup("</svg>")

    def _cables(self) -> list[Markup]:
        found = []
        for one, other in self.lab.get("cables", ()):
            a, b = (self.boxes.get(str(end).partition(":")[0]) for end in (one, other))
            if a and b:
                upper, lower = (a, b) if a.y < b.y else (b, a)
                found.append(_curve(upper.bottom, lower.top, "cable", f"{one} – {other}"))
        return found

    def _frame(self, machine: Mapping[str, Any]) -> Markup:
        box = self.boxes.get(str(machine["name"]))
        if box is None:
            return Markup()
        return Markup('<rect class="frame {}" x="{:g}" y="{:g}" width="{}" height="{:g}" rx="7"/>').format(
            machine["role"], box.x, box.y, WIDTH, box.height
        )

    def _name(self, machine: Mapping[str, Any]) -> Markup:
        box = self.boxes.get(str(machine["name"]))
        if box is None:
            return Markup()
        about = str(machine.get("address") or "")
        if machine.get("asn") and machine["role"] != "outside":
            about += f" · AS {machine['asn']}"
        name = Markup('<text class="name" x="{:g}" y="{:g}">{}</text>').format(box.top.x, box.y + 18, machine["name"])
        more = Markup('<text class="small" x="{:g}" y="{:g}">{}</text>').format(box.top.x, box.y + 33, about)
        return Markup('<g class="on {}">{}{}</g>').format(machine["role"], name, more)

    def _count(self, station: Station) -> int:
        return station.there if self.direction == "there" else station.back

    def _chip_marks(self) -> list[Markup]:
        marks = []
        for station in self.way:
            at = self.chips.get(station.at)
            if at is None:
                continue
            number = self._count(station)
            state = "seen" if number else "unseen" if station.readable else "dark"
            if self.found is not None and self.found.after is not None and station.at == self.found.after.at:
                state = "last"
            name = station.at.partition("/")[2] if station.kind == "pod" else station.at.partition(":")[2]
            short = name if len(name) <= 16 else f"{name[:7]}…{name[-7:]}"
            shown = f"{short}  {number}×" if number else short
            marks.append(
                Markup(
                    '<g class="chip {state}"><title>{at}: {there} there, {back} back</title>'
                    '<rect x="{x:g}" y="{y:g}" width="{w}" height="{h}" rx="13"/>'
                    '<text x="{tx:g}" y="{ty:g}">{text}</text></g>'
                ).format(
                    state=state,
                    at=station.at,
                    there=station.there,
                    back=station.back,
                    x=at.x - (WIDTH - 16) / 2,
                    y=at.y - CHIP / 2,
                    w=WIDTH - 16,
                    h=CHIP,
                    tx=at.x,
                    ty=at.y + 4,
                    text=shown,
                )
            )
        return marks

    def _ordered(self) -> list[Station]:
        """The way in the direction that is drawn."""
        return self.way if self.direction == "there" else self.way[::-1]

    def _segments(self) -> list[tuple[list[list[Point]], str]]:
        """The lines between stations, each as one or (over several spines) more, with its state."""
        found = []
        broken = False
        for one, other in zip(self._ordered(), self._ordered()[1:], strict=False):
            lost_here = (
                self.found is not None
                and self.found.after is not None
                and self.found.before is not None
                and (one.at, other.at) == (self.found.after.at, self.found.before.at)
            )
            state = "broken" if lost_here else "never" if broken else "taken"
            if not lost_here and not broken and not self._count(other) and other.readable:
                state = "never"
            broken |= lost_here
            found.append((self._between(one, other), state))
        return found

    def _between(self, one: Station, other: Station) -> list[list[Point]]:
        a, b = self._spot(one), self._spot(other)
        if a is None or b is None:
            return []
        if one.machine == other.machine:
            return [[a, b]]
        return self._over_fabric(one, other, a, b)

    def _spot(self, station: Station) -> Point | None:
        if station.at in self.chips:
            return self.chips[station.at]
        box = self.boxes.get(station.machine)
        return box.bottom if box else None

    def _rack(self, name: str) -> str:
        return next((str(m["rack"]) for m in self.machines if m["name"] == name and m["rack"]), "")

    def _over_fabric(self, one: Station, other: Station, a: Point, b: Point) -> list[list[Point]]:
        near, far = (self.boxes.get(self._rack(station.machine)) for station in (one, other))
        names = [str(machine["name"]) for machine in self._of("spine")]
        spines = [self.boxes[name] for name in names if name in self.fabric or not self.fabric & set(names)]
        if near is not None and near is far:
            return [[a, _middle(near), b]]
        if near is None or far is None or not spines:
            spines = spines or [box for box in (near, far) if box]
            return [[a, *map(_middle, spines[:1]), b]]
        ways = [[_middle(near), _middle(spine), _middle(far)] for spine in spines]
        return [[a, *ways[0], b]] if len(ways) == 1 else [[a, _middle(near)], *ways, [_middle(far), b]]

    def _way_lines(self) -> list[Markup]:
        return [
            Markup('<path class="way {}{}" d="{}"/>').format(
                state, " several" if len(paths) > 1 and len(points) > 2 else "", _line(points)
            )
            for paths, state in self._segments()
            for points in paths
        ]

    def _cross(self) -> list[Markup]:
        """Where it was lost."""
        if self.found is None or self.found.after is None or self.found.before is None:
            return []
        a, b = self._spot(self.found.after), self._spot(self.found.before)
        if a is None or b is None:
            return []
        if self.found.after.machine == self.found.before.machine:
            at = Point((a.x + b.x) / 2, (a.y + b.y) / 2)
        else:  # over several spines: which of them it took is not known
            ways = [way for way in self._between(self.found.after, self.found.before) if len(way) > 2]
            middles = [way[len(way) // 2] for way in ways] or [a, b]
            at = Point(sum(p.x for p in middles) / len(middles), sum(p.y for p in middles) / len(middles))
        return [
            Markup('<g class="cross"><circle cx="{x:g}" cy="{y:g}" r="10"/><path d="{d}"/></g>').format(
                x=at.x, y=at.y, d=f"M{at.x - 4:g} {at.y - 4:g}l8 8m0 -8l-8 8"
            )
        ]


def _line(points: Sequence[Point]) -> str:
    return " ".join(f"{'L' if index else 'M'}{point.x:g} {point.y:g}" for index, point in enumerate(points))


def _middle(box: Box) -> Point:
    return Point(box.x + WIDTH / 2, box.y + box.height / 2)


def both_sizes(
    lab: Mapping[str, Any], way: Sequence[Station], found: Lost | None, title: str, *, fabric: Collection[str] = ()
) -> Markup:
    """The drawing for a wide screen and, where that leaves something out, the one for a narrow screen."""
    whole, part = (Drawing(lab, way, found, fabric, narrow=narrow) for narrow in (False, True))
    return whole.markup(title) + (Markup() if part.whole else part.markup(title))


def _curve(upper: Point, lower: Point, kind: str, title: str) -> Markup:
    half = (lower.y - upper.y) / 2
    near, far = f"{upper.x:g} {upper.y + half:g}", f"{lower.x:g} {lower.y - half:g}"
    path = f"M{upper.x:g} {upper.y:g}C{near} {far} {lower.x:g} {lower.y:g}"
    return Markup('<path class="{}" d="{}"><title>{}</title></path>').format(kind, path, escape(title))
