"""Mutations as data: what is made wrong, for which row of the catalogue, and which assertion has to notice it."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Container, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from testbed.checks import implemented, load_catalogue
from testbed.data import folder
from testbed.errors import Fault, InputError
from testbed.flannelspec import BACKENDS
from testbed.yamlmarks import Document, parse, read_text

PROGRAMS = ("ip", "bridge", "iptables", "ip6tables", "iptables-legacy", "nft", "sysctl", "tc", "wg", "mount", "umount")
"""What a mutation may call on a machine: it acts on the network, or on which programs a node has, never on what looks
at it."""

Place = Literal[
    "client", "peer", "leaf", "everywhere", "control_plane", "client_pod", "local_pod", "peer_pod"
]  # fmt: skip
"""Where in a lab: on the client pod's node, the node of its remote peer, the client's leaf, every cluster node, the
control plane; in the client pod, another pod of its node, or the remote peer's pod."""

NAMES = frozenset(
    {
        *"bridge tunnel vni port network outside nic gateway mtu router pod_ip pod_mac local_ip peer_pod_ip".split(),
        *"veth local_veth peer_veth underlay uplink".split(),
        *"tunnel6 network6 gateway6 router6 pod_ip6 peer_pod_ip6 mtu6 outside_ip6".split(),
        *(
            f"{node}_{key}"
            for node in ("own", "client", "peer", "near", "other", "unused")
            for key in "ip cidr base mac nic_mac key ip6 cidr6 base6 mac6".split()
        ),
    }
)
"""What braces in a mutation's words stand for, as seen from the machine that it acts on; see `making.Scene.words`.

The client's node has a path to `peer` and to `near`; `other` is neither the client's nor the peer's, `unused` is none
of these three where there are so many."""

_BRACES = re.compile(r"\{(\w+)\}")


def _words(value: Any) -> Any:
    return shlex.split(value) if isinstance(value, str) else value


def _allowed(argv: list[str]) -> list[str]:
    if not argv or argv[0] not in PROGRAMS:
        raise ValueError(f"{' '.join(argv)!r} calls none of {', '.join(PROGRAMS)}")
    unknown = {name for word in argv for name in _BRACES.findall(word)} - NAMES
    if unknown:
        raise ValueError(f"{' '.join(argv)!r} has {{{', '.join(sorted(unknown))}}}, which stands for nothing")
    return argv


Command = Annotated[list[str], BeforeValidator(_words), AfterValidator(_allowed)]
"""Words of a command; written as one line, which no shell sees."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Replacement(_Model):
    """A function of the bundled flannel, and what stands in its place: `text` defines `mutant(original, …)`."""

    module: str = Field(pattern=r"^flannel(\.\w+)+$")
    function: str
    text: str

    @model_validator(mode="after")
    def _is_there(self) -> Replacement:
        if self.function not in _functions_of(self.module):
            raise ValueError(f"{self.module} has no function {self.function}")
        try:
            defined = _functions(ast.parse(self.text))
        except SyntaxError as error:
            raise ValueError(f"line {error.lineno} of text is not Python: {error.msg}") from None
        if "mutant" not in defined:
            raise ValueError("text does not define `mutant`")
        return self


@cache
def _functions_of(module: str) -> set[str]:
    path = folder("flannel").parent.joinpath(*module.split(".")).with_suffix(".py")
    if not path.is_file():
        raise ValueError(f"there is no module {module}")
    return _functions(ast.parse(path.read_text(encoding="utf-8")))


def _functions(tree: ast.Module) -> set[str]:
    found = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{one.name}" for one in node.body if isinstance(one, ast.FunctionDef)}
    return found


class Mutation(_Model):
    """One fault, and the row that has to notice it.

    With `held` every flanneld is stopped (SIGSTOP) for as long as the fault is there: it would mend it.  `heals` says
    that nothing but flanneld, once it goes on, undoes it.  `assertion` is searched in the failed assertion's message
    and source; `also` names the rows that may fail as well.  `run` holds options of the run that the row needs,
    one that is given several times as a list.
    """

    id: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    row: str
    backends: list[str] = []
    run: dict[Literal["net-conf", "store", "rules", "mtu", "topology"], str | list[str]] = {}
    on: Place = "client"
    do: list[Command] = []
    undo: list[Command] = []
    heals: bool = False
    held: bool = False
    down: str = ""
    replace: Replacement | None = None
    assertion: str
    also: list[str] = []
    note: str = ""

    @model_validator(mode="after")
    def _makes_sense(self) -> Mutation:
        ways = [bool(self.do), bool(self.down), self.replace is not None]
        if sum(ways) != 1:
            raise ValueError("exactly one of do, down and replace says what is made wrong")
        if self.do and not self.undo and not self.heals:
            raise ValueError("neither undo nor heals says how it is put right")
        if not self.do and (self.heals or self.held):
            raise ValueError("heals and held are about do")
        try:
            re.compile(self.assertion)
        except re.error as error:
            raise ValueError(f"assertion is no pattern: {error}") from None
        return self

    @property
    def options(self) -> tuple[tuple[str, str], ...]:
        """The options of the run that it needs, one by one."""
        pairs = ((key, [given] if isinstance(given, str) else given) for key, given in sorted(self.run.items()))
        return tuple((key, value) for key, values in pairs for value in values)

    @property
    def acts_on(self) -> tuple[str, ...]:
        """The backends in whose labs it can be made: the row's, unless it says which."""
        return tuple(self.backends) or load_catalogue()[self.row].backends


