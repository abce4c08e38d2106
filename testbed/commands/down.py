"""`testbed down`: remove a lab, and check that nothing of it is left."""

from __future__ import annotations

import click

from testbed.commands.labs import live_ids, name_option
from testbed.errors import InputError
from testbed.labs import state
from testbed.labs.kinds import down_all, remove


@click.command()
@name_option
@click.option("--all", "everything", is_flag=True, help="Remove every lab of this user, dead or alive.")
def down(name: str | None, everything: bool) -> None:
    """Remove a lab; a lab that is not there is removed already."""
    if everything and name:
        raise InputError("--all and --name say different things", hint="`testbed down --all` removes every lab")
    if everything:
        removed = down_all()
        click.echo(f"removed {len(removed)}: {', '.join(removed)}" if removed else "no lab was up")
        return
    ids = [state.checked_id(name)] if name else live_ids()
    if len(ids) > 1:
        raise InputError("several labs are up", hint=f"--all, or one of them by --name: {', '.join(ids)}")
    for lab_id in ids:
        record = state.read_record(lab_id)
        if record:
            remove(record)
            click.echo(f"removed {lab_id}")
            return
    click.echo(f"lab {name} was not up" if name else "no lab was up")
