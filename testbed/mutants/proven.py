"""`suites/proven`: under which mutation each check was seen to fail, and a hash of all that this depends on.

The proof's run alone writes it.  A row whose check, catalogue row or mutation has changed since is unproven again.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from testbed.checks import implemented, load_catalogue
from testbed.data import folder
from testbed.errors import InputError, LabError
from testbed.mutants.mutations import Mutation, load_mutations

HEAD = "# Written by `./run mutants`, never by hand: each proof, and a hash of check, catalogue row and mutation.\n"


def proven_path() -> Path:
    """The folder with the proofs, a file for each group of the catalogue."""
    return folder("suites") / "proven"


def read_proven(path: Path | None = None) -> dict[str, dict[str, str]]:
    """Each proof by row: `mutation` and `hash`; none where no proof was run. Raises LabError for a broken file."""
    path = path or proven_path()
    found: dict[str, dict[str, str]] = {}
    try:
        for file in sorted(path.glob("*.yaml")):
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
            found |= {row: {"mutation": str(one["mutation"]), "hash": str(one["hash"])} for row, one in content.items()}
        return found
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise LabError(f"the list of proofs is broken: {error!r}", where=str(path), hint="./run mutants") from error


def proven_rows() -> frozenset[str]:
    """The rows whose proof still stands. Raises LabError for a broken list of proofs."""
    proofs = read_proven()
    try:
        mutations = load_mutations() if proofs else {}
    except InputError as error:
        raise LabError(str(error)) from error
    rows = _checks()
    return frozenset(
        row
        for row, proof in proofs.items()
        if row in rows and proof["mutation"] in mutations and proof["hash"] == hash_of(mutations[proof["mutation"]])
    )


def unproven_reasons(path: Path | None = None) -> dict[str, str]:
    """Why rows that are checked have no proof, by row, as people wrote it. Raises LabError for a broken file."""
    path = path or proven_path().parent / "unproven.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        return {str(row): str(why) for row, why in content.items()}
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise LabError(f"the list of rows without proof is broken: {error!r}", where=str(path)) from error


def write_proven(
    proved: Iterable[Mutation],
    disproved: Iterable[str],
    path: Path | None = None,
    mutations: Mapping[str, Mutation] | None = None,
) -> None:
    """Note new proofs, one a row, and take refuted ones away; only the files of those groups change.

    `mutations` are all that there are, where they have been read before.
    """
    path = path or proven_path()
    path.mkdir(exist_ok=True)
    proved, disproved = list(proved), list(disproved)
    mutations = load_mutations() if mutations is None else mutations
    before = read_proven(path)
    proofs = {row: proof for row, proof in before.items() if proof["mutation"] in mutations and row not in disproved}
    for mutation in proved:
        kept = proofs.get(mutation.row)
        if kept is None or kept["hash"] != hash_of(mutations[kept["mutation"]]):
            proofs[mutation.row] = {"mutation": mutation.id, "hash": hash_of(mutation)}
    order = {row: position for position, row in enumerate(load_catalogue())}
    for group in {_group(row) for row in (*(one.row for one in proved), *disproved)}:
        rows = sorted((row for row in proofs if _group(row) == group), key=lambda row: order.get(row, len(order)))
        text = HEAD + yaml.safe_dump({row: proofs[row] for row in rows}, sort_keys=False)
        (path / f"{group}.yaml").write_text(text, encoding="utf-8")


def _group(row: str) -> str:
    return row.partition("-")[0]


def hash_of(mutation: Mutation) -> str:
    """A hash of a mutation, its catalogue row, and the row's check with all of its file that it uses.

    Which other rows may fail as well (`also`) is no part of it: the proof is that the row's own assertion fails, which
    these have no share in; nor is the note.
    """
    parts = [
        mutation.model_dump(exclude={"also", "note"}),
        asdict(load_catalogue()[mutation.row]),
        _check_source(mutation.row),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@cache
def _check_source(row: str) -> list[str]:
    """The check as a syntax tree, so that comments and the form of lines do not count, and what it names."""
    file, _, function = _checks()[row].partition("::")
    defined = _definitions(folder("suites") / file)
    wanted, seen = [function], list[str]()
    while wanted:
        name = wanted.pop()
        if name in seen or name not in defined:
            continue
        seen.append(name)
        wanted += [node.id for node in ast.walk(defined[name]) if isinstance(node, ast.Name)]
    return [ast.dump(defined[name]) for name in sorted(seen)]


@cache
def _checks() -> Mapping[str, str]:
    return implemented()


@cache
def _definitions(path: Path) -> Mapping[str, ast.stmt]:
    defined: dict[str, ast.stmt] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        defined |= dict.fromkeys(_defines(node), node)
    return defined


def _defines(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets: list[Any] = []
    if isinstance(node, ast.Assign):
        targets = [name for target in node.targets for name in ast.walk(target)]
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def proofs() -> Mapping[str, Any]:
    """What `testbed checks` shows of each proof that stands."""
    standing = proven_rows()
    return {row: proof for row, proof in read_proven().items() if row in standing}
