"""`testbed render`: write a lab for containerlab, FRR, kind and kubectl."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from testbed.data import folder
from testbed.errors import Fault, InputError
from testbed.flannelbuild import default_flannel
from testbed.flannelspec import BACKENDS, RULES, FlannelSpec, normalise
from testbed.images.names import named_images, references
from testbed.ipv6 import with_ipv6
from testbed.labs.state import checked_id
from testbed.manifest import read_manifest
from testbed.options import default_name, key_values, raise_faults
from testbed.render import Images
from testbed.targets import ALL, TARGETS, render_target
from testbed.topology import load_topology

WHAT = ", ".join(named_images())


@click.command()
@click.option("--backend", default="vxlan", show_default=True, metavar="NAME", help="Which run's flannel.")
@click.option("--topology", metavar="NAME|FILE", help="racks, flat, clos or a file; by default the backend's.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Where to write.")
@click.option("--name", metavar="ID", help="The lab's name; by default the run's, and a hash of this folder.")
@click.option("--set", "settings", multiple=True, metavar="K=V", help="An option of the topology: racks=8.")
@click.option("--mtu", type=int, metavar="BYTES", help="MTU of every link.")
@click.option("--rules", metavar="KIND", help=f"One of {', '.join(RULES)}.")
@click.option("--net-conf", multiple=True, metavar="KEY=VALUE", help="A key of net-conf.json: Port=4789.")
@click.option("--manifest", type=click.Path(path_type=Path), metavar="FILE", help="Your own kube-flannel.yml.")
@click.option("--artefacts", default="artefacts", show_default=True, metavar="DIR", help="What kind nodes mount.")
@click.option("--target", default=ALL, show_default=True, metavar="KIND", help=f"{', '.join(TARGETS)} or {ALL}.")
@click.option("--image-prefix", default="", metavar="MIRROR/", help="A registry mirror, put before images' names.")
@click.option("--image", "given_images", multiple=True, metavar="WHAT=NAME", help=f"Another image: {WHAT}.")
@click.option("--json", "as_json", is_flag=True, help="Tell what was written as JSON.")
def render(
    backend: str,
    topology: str | None,
    output: Path,
    name: str | None,
    settings: Sequence[str],
    mtu: int | None,
    rules: str | None,
    net_conf: Sequence[str],
    manifest: Path | None,
    artefacts: str,
    target: str,
    image_prefix: str,
    given_images: Sequence[str],
    as_json: bool,
) -> None:
    """Write the files of a lab for containerlab, kind and Clabernetes, and a README with the commands that use them."""
    faults: list[Fault] = []
    run = normalise(backend)
    options, overrides = key_values("--set", settings, faults), key_values("--net-conf", net_conf, faults)
    named = key_values("--image", given_images, faults)
    raise_faults(faults)
    wanted: dict[str, Any] = references(image_prefix, named)
    lab = load_topology(
        topology or BACKENDS[run].topology,
        checked_id(name or default_name(run, Path.cwd())),
        overrides=options,
        mtu=mtu,
    )
    flannel = _flannel(run, manifest, overrides, rules)
    if flannel.network6 is not None:
        lab = with_ipv6(lab)
    bundled = str(folder("flannel"))
    files = render_target(lab, flannel, target, images=Images(**wanted), artefacts=artefacts, bundled=bundled)
    write_files(output, files)
    if as_json:
        click.echo(json.dumps({"schema": 1, "folder": str(output), "files": sorted(files)}))
        return
    for note in flannel.notes:
        click.echo(f"note: {note}", err=True)
    shown = sorted(f for f in files if not f.startswith(("frr/", "addresses")))
    click.echo(f"{len(files)} files in {output}: {', '.join(shown)}")


def _flannel(run: str, manifest: Path | None, overrides: Mapping[str, str], rules: str | None) -> FlannelSpec:
    if manifest is not None:
        return read_manifest(str(manifest), run, net_conf_overrides=overrides, rules=rules)
    return default_flannel(run, net_conf_overrides=overrides, rules=rules)


def write_files(into: Path, files: Mapping[str, str]) -> None:
    """Write files below a folder, making it where it is missing; none is ever seen half-written.

    Raises InputError where the folder cannot be written.
    """
    try:
        for name, text in files.items():
            path = into / name
            path.parent.mkdir(parents=True, exist_ok=True)
            number, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            try:
                with os.fdopen(number, "w", encoding="utf-8") as stream:
                    stream.write(text)
                Path(aside).chmod(0o644)
                Path(aside).replace(path)
            except OSError:
                Path(aside).unlink(missing_ok=True)
                raise
    except OSError as error:
        place = str(error.filename or into)
        raise InputError(f"cannot write: {error.strerror}", where=place, hint="give another folder with -o") from None
    except ValueError:  # a NUL in the path
        raise InputError("this is no path", where="-o") from None
