"""`testbed doctor`: what this machine lacks, and which runs can work on it."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from testbed.doctor import SCHEMA, Diagnosis, Finding, diagnose
from testbed.errors import LabError
from testbed.guest.build import Kernel
from testbed.guest.kernels import ready_kernel


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print everything that was looked at, as JSON.")
@click.option("--all", "show_all", is_flag=True, help="Show what is in order, too.")
def doctor(as_json: bool, show_all: bool) -> int:
    """Tell what this machine lacks, with the cure and its cost.

    Looks at tools, kernel features (by using them in thrown-away namespaces), limits and policies.  Exits 0 if the
    runs of the embedded lab can work here, 2 if not.
    """
    found = diagnose()
    if as_json:
        click.echo(json.dumps(_as_json(found), indent=2))
    else:
        _print(found, show_all)
    return int(found.exit_code)


def _as_json(found: Diagnosis) -> dict[str, object]:
    return {
        "schema": SCHEMA,
        "machine": dict(found.machine),
        "findings": [asdict(finding) for finding in found.findings],
        "runs": [{"name": run, "works": not why, "reasons": list(why)} for run, why in found.reasons.items()],
        "guest": asdict(guest) | {"path": str(guest.path)} if (guest := _guest()) else None,
        "exit": int(found.exit_code),
    }


def _guest() -> Kernel | None:
    """The guest kernel that is there; what is wrong with one is said where it is used."""
    try:
        return ready_kernel()
    except LabError:
        return None


def _guest_line() -> str:
    guest = _guest()
    if guest is None:
        return "no guest kernel yet: `testbed kernel build` makes one, and what this kernel lacks works in it"
    return f"guest kernel {guest.version}: what this kernel lacks works in it; `testbed kernel check` proves it"


def _state(finding: Finding) -> str:
    if finding.ok:
        return "[green]ok[/green]"
    word = {"limit": "too low", "policy": "in the way"}.get(finding.kind, "missing")
    return f"[red]{word}[/red]" if finding.needed_by else f"[yellow]{word}, optional[/yellow]"


def _text(finding: Finding) -> str:
    if finding.ok:
        return finding.detail
    lines = [finding.detail, f"cure: {finding.cure}", f"cost: {finding.cost}" if finding.cost else ""]
    return "\n".join(line for line in lines if line)


def _print(found: Diagnosis, show_all: bool) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    machine = found.machine
    user = "root" if machine["user"] == "root" else "an ordinary user"
    size = f"{machine['cpus']} processors, {machine['memory_mib']} MiB"
    console.print(f"{machine['system']}, kernel {machine['kernel']}, {size}, as {user}")
    shown = [finding for finding in found.findings if show_all or not finding.ok]
    if shown:
        table = Table("what", "found, cure, and what the cure costs", show_lines=not show_all)
        for finding in shown:
            table.add_row(
                f"{finding.kind}\n[bold]{escape(finding.name)}[/bold]\n{_state(finding)}", escape(_text(finding))
            )
        console.print(table)
    table = Table("run", "works here", "why not")
    for run, why in found.reasons.items():
        table.add_row(run, "[red]no[/red]" if why else "[green]yes[/green]", escape("; ".join(why)))
    console.print(table)
    console.print(_guest_line(), markup=False)
