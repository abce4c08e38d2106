"""`testbed checks`: every row of the catalogue, and which of them a function of the suites checks."""

from __future__ import annotations

import json
from typing import Any

import click

from testbed.checks import LABS, Row, implemented, load_catalogue
from testbed.errors import Fault
from testbed.mutants.proven import proven_rows, unproven_reasons
from testbed.options import one_of, raise_faults


def reason_on(row: Row, written: bool, lab: str | None, unproven: str = "") -> str:
    """Why a row does not run on a kind of lab; "" where it does.

    Without a lab, why nothing checks it at all, or why its check has no proof.
    """
    if lab and lab not in row.lab:
        kinds = ", ".join(row.lab) or "no kind yet"
        return row.reason or f"not on a lab of kind {lab}, but on {kinds}"
    if lab and row.reason:
        return row.reason
    return unproven if written else row.reason or "is not written yet"


def listing(lab: str | None = None) -> list[dict[str, Any]]:
    """Every row as `testbed checks --json` gives it. Raises LabError where catalogue or proofs are broken."""
    written = implemented()
    proofs, unproven = proven_rows(), unproven_reasons()
    return [
        {
            "id": row.id,
            "claim": row.claim,
            "backends": list(row.backends),
            "paths": list(row.paths),
            "implemented": row.id in written,
            "proven": row.id in proofs,
            "smoke": row.smoke,
            "labs": list(row.lab),
            "needs": row.needs,
            "reason": reason_on(row, row.id in written, lab, unproven.get(row.id, "")),
        }
        for row in load_catalogue().values()
    ]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
@click.option("--implemented", "only_implemented", is_flag=True, help="Only the rows that are checked.")
@click.option("--lab", metavar="KIND", help=f"Say why a row cannot run on that kind of lab: {', '.join(LABS)}.")
def checks(as_json: bool, only_implemented: bool, lab: str | None) -> None:
    """List the catalogue of checks: what is implemented, and what was proven able to fail.

    A row is marked `*` where a function of the suites checks it, with `!` before it where a mutation was seen to break
    that, and carries the reason where it cannot run.
    """
    faults: list[Fault] = []
    kind = one_of("--lab", lab, LABS, LABS, faults) if lab is not None else None
    raise_faults(faults)
    rows = [row for row in listing(kind) if row["implemented"] or not only_implemented]
    if as_json:
        click.echo(json.dumps({"schema": 1, "checks": rows}, indent=1, ensure_ascii=False))
        return
    for row in rows:
        mark = ("!" if row["proven"] else " ") + ("*" if row["implemented"] else " ")
        claim = row["claim"] if len(row["claim"]) <= 90 else row["claim"][:89] + "…"
        click.echo(f"{mark} {row['id']:<8} {claim}" + (f"  ({row['reason']})" if row["reason"] else ""))
    done = sum(row["implemented"] for row in rows)
    good = sum(row["implemented"] and row["proven"] for row in rows)
    click.echo(f"{done} of {len(rows)} rows implemented, {good} of them proven able to fail")