_List = TypeAdapter(list[Mutation])


def mutations_path() -> Path:
    """The folder with the mutations, a file for each group of the catalogue."""
    return folder("suites") / "mutations"


def load_mutations(path: Path | None = None) -> Mapping[str, Mutation]:
    """Every mutation by id, of one file or a folder of them. Raises InputError with every fault of all at once."""
    path = path or mutations_path()
    found: dict[str, Mutation] = {}
    faults: list[Fault] = []
    checks = implemented()
    for file in sorted(path.glob("*.yaml")) if path.is_dir() else [path]:
        mutations, wrong = _load(file, checks)
        faults += wrong
        for mutation, place in mutations:
            if mutation.id in found:
                faults.append(replace(place, what=f"{mutation.id} is there twice"))
            found[mutation.id] = mutation
    if faults:
        raise InputError(faults=faults)
    return found


def _load(path: Path, checks: Container[str]) -> tuple[list[tuple[Mutation, Fault]], list[Fault]]:
    """The mutations of a file, each with the place of its id, and what is wrong with the file."""
    documents, faults = parse(read_text(str(path), what="list of mutations"), str(path))
    if faults or len(documents) != 1:
        return [], faults or [Fault(str(path), 0, "", "one YAML document was expected")]
    (document,) = documents
    try:
        content = _List.validate_python(document.value or [])
    except ValidationError as error:
        details = error.errors(include_url=False)
        return [], [document.fault(tuple(one["loc"]), _what(one)) for one in details]
    for number, mutation in enumerate(content):
        faults += _strangers(document, number, mutation, checks)
    return [(one, document.fault((number, "id"), "")) for number, one in enumerate(content)], faults


def _what(detail: Any) -> str:
    return str(detail["msg"]).removeprefix("Value error, ")


def _strangers(document: Document, number: int, mutation: Mutation, checks: Container[str]) -> list[Fault]:
    """What a mutation names that is not there."""
    rows = load_catalogue()
    place = (number,)
    faults = []
    if mutation.row not in checks:
        what = "nothing checks it" if mutation.row in rows else "the catalogue has no such row"
        faults.append(document.fault((*place, "row"), f"{mutation.row}: {what}"))
    faults += [
        document.fault((*place, "also", position), f"the catalogue has no row {row}")
        for position, row in enumerate(mutation.also)
        if row not in rows
    ]
    known = rows[mutation.row].backends if mutation.row in rows else tuple(BACKENDS)
    faults += [
        document.fault((*place, "backends", position), f"{mutation.row} is not about {name}")
        for position, name in enumerate(mutation.backends)
        if name not in known
    ]
    return faults
