"""`testbed trace`: follow one packet over every interface between two ends of a lab."""

from __future__ import annotations

import json

import click
from rich.console import Console

from testbed.commands.labs import find_lab, json_option, name_option
from testbed.errors import Exit, InputError
from testbed.trace.follow import DEFAULT_SIZE, LEAST_SIZE, MOST_SIZE, PROTOCOLS, WAIT_SECONDS, Wish
from testbed.trace.follow import trace as follow
from testbed.trace.layout import of_record
from testbed.trace.show import WIDE, show


@click.command()
@name_option
@json_option
@click.option("--proto", type=click.Choice(PROTOCOLS), default="icmp", show_default=True, help="What to send.")
@click.option("--size", type=int, default=DEFAULT_SIZE, show_default=True, metavar="BYTES", help="Its payload's size.")
@click.option("--df", is_flag=True, help="Nobody may fragment it: it tells what is the largest that fits.")
@click.option("--wait", type=float, default=WAIT_SECONDS, show_default=True, metavar="SECONDS", help="For the answer.")
@click.argument("source", metavar="NODE[/POD]")
@click.argument("target", metavar="NODE[/POD]|outside")
def trace(
    name: str | None, as_json: bool, proto: str, size: int, df: bool, wait: float, source: str, target: str
) -> int:
    """Follow one packet from SOURCE to TARGET over every interface, and its answer back.

    It says what chose each hop and what changed it, and, where the packet is lost, the first interface that misses it
    and why.  Exit codes: 0 delivered, 1 lost, 2 the lab is at fault, 3 there are no such ends.
    """
    if not LEAST_SIZE <= size <= MOST_SIZE:
        raise InputError(f"{size} bytes cannot be sent", where="--size", hint=f"{LEAST_SIZE} to {MOST_SIZE}")
    if wait <= 0:
        raise InputError("there has to be some time for an answer", where="--wait")
    lab = find_lab(name)
    layout = of_record(lab)
    for end in (source, target):
        layout.place(end)
    if source == target:
        raise InputError("both ends are the same", hint="give two of them")
    lab.settle(lab.nodes)
    found = follow(layout, source, target, Wish(proto, size, df, wait))
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        console = Console(highlight=False, emoji=False, markup=False)
        show(found, console if console.is_terminal else Console(width=WIDE, highlight=False, emoji=False, markup=False))
    return int(Exit.HELD if found.delivered else Exit.FAILED)
