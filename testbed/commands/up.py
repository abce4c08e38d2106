"""`testbed up`: bring up a lab and leave it running."""

from __future__ import annotations

from typing import Any

import click

from testbed.commands.options import lab_options, run_options
from testbed.console import Ticks
from testbed.doctor import require_tools
from testbed.nodes.deploy import bring_up


@click.command()
@click.argument("topology", required=False)
@lab_options
def up(topology: str | None, **given: Any) -> None:
    """Bring up TOPOLOGY (racks, flat, clos or a file) with flannel and pods on it, and leave it running."""
    options = run_options(topology=topology, **given)
    require_tools(options.backend)
    cluster = bring_up(options, Ticks())
    cluster.lab.detach()
    for note in cluster.flannel.notes:
        click.echo(f"note: {note}", err=True)
    for warning in cluster.flannel.warnings:
        click.echo(f"in a cluster: {warning}", err=True)
    name = cluster.lab.spec.id
    click.echo(
        f"lab {name} is up; `testbed shell worker1 --name {name}` goes in, `testbed down --name {name}` removes it"
    )
