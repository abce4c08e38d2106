"""The catalogue of checks, the marker that ties a function of `suites/` to its row, and the paths between pods."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import yaml

from testbed.data import folder
from testbed.errors import LabError
from testbed.flannelspec import BACKENDS
from testbed.linkfault import NETEM
from testbed.model import LabSpec
from testbed.probes.capture import Inconclusive

TRAFFIC = ("SN", "SS", "XS", "PN", "OUT")
"""Paths that a check is run along one by one; a check of any other path chooses its ends itself."""

PATHS = (*TRAFFIC, "NP", "CIP", "NPL", "NPR", "HN", "HP", "EXT", "ctl")

LABS = ("netns", "clab", "kube", "kind", "cluster", "ssh")

KERNEL_NEEDS = (NETEM,)
"""What rows may need that is a feature of the kernel: the run is skipped, or goes to the guest, where it is missing."""

F = TypeVar("F")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the catalogue. `reason` says what it waits for, "" where nothing stands in its way."""

    id: str
    group: str
    claim: str
    backends: tuple[str, ...]
    paths: tuple[str, ...]
    source: str
    mutation: str
    lab: tuple[str, ...]
    smoke: bool
    needs: str
    reason: str


def catalogue_path() -> Path:
    """The folder with the catalogue: `index.yaml` names the groups in their order, each a file of its rows."""
    return folder("suites") / "catalogue"


@cache
def load_catalogue(path: Path | None = None) -> Mapping[str, Row]:
    """Every row by id, in the catalogue's order. Raises LabError for a catalogue that is broken."""
    path = path or catalogue_path()
    try:
        index = _read(path / "index.yaml")
        rows = [_row(item, index["needs"]) for group in index["groups"] for item in _read(path / f"{group}.yaml")]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise LabError(f"the catalogue is broken: {error!r}", where=str(path)) from error
    by_id = {row.id: row for row in rows}
    if len(by_id) != len(rows):
        raise LabError("the catalogue has an id twice", where=str(path))
    return by_id


_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _read(path: Path) -> Any:
    return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 (a safe loader)


def _row(item: Mapping[str, Any], needs: Mapping[str, str]) -> Row:
    unknown = set(item) - {*Row.__dataclass_fields__, "backends_note"}
    wrong = (set(item["backends"]) - set(BACKENDS)) | (set(item["paths"]) - set(PATHS)) | (set(item["lab"]) - set(LABS))
    if unknown or wrong:
        raise ValueError(f"{item['id']}: {', '.join(sorted(unknown | wrong))} is not known")
    need = item.get("needs", "")
    return Row(
        id=item["id"],
        group=item["group"],
        claim=item["claim"],
        backends=tuple(item["backends"]),
        paths=tuple(item["paths"]),
        source=item["source"],
        mutation=item["mutation"],
        lab=tuple(item["lab"]),
        smoke=bool(item.get("smoke", False)),
        needs=need,
        reason=needs[need] if need else "",
    )


def check(
    row: str, *, encapsulated: bool = False, direct: bool = False, rules: str = "", disruptive: bool = False
) -> Callable[[F], F]:
    """Mark a function of `suites/` as the check of a catalogue row.

    With a `path` fixture it runs once for each of the row's paths.  `encapsulated` leaves out the paths that the
    backend under test goes without a tunnel, `direct` those that it encapsulates.  With `rules` it is about runs with
    those (`--rules`) only.  `disruptive` says that it takes from the lab, for a while, what other checks rely on: it
    comes behind all that are not, and has put everything right again when it ends.
    """
    import pytest  # listing the catalogue does without it

    mark = pytest.mark.check(row, encapsulated=encapsulated, direct=direct, rules=rules, disruptive=disruptive)
    return cast("Callable[[F], F]", mark)


def inconclusive(reason: str) -> NoReturn:
    """End a check that cannot tell, with that verdict and reason."""
    raise Inconclusive(reason)


def implemented(suites: Path | None = None) -> Mapping[str, str]:
    """The rows that a function of `suites/` checks, as `id: file::function`, read from the functions themselves."""
    found: dict[str, str] = {}
    suites = suites or folder("suites")
    for path in sorted(suites.glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8"), str(path)).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and (row := _marked(node)):
                found[row] = f"{path.name}::{node.name}"
    return found


def _marked(function: ast.FunctionDef) -> str | None:
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Name) and decorator.func.id == "check":
            first = decorator.args[0]
            return str(first.value) if isinstance(first, ast.Constant) else None
    return None


@dataclass(frozen=True, slots=True)
class PathSpec:
    """A path that packets take, by the names of its ends; "" and "" where the lab has no such path."""

    kind: str
    source: str = ""
    target: str = ""
    reason: str = ""  # why it cannot be taken

    def __str__(self) -> str:
        return f"{self.kind}-{self.source}->{self.target}" if self.source else self.kind


def client_node(lab: LabSpec) -> str:
    """The node of the client pod: the first that is not the control plane."""
    names = [node.name for node in lab.cluster_nodes]
    return next((name for name in names if name != lab.control_plane), names[0])


def paths_of(lab: LabSpec, backend: str) -> Mapping[str, PathSpec]:
    """Each kind of traffic path in a lab, from its client pod; with the reason where there is none."""
    client = client_node(lab)
    others = [n.name for n in lab.cluster_nodes if n.name not in (client, lab.control_plane)]
    others += [lab.control_plane] if lab.control_plane != client else []
    source = f"{client}/client"
    near = next((name for name in others if lab.same_subnet(client, name)), None)
    far = next((name for name in others if not lab.same_subnet(client, name)), None)
    found = {
        "SN": PathSpec("SN", source, f"{client}/testapp"),
        "SS": PathSpec("SS", reason=f"{lab.topology} has no two nodes in one subnet"),
        "XS": PathSpec("XS", reason=f"{lab.topology} has no two nodes in different subnets"),
        "PN": PathSpec("PN", reason=f"{lab.topology} has only one node"),
        "OUT": PathSpec("OUT", source, lab.outside.name),
    }
    if near:
        found["SS"] = PathSpec("SS", source, f"{near}/testapp")
    if far and BACKENDS[backend].tunnels:
        found["XS"] = PathSpec("XS", source, f"{far}/testapp")
    elif far:
        found["XS"] = PathSpec("XS", reason="host-gw reaches only the nodes of its own subnet")
    if near or far:
        found["PN"] = PathSpec("PN", source, str(near or far))
    return found


def applies(kind: str, backend: str, *, encapsulated: bool, direct: bool) -> bool:
    """Whether a check that is about tunnelled, or direct, packets is about that path of that backend."""
    run = BACKENDS[backend]
    tunnelled = kind == "XS" or (kind == "SS" and not run.direct)
    if encapsulated:
        return run.tunnels and tunnelled
    return not direct or not (run.tunnels and tunnelled)
