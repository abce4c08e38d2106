"""`testbed engine`: a private Docker engine, for machines where none runs."""

from __future__ import annotations

import click

from testbed.commands.labs import json_option, print_json
from testbed.engine import private
from testbed.errors import LabBusyError
from testbed.labs.kinds import remove


@click.group()
def engine() -> None:
    """A private Docker engine for `--lab clab`: own namespaces, socket and images; removed without a trace."""


@engine.command()
def up() -> None:
    """Start it. Labs of containers use it from then on."""
    found = private.start()
    click.echo(f"the engine is up; DOCKER_HOST={found.address} docker ps; `testbed engine down` removes it")


@engine.command()
@click.option("--force", is_flag=True, help="Remove the labs that run on it, too.")
def down(force: bool) -> None:
    """Remove it with its containers and images; one that is not there is removed already."""
    labs = private.labs()
    if labs and not force:
        names = ", ".join(record.spec.id for record in labs)
        raise LabBusyError(f"labs run on the private engine: {names}", hint="`testbed down`, or --force")
    for record in labs:
        remove(record)
    click.echo("removed the engine" if private.stop() else "no private engine was up")


@engine.command()
@json_option
def status(as_json: bool) -> None:
    """Tell whether it is up, and where."""
    found = private.running()
    if as_json:
        facts = {"address": found.address, "pid": found.holder.pid, "data": str(found.data)} if found else {}
        print_json({"up": found is not None, **facts})
    elif found:
        click.echo(f"the engine is up: {found.address}, its images in {found.data}")
    else:
        click.echo("no private engine is up; `testbed engine up` starts one")
