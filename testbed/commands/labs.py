"""What the commands that work on a lab share: which lab is meant, and the places in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from testbed.errors import InputError, LabError
from testbed.labs import state
from testbed.labs.kinds import open_lab
from testbed.labs.netnsnode import NetnsNode
from testbed.nodes.deploy import with_pods

if TYPE_CHECKING:
    from testbed.labs.kinds import AnyLab

SCHEMA = 1

name_option: Callable[[Any], Any] = click.option(
    "--name", metavar="ID", help="Which lab; needed only where several are up."
)
json_option: Callable[[Any], Any] = click.option("--json", "as_json", is_flag=True, help="Print facts as JSON.")


def print_json(facts: dict[str, Any]) -> None:
    """Print facts for a program to read."""
    click.echo(json.dumps({"schema": SCHEMA, **facts}, indent=2))


def live_ids() -> list[str]:
    """The ids of the labs that are up."""
    found = []
    for lab_id in state.known_ids():
        record = state.read_record(lab_id)
        if record and record.holder.alive:
            found.append(lab_id)
    return found


def find_lab(name: str | None) -> AnyLab:
    """The lab of that name, or the only one that is up. Raises LabError, InputError."""
    if name:
        return open_lab(state.checked_id(name))
    ids = live_ids()
    if len(ids) > 1:
        raise InputError("several labs are up", hint=f"say which by --name: {', '.join(ids)}")
    if not ids:
        raise LabError("no lab is up", hint="`testbed up` makes one")
    return open_lab(ids[0])


def find_place(lab: AnyLab, endpoint: str) -> NetnsNode:
    """The node `NODE` or pod `NODE/POD` of a lab. Raises InputError naming those that are there."""
    places = with_pods(lab)
    if endpoint not in places:
        raise InputError(f"lab {lab.spec.id} has no {endpoint}", hint=f"it has: {', '.join(places)}")
    return places[endpoint]
