"""`testbed graph`: draw a lab."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from testbed.commands.labs import find_lab, name_option
from testbed.errors import LabError
from testbed.labs.faults import declared, present
from testbed.report.drawing import draw
from testbed.topology import load_topology


@click.command()
@name_option
@click.option("--topology", metavar="NAME", help="Draw this topology, without any lab.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("-"), help="An SVG file; - for stdout.")
def graph(name: str | None, topology: str | None, output: Path) -> None:
    """Draw a lab, or a topology, as SVG."""
    if topology:
        spec = load_topology(topology, "drawing")
        svg = draw(spec, faults=declared(spec))
    else:
        lab = find_lab(name)
        facts = lab.record.facts
        svg = draw(lab.spec, pods=facts.get("pods", {}), faults=present(lab.spec, facts))
    if str(output) == "-":
        sys.stdout.write(svg)
        return
    try:
        output.write_text(svg)
    except OSError as error:
        raise LabError(f"cannot write the drawing: {error.strerror}", where=str(output)) from error
    click.echo(f"wrote {output}")
