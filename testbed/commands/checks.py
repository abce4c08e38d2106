"""`testbed checks`: every row of the catalogue, and which of them a function of the suites checks."""

from __future__ import annotations

import json
from typing import Any

import click

from testbed.checks import implemented, load_catalogue


def listing() -> list[dict[str, Any]]:
    """Every row as `testbed checks --json` gives it. Raises LabError where the catalogue is broken."""
    written = implemented()
    return [
        {
            "id": row.id,
            "claim": row.claim,
            "backends": list(row.backends),
            "paths": list(row.paths),
            "implemented": row.id in written,
            "proven": False,  # until the mutation proof has run
            "smoke": row.smoke,
            "reason": "" if row.id in written else row.reason or "is not written yet",
        }
        for row in load_catalogue().values()
    ]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
@click.option("--implemented", "only_implemented", is_flag=True, help="Only the rows that are checked.")
def checks(as_json: bool, only_implemented: bool) -> None:
    """List the catalogue of checks, and what is implemented.

    A row is marked `*` where a function of the suites checks it, and carries the reason where none does.
    """
    rows = [row for row in listing() if row["implemented"] or not only_implemented]
    if as_json:
        click.echo(json.dumps({"schema": 1, "checks": rows}, indent=1, ensure_ascii=False))
        return
    for row in rows:
        mark = "*" if row["implemented"] else " "
        claim = row["claim"] if len(row["claim"]) <= 90 else row["claim"][:89] + "…"
        click.echo(f"{mark} {row['id']:<8} {claim}" + (f"  ({row['reason']})" if row["reason"] else ""))
    done = sum(row["implemented"] for row in rows)
    click.echo(f"{done} of {len(rows)} rows implemented")
