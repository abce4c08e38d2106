"""`testbed kernel`: the guest kernel, with which every backend works on any machine and without root."""

from __future__ import annotations

import json
from pathlib import Path

import click

from testbed.console import Ticks
from testbed.errors import LabError
from testbed.guest.build import build as build_kernel
from testbed.guest.build import describe
from testbed.guest.kernels import obtain_kernel, ready_kernel


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


@kernel.command(context_settings={"ignore_unknown_options": True})
@click.option(
    "--writable",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder that the command may write to for good; may be given several times.",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(writable: tuple[Path, ...], command: tuple[str, ...]) -> int:
    """Run COMMAND in the guest, as its root; its exit code is this one's.

    It sees this machine's files. What it changes is gone at its end, but for the --writable folders.
    """
    from testbed.guest.run import run as run_in_guest

    return run_in_guest(command, kernel=obtain_kernel(Ticks()).path, writable=writable)
