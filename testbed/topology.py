"""Reads a lab's description, `topologies/NAME.yml`, and lays the lab out from it.

Every fault of a file is found in one reading.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from testbed import data, model
from testbed.errors import Fault, InputError
from testbed.linkfault import problems
from testbed.model import LabSpec, Rack
from testbed.topologyfile import (
    CONTROL_PLANE,
    MAX_MTU,
    MAX_SPINES,
    MIN_MTU,
    RESERVED,
    RESERVED_NAMES,
    Address,
    ClosModel,
    LinkModel,
    Name,
    OptionModel,
    RackModel,
    Subnet,
    TopologyModel,
)
from testbed.yamlmarks import Document, parse, read_text
from testbed.yamlmarks import Path as Loc

SUFFIX = ".yml"

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Topology:
    """A shipped topology: its name, what it is, and its options with their defaults."""

    name: str
    description: str
    options: Mapping[str, Any]


def list_topologies() -> tuple[Topology, ...]:
    """Every shipped topology, by name."""
    found = []
    for path in sorted(data.folder("topologies").glob(f"*{SUFFIX}")):
        documents, _ = parse(path.read_text(encoding="utf-8"), path.name)
        content = documents[0].value if documents else {}
        options = {name: option["default"] for name, option in content.get("options", {}).items()}
        found.append(Topology(path.stem, str(content.get("description", "")), options))
    return tuple(found)


def load_topology(
    name_or_path: str, lab_id: str, *, overrides: Mapping[str, str] | None = None, mtu: int | None = None
) -> LabSpec:
    """Return the lab that a topology describes.

    `name_or_path` is a shipped topology's name, or a path: anything with a slash or that ends in .yml or .yaml.
    `overrides` are the `--set KEY=VALUE` of the command line, `mtu` is `--mtu` and wins over the file.
    Raises InputError with every fault of the file and of the options.
    """
    path = _find(name_or_path)
    file = _Reading(path.stem, str(path), overrides or {}, mtu)
    return file.lab(lab_id, read_text(str(path), what="topology"))


def _find(name: str) -> Path:
    if "/" in name or name.endswith((SUFFIX, ".yaml")):
        return Path(name)
    known = {path.stem: path for path in data.folder("topologies").glob(f"*{SUFFIX}")}
    if name in known:
        return known[name]
    hint = f"these are: {', '.join(sorted(known))}; or give a path to a .yml file"
    raise InputError(f"there is no topology called {name!r}", where="--topology", hint=hint)


class _Reading:
    """One reading of one file: collects the faults of all its parts."""

    def __init__(self, topology: str, file: str, overrides: Mapping[str, str], mtu: int | None) -> None:
        self.topology = topology
        self.file = file
        self.overrides = overrides
        self.mtu = mtu
        self.faults: list[Fault] = []
        self.unresolved: set[Loc] = set()
        self.document = Document(file, {})

    def lab(self, lab_id: str, text: str) -> LabSpec:
        documents, self.faults = parse(text, self.file)
        if len(documents) > 1:
            self.faults.append(documents[1].fault((), "a second document", "one file describes one topology"))
        if documents and isinstance(documents[0].value, dict):
            self.document = documents[0]
        elif not self.faults:
            self.faults.append(Fault(self.file, 1, "", "has to be a mapping of keys such as racks and mtu"))
        self.stop_if(not self.document.value)
        values = self.options(self.document.value.get("options"))
        # What declares the options cannot be one of them.
        content = {
            key: item if key == "options" else self.substitute(item, values, (key,))
            for key, item in self.document.value.items()
        }
        spec = self.validate(TopologyModel, content, ())
        self.check_mtu_option()
        racks = self.racks(content)
        self.cross_check(racks, content)
        self.check_links(racks, content)
        self.stop_if(bool(self.faults))
        assert spec is not None
        return model.fabric(
            lab_id,
            self.topology,
            mtu=self.mtu if self.mtu is not None else spec.mtu,
            spines=_numbered("spine", spec.spines),
            racks=[
                Rack(rack.leaf, rack.subnet, tuple(name for _, name in rack.nodes))
                for rack in racks
                if rack.leaf is not None and rack.subnet is not None
            ],
            outside=spec.outside,
            control_plane=spec.control_plane or racks[0].nodes[0][1],
            leaf_vrf=spec.leaf_vrf,
            faults={name: link.fault for name, link in spec.links.items()},
        )

    def stop_if(self, ended: bool) -> None:
        if ended:
            # Several checks may find one mistake; by line, so that they read as the file does.
            faults = sorted(dict.fromkeys(self.faults), key=lambda fault: (fault.file != self.file, fault.line))
            raise InputError(faults=faults)

    def fault(self, path: Loc, what: str, hint: str = "") -> None:
        self.faults.append(self.document.fault(path, what, hint))

    def options(self, declared: Any) -> dict[str, Any]:
        """The value of every option: from the command line, else its default."""
        options: dict[str, OptionModel] = {}
        for name, raw in declared.items() if isinstance(declared, dict) else ():
            option = self.validate(OptionModel, raw, ("options", name), report=False)
            if option is not None:
                options[name] = option
        values: dict[str, Any] = {name: option.default for name, option in options.items()}
        for name, text in self.overrides.items():
            if name in options:
                value, problem = options[name].read(text)
                if problem:
                    self.faults.append(Fault("--set", 0, name, problem))
                else:
                    values[name] = value
            elif not (isinstance(declared, dict) and name in declared):
                close = difflib.get_close_matches(name, options, n=1)
                known = f"options: {', '.join(options)}" if options else "it has no options"
                hint = f"did you mean {close[0]}?" if close else known
                self.faults.append(Fault("--set", 0, name, f"the topology {self.topology} has no such option", hint))
        return values

    def substitute(self, value: Any, options: Mapping[str, Any], path: Loc) -> Any:
        """The file's content with `$NAME` replaced by the option of that name."""
        if isinstance(value, dict):
            return {key: self.substitute(item, options, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self.substitute(item, options, (*path, position)) for position, item in enumerate(value)]
        if isinstance(value, str) and re.fullmatch(r"\$[A-Za-z_][A-Za-z0-9_]*", value):
            if value[1:] in options:
                return options[value[1:]]
            self.unresolved.add(path)
            declared = self.document.value.get("options")
            if not (isinstance(declared, dict) and value[1:] in declared):
                self.fault(path, f"there is no option {value[1:]}", "declare it under options")
        return value

    def validate(self, kind: type[Model], raw: Any, path: Loc, *, report: bool = True) -> Model | None:
        """The model of a part of the file; None where it has faults, which are noted if `report` is on."""
        try:
            return kind.model_validate(raw)
        except ValidationError as error:
            for detail in error.errors(include_url=False) if report else ():
                where = (*path, *detail["loc"])
                if where not in self.unresolved:
                    self.fault(where, *_explain(dict(detail), kind))
            return None

    def check_mtu_option(self) -> None:
        if self.mtu is None:
            return
        if not MIN_MTU <= self.mtu <= MAX_MTU:
            self.faults.append(Fault("--mtu", 0, "", f"{self.mtu} is not from {MIN_MTU} to {MAX_MTU}"))
        if "mtu" in self.overrides:
            self.faults.append(Fault("--set", 0, "mtu", "--mtu says it too", "give one of them"))

    def racks(self, content: Mapping[str, Any]) -> list[_Piece]:
        """Every rack with what of it is in order by itself; a clos's racks are laid out here."""
        if None not in (content.get("racks"), content.get("clos")):
            self.fault(("clos",), "a topology has racks or clos, not both", "remove one of them")
        elif content.get("racks") is None and content.get("clos") is None:
            self.fault((), "no racks", "describe them under racks, or a whole fabric under clos")
        listed = content.get("racks")
        if isinstance(listed, list):
            return [_piece(("racks", position), raw) for position, raw in enumerate(listed) if isinstance(raw, dict)]
        clos = self.validate(ClosModel, content.get("clos"), ("clos",), report=False)
        return list(self.lay_out(clos)) if clos is not None else []

    def lay_out(self, clos: ClosModel) -> Iterable[_Piece]:
        if clos.prefix < clos.subnets.prefixlen or 1 << (clos.prefix - clos.subnets.prefixlen) < clos.racks:
            self.fault(("clos", "subnets"), f"{clos.subnets} has no {clos.racks} subnets of /{clos.prefix}")
            return
        subnets = clos.subnets.subnets(new_prefix=clos.prefix)
        names = [CONTROL_PLANE, *_numbered("worker", clos.racks * clos.nodes - 1)]
        for number, subnet in zip(range(clos.racks), subnets, strict=False):
            nodes = names[number * clos.nodes : (number + 1) * clos.nodes]
            yield _Piece(("clos",), f"leaf{number + 1}", subnet, tuple(enumerate(nodes)), len(nodes))

    def cross_check(self, racks: Sequence[_Piece], content: Mapping[str, Any]) -> None:
        """What no part shows by itself: names and subnets that meet, nodes that do not fit."""
        self.check_names(racks, content)
        subnets = [(f"{net} ({what})", net) for what, net in RESERVED.items()]
        for rack in racks:
            if rack.subnet is not None:
                self.check_subnet(rack, rack.subnet, subnets)
                subnets.append((f"{rack.subnet} of {rack.leaf or 'another rack'}", rack.subnet))
        if content.get("spines") == 0 and len(racks) > 1:
            self.fault(("spines",), "racks reach each other through spines only", "give at least one spine")
        address = _valid(_ADDRESS, content.get("outside"))
        for other, net in subnets:
            if address is not None and address in net:
                self.fault(("outside",), f"{address} is inside {other}")

    def check_links(self, racks: Sequence[_Piece], content: Mapping[str, Any]) -> None:
        """Links that there are, each once, with faults that make sense."""
        links, known = content.get("links"), _links_of(racks, content)
        seen: dict[frozenset[str], str] = {}
        for name, raw in links.items() if isinstance(links, dict) else ():
            where, ends = ("links", name), frozenset(str(name).split("-"))
            if known and (ends not in known or str(name).count("-") != 1):
                names = ["-".join(pair) for pair in known.values()]
                close = difflib.get_close_matches(str(name), names, n=1)
                hint = f"did you mean {close[0]}?" if close else f"links: {', '.join(names[:20])}"
                self.fault(where, "there is no such link", hint)
            elif ends in seen:
                self.fault(where, f"is {seen[ends]}, which is here already", "say all of a link in one place")
            seen[ends] = str(name)
            link = self.validate(LinkModel, raw, where, report=False)
            for key, what, hint in problems(link.fault, known.get(ends, ())) if link is not None else ():
                self.fault((*where, key) if key else where, what, hint)

    def check_subnet(self, rack: _Piece, subnet: IPv4Network, others: Iterable[tuple[str, IPv4Network]]) -> None:
        where = (*rack.path, "subnet" if rack.path[0] == "racks" else "subnets")
        for other, net in others:
            if net.overlaps(subnet):
                self.fault(where, f"{subnet} overlaps {other}")
                break
        # The subnet's last address is its broadcast address.
        room = max(subnet.num_addresses - 1 - model.FIRST_HOST, 0)
        if len(rack.nodes) > room:
            hint = f"nodes start at host {model.FIRST_HOST}: give a wider subnet"
            self.fault(where, f"{subnet} has room for {room} nodes, not {len(rack.nodes)}", hint)

    def check_names(self, racks: Sequence[_Piece], content: Mapping[str, Any]) -> None:
        spines = content.get("spines")
        count = spines if isinstance(spines, int) else 0
        taken = dict.fromkeys(_numbered("spine", min(count, MAX_SPINES)), "a spine")
        taken |= dict.fromkeys(RESERVED_NAMES, "a machine that every lab has")
        nodes: set[str] = set()
        for rack in racks:
            names = [((*rack.path, "leaf"), rack.leaf, "a leaf")] if rack.leaf else []
            names += [
                ((*rack.path, "nodes", i), name, f"a node of {rack.leaf or 'the same rack'}") for i, name in rack.nodes
            ]
            for where, name, role in names:
                if name in taken:
                    self.fault(where, f"{name} is already {taken[name]}", "names are used once in a lab")
                taken.setdefault(name, role)
            nodes.update(name for _, name in rack.nodes)
        chosen = content.get("control_plane")
        if isinstance(chosen, str) and nodes and chosen not in nodes:
            self.fault(("control_plane",), f"there is no node {chosen}", f"nodes: {', '.join(sorted(nodes)[:20])}")


@dataclass(frozen=True, slots=True)
class _Piece:
    """What of a rack is in order by itself; `nodes` with their positions in the file's list."""

    path: Loc
    leaf: str | None
    subnet: IPv4Network | None
    nodes: tuple[tuple[int, str], ...]
    of: int  # how many nodes the file names


def _links_of(racks: Sequence[_Piece], content: Mapping[str, Any]) -> dict[frozenset[str], tuple[str, str]]:
    """The machines at the ends of every link; none where what is wrong with the racks would show again here."""
    spines, listed = content.get("spines"), content.get("racks")
    whole = bool(racks) and all(rack.leaf and len(rack.nodes) == rack.of for rack in racks)
    if not whole or not isinstance(spines, int) or (isinstance(listed, list) and len(listed) != len(racks)):
        return {}
    above = _numbered("spine", min(spines, MAX_SPINES))
    leaves = [str(rack.leaf) for rack in racks]
    pairs = [(node, str(rack.leaf)) for rack in racks for _, node in rack.nodes]
    pairs += [(leaf, spine) for leaf in leaves for spine in above]
    pairs += [("outside", router) for router in above or leaves]
    return {frozenset(pair): pair for pair in pairs}


_NAME: TypeAdapter[str] = TypeAdapter(Name)
_SUBNET: TypeAdapter[IPv4Network] = TypeAdapter(Subnet)
_ADDRESS: TypeAdapter[IPv4Address] = TypeAdapter(Address)
Value = TypeVar("Value")


def _valid(kind: TypeAdapter[Value], raw: Any) -> Value | None:
    try:
        return kind.validate_python(raw)
    except ValidationError:
        return None


def _piece(path: Loc, raw: Mapping[str, Any]) -> _Piece:
    listed = raw.get("nodes")
    items = listed if isinstance(listed, list) else []
    names = [(i, _valid(_NAME, item)) for i, item in enumerate(items)]
    nodes = tuple((i, name) for i, name in names if name is not None)
    return _Piece(path, _valid(_NAME, raw.get("leaf")), _valid(_SUBNET, raw.get("subnet")), nodes, len(items))


def _numbered(stem: str, count: int) -> list[str]:
    return [f"{stem}{number}" for number in range(1, count + 1)]


_WANTED = {
    "int_type": "has to be a number",
    "int_from_float": "has to be a whole number",
    "string_type": "has to be text",
    "list_type": "has to be a list",
    "dict_type": "has to be a mapping",
    "model_type": "has to be a mapping",
    "too_short": "has to hold at least one",
    "missing": "missing",
}


def _explain(detail: dict[str, Any], kind: type[BaseModel]) -> tuple[str, str]:
    """What a validation error means, and what to do."""
    given, context = detail.get("input"), detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden":
            known = _keys_at(kind, detail["loc"])
            close = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
            return "unknown key", f"did you mean {close[0]}?" if close else f"keys here: {', '.join(known)}"
        case "greater_than_equal":
            return f"{given} is too small", f"at least {context['ge']}"
        case "less_than_equal":
            return f"{given} is too large", f"at most {context['le']}"
        case "value_error":
            what, _, hint = str(context["error"]).partition("; ")
            return what, hint
        case "literal_error":
            return f"{given!r} is not known", f"one of {context['expected']}"
        case "missing":
            return _WANTED["missing"], ""
        case known_type:
            return f"{_WANTED.get(known_type, detail['msg'])}, not {_short(given)}", ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _keys_at(kind: type[BaseModel], loc: Sequence[str | int]) -> list[str]:
    """The keys that are known where an unknown one was found."""
    current: Any = kind
    for part in loc[:-1]:
        if isinstance(part, str) and part in getattr(current, "model_fields", {}):
            current = {"racks": RackModel, "clos": ClosModel, "options": OptionModel, "links": LinkModel}.get(
                part, current
            )
    return list(current.model_fields)
