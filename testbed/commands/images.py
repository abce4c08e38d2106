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
from testbed.images.names import checked_name, named_images, references


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
    named = {key: image.reference() for key, image in named_images().items()}
    if as_json:
        print_json({"engine": client is not None, "images": rows, "named": named})
        return
    for row in rows:
        where = "no engine" if client is None else "in the engine" if row["in_engine"] else "not in the engine"
        click.echo(f"{row['name']:5} {row['tag']:34} {where:18} {row['about']}")
    click.echo("\nin rendered files:")
    for key, reference in named.items():
        click.echo(f"{key:10} {reference}")


@images.command()
@click.argument("name", default="host")
@click.option("--tag", default="", metavar="NAME", help="Another name for it, besides its own.")
def build(name: str, tag: str) -> None:
    """Make the image NAME (host or full) in the engine."""
    kind = store.kind_of(name)
    if tag:
        checked_name("--tag", tag)
    client = find_engine().client
    own = store.ensure(client, kind)
    if tag:
        store.also_call(client, own, tag)
    click.echo(tag or own)


@images.command()
@click.argument("what", nargs=-1)
@click.option("--image-prefix", default="", metavar="MIRROR/", help="A registry mirror, put before images' names.")
def pull(what: tuple[str, ...], image_prefix: str) -> None:
    """Pull the images that rendered files name (WHAT: frr, kind, …; by default all), by digest where one is known."""
    known = named_images()
    wanted = what or tuple(key for key, image in known.items() if not image.made)
    unknown = [key for key in wanted if key not in known or known[key].made]
    if unknown:
        pulled = ", ".join(key for key, image in known.items() if not image.made)
        raise InputError(f"no image to pull is for {', '.join(unknown)}", hint=f"one of {pulled}")
    named = references(image_prefix)
    engine = find_engine()
    if engine.private:
        hint = "`testbed images build` makes nodes' image, `testbed images import` brings one from a file"
        raise LabError("the private engine has no way out, so it pulls nothing", hint=hint)
    for key in wanted:
        store.pull(engine.client, named[key])
        click.echo(named[key])


@images.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--tag", default="", metavar="NAME", help="The image's name in the engine; by default that of nodes.")
def import_(file: Path, tag: str) -> None:
    """Bring FILE, a root file system that `testbed images export` wrote elsewhere, into the engine."""
    tag = checked_name("--tag", tag or named_images()["node"].name)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read: {error.strerror}", where=str(file)) from error
    store.bring_in(find_engine().client, data, tag)
    click.echo(tag)


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
