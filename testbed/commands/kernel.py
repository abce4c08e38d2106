"""`testbed kernel`: the guest kernel, with which every backend works on any machine and without root."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from testbed.console import Ticks
from testbed.errors import Exit, LabError
from testbed.guest.build import build as build_kernel
from testbed.guest.build import describe
from testbed.guest.kernels import WAYS, obtain_kernel, ready_kernel

if TYPE_CHECKING:
    from testbed.guest.check import Checked


@click.group()
def kernel() -> None:
    """Build, find, check and use the guest kernel."""


@kernel.command()
@click.option("--again", is_flag=True, help="Build it even if it was built before.")
def build(again: bool) -> None:
    """Build the guest kernel from Debian's source, unless it was built before."""
    click.echo(describe(build_kernel(Ticks(), again=again)))


@kernel.command()
@click.option("--json", "as_json", is_flag=True, help="Print all that is known of it, as JSON.")
def path(as_json: bool) -> None:
    """Print where the guest kernel is; exits 2 if there is none yet."""
    found = ready_kernel()
    if found is None:
        raise LabError("there is no guest kernel yet", hint="`testbed kernel build` makes one, in about 8 minutes")
    if as_json:
        facts = {"path": str(found.path), "version": found.version, "way": found.way, "built": found.built}
        click.echo(json.dumps({"schema": 1, **facts}, indent=2))
    else:
        click.echo(found.path)


_way = click.option(
    "--way",
    type=click.Choice(list(WAYS)),
    callback=lambda *given: given[-1] or "",
    help="Which guest; else the first that works.",
)


@kernel.command()
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
@_way
def check(as_json: bool, way: str) -> int:
    """Try in the guest all that backends and checks need, as root and as an ordinary user.

    Exits 0 if everything that could be tried works, 2 if not.
    """
    from testbed.guest.check import check as check_kernel

    progress = Ticks()
    found = obtain_kernel(progress, way=way)
    with progress.step(f"Trying everything in the guest kernel {found.version}"):
        checked = check_kernel(found)
    if as_json:
        table = [asdict(row) for row in checked.rows]
        facts = {"path": str(found.path), "version": found.version, "release": checked.release, "way": found.way}
        click.echo(json.dumps({"schema": 1, "kernel": facts, "features": table, "works": checked.ok}, indent=2))
    else:
        _print(checked)
    return int(Exit.HELD if checked.ok else Exit.LAB)


def _print(checked: Checked) -> None:
    from rich.console import Console
    from rich.table import Table

    def cell(outcome: str | None) -> str:
        if outcome is None:
            return "[dim]not tried[/dim]"
        return "[red]no[/red]" if outcome else "[green]works[/green]"

    table = Table("feature", "needed by", "as root", "as a user")
    for row in checked.rows:
        table.add_row(row.feature, row.needed_by, cell(row.root), cell(row.user))
    console = Console(highlight=False)
    console.print(f"guest kernel {checked.release}, {checked.kernel.built or checked.kernel.path}", markup=False)
    console.print(table)
    for row in checked.rows:
        for detail in dict.fromkeys(filter(None, (row.root, row.user))):
            console.print(f"{row.feature}: {detail}", markup=False)
    untried = [row.feature for row in checked.rows if not row.tried]
    if untried:
        console.print(f"not tried, for want of a tool on this machine: {', '.join(untried)}", markup=False)


@kernel.command(context_settings={"ignore_unknown_options": True})
@click.option(
    "--writable",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder that the command may write to for good; may be given several times.",
)
@_way
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(writable: tuple[Path, ...], way: str, command: tuple[str, ...]) -> int:
    """Run COMMAND in the guest, as its root; its exit code is this one's.

    It sees this machine's files. What it changes is gone at its end, but for the --writable folders.
    """
    from testbed.guest.run import run as run_in_guest

    return run_in_guest(command, kernel=obtain_kernel(Ticks(), way=way).path, writable=writable)
