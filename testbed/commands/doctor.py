"""`testbed doctor`: what this machine lacks, and which runs can work on it."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from testbed.doctor import SCHEMA, Diagnosis, Finding, diagnose
from testbed.flannelspec import BACKENDS
from testbed.guest.table import Guest, features, guest, rows


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print everything that was looked at, as JSON.")
@click.option("--all", "show_all", is_flag=True, help="Show what is in order, too.")
def doctor(as_json: bool, show_all: bool) -> int:
    """Tell what this machine lacks, with the cure and its cost.

    Looks at tools, kernel features (by using them in thrown-away namespaces), limits and policies.  Exits 0 if the
    runs of the embedded lab can work here, 2 if not.
    """
    found, there = diagnose(), guest()
    if as_json:
        click.echo(json.dumps(_as_json(found, there), indent=2))
    else:
        _print(found, show_all)
        _print_kernels(found, there)
    return int(found.exit_code)


def _as_json(found: Diagnosis, there: Guest) -> dict[str, object]:
    by_run = {entry.run: entry for entry in rows(found, there)}
    runs = [
        {
            "name": run,
            "works": not why,
            "reasons": list(why),
            "rows": {"host": list(by_run[run].host), "guest": list(by_run[run].guest)},
        }
        for run, why in found.reasons.items()
    ]
    kernel = asdict(there.kernel) | {"path": str(there.kernel.path)} if there.kernel else None
    return {
        "schema": SCHEMA,
        "machine": dict(found.machine),
        "findings": [asdict(finding) for finding in found.findings],
        "runs": runs,
        "guest": kernel,
        "guest_ready": there.ready,
        "features": [asdict(feature) for feature in features(found, there)],
        "exit": int(found.exit_code),
    }


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


def _print_kernels(found: Diagnosis, there: Guest) -> None:
    """The features that this kernel and the guest have, and what each run can check on them."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    def mark(ok: bool) -> str:
        return "[green]yes[/green]" if ok else "[red]no[/red]"

    title = "guest" if there.ready else "guest, when built"
    console = Console(highlight=False)
    table = Table("kernel feature", "needed by", "here", title)
    for feature in features(found, there):
        needed = "every run" if feature.needed_by == tuple(BACKENDS) else ", ".join(feature.needed_by) or "some checks"
        table.add_row(feature.name, needed, mark(feature.host), mark(feature.guest))
    console.print(table)
    table = Table("run", "checks here", f"checks in the {title}", "why not here")
    for entry in rows(found, there):
        why = escape("; ".join(found.reasons[entry.run]))
        counts = (f"[green]{len(ids)}[/green]" if ids else "[red]none[/red]" for ids in (entry.host, entry.guest))
        table.add_row(entry.run, *counts, why)
    console.print(table)
    console.print(there.words, markup=False)
