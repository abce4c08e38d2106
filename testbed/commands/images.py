"""`testbed images`: the container images of a lab's machines."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import click

from testbed.commands.labs import json_option, print_json
from testbed.engine.find import find_engine
from testbed.errors import InputError, LabError
from testbed.images import store


@click.group()
def images() -> None:
    """The container images of a lab's machines: which there are, how they get into an engine or a file."""


@images.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the images that can be made here, and whether the engine has them."""
    try:
        client = find_engine().client
    except LabError:
        client = None
    rows = []
    for kind in store.KINDS.values():
        there = client is not None and store.present(client, kind)
        rows.append({"name": kind.name, "tag": kind.tag, "about": kind.about, "in_engine": there})
    if as_json:
        print_json({"engine": client is not None, "images": rows})
        return
    for row in rows:
        where = "no engine" if client is None else "in the engine" if row["in_engine"] else "not in the engine"
        click.echo(f"{row['name']:5} {row['tag']:34} {where:18} {row['about']}")


@images.command()
@click.argument("name", default="host")
def build(name: str) -> None:
    """Make the image NAME (host or full) in the engine."""
    kind = store.kind_of(name)
    click.echo(store.ensure(find_engine().client, kind))


@images.command()
@click.argument("name", default="full")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FILE", help="Where to write.")
def export(name: str, output: Path) -> None:
    """Write the root file system of the image NAME as a tar archive, for `docker import` elsewhere."""
    kind = store.kind_of(name)
    data = store.archive(name)
    if str(output) == "-":
        sys.stdout.buffer.write(data)
        return
    try:
        number, aside = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
        try:
            with os.fdopen(number, "wb") as file:
                file.write(data)
            Path(aside).replace(output)
        except OSError:
            Path(aside).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"cannot write: {error.strerror}", where=str(output), hint="give another file by -o") from None
    click.echo(f"{output}: {len(data) / 1e6:.1f} MB; `docker import {' '.join(changes())} {output} {kind.tag}`")


def changes() -> list[str]:
    """What `docker import` has to be told of the image."""
    return [f"--change '{change}'" for change in store.CHANGES]
