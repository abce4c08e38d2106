"""`testbed shell`: open a shell on a node or in a pod."""

from __future__ import annotations

import click

from testbed.commands.labs import find_lab, find_place, name_option


@click.command()
@name_option
@click.argument("endpoint", metavar="NODE[/POD]")
def shell(name: str | None, endpoint: str) -> int:
    """Open a shell on a node or in a pod; its exit code is the last command's."""
    place = find_place(find_lab(name), endpoint)
    start = "command -v bash >/dev/null && exec bash --norc -i; exec sh -i"
    return place.interactive(["env", f"PS1={endpoint}# ", "sh", "-c", start])
