"""`testbed exec`: run a command on a node or in a pod."""

from __future__ import annotations

import click

from testbed.commands.labs import find_lab, find_place, name_option


@click.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@name_option
@click.argument("endpoint", metavar="NODE[/POD]")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_(name: str | None, endpoint: str, command: tuple[str, ...]) -> int:
    """Run a command on a node or in a pod, on this terminal; its exit code is the command's."""
    words = command[1:] if command[0] == "--" else command
    return find_place(find_lab(name), endpoint).interactive(words)
