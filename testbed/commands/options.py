"""The options that say what lab is wanted, as click options; `testbed.options` checks their values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from testbed.errors import Fault
from testbed.flannelspec import normalise
from testbed.labs.state import checked_id
from testbed.options import (
    LABS,
    LABS_HERE,
    RULES,
    RULES_HERE,
    RunOptions,
    default_name,
    image_of,
    key_values,
    node_paths,
    one_of,
    raise_faults,
)

_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--backend", default="vxlan", show_default=True, metavar="NAME", help="Which run's flannel."),
    click.option("--name", metavar="ID", help="The lab's name; by default the run's, and a hash of this folder."),
    click.option("--lab", default=LABS_HERE[0], show_default=True, metavar="KIND", help=f"{' or '.join(LABS_HERE)}."),
    click.option("--image", default="", metavar="NAME", help="Containers' image: host, full or the engine's own NAME."),
    click.option("--image-prefix", default="", metavar="MIRROR/", help="Pull leaves' and spines' FRR from a mirror."),
    click.option("--set", "settings", multiple=True, metavar="K=V", help="An option of the topology: racks=8."),
    click.option("--mtu", type=int, metavar="BYTES", help="MTU of every link."),
    click.option("--rules", metavar="KIND", help=f"One of {', '.join(RULES)}; by default what net-conf.json says."),
    click.option("--net-conf", multiple=True, metavar="KEY=VALUE", help="A key of net-conf.json: Port=4789."),
    click.option("--manifest", type=click.Path(path_type=Path), metavar="FILE", help="Your own kube-flannel.yml."),
    click.option("--flanneld", multiple=True, metavar="[NODE=]PATH", help="A flanneld of your own."),
    click.option("--cni-plugin", multiple=True, metavar="[NODE=]PATH", help="A flannel CNI plugin of your own."),
)


def lab_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a click command the options that say what lab is wanted."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def run_options(
    *,
    topology: str | None,
    backend: str,
    name: str | None,
    lab: str,
    image: str,
    image_prefix: str,
    settings: Sequence[str],
    mtu: int | None,
    rules: str | None,
    net_conf: Sequence[str],
    manifest: Path | None,
    flanneld: Sequence[str],
    cni_plugin: Sequence[str],
) -> RunOptions:
    """Check the options and put them together. Raises InputError with every fault."""
    faults: list[Fault] = []
    run = normalise(backend)
    options = RunOptions(
        backend=run,
        name=checked_id(name or default_name(run, Path.cwd())),
        topology=topology,
        lab=one_of("--lab", lab, LABS_HERE, LABS, faults),
        image=image_of(image, lab, faults),
        image_prefix=image_of(image_prefix, lab, faults, option="--image-prefix"),
        settings=key_values("--set", settings, faults),
        mtu=mtu,
        rules=one_of("--rules", rules, RULES_HERE, RULES, faults) if rules is not None else None,
        net_conf=key_values("--net-conf", net_conf, faults),
        manifest=manifest,
        flanneld=node_paths("--flanneld", flanneld, faults),
        cni_plugin=node_paths("--cni-plugin", cni_plugin, faults),
    )
    raise_faults(faults)
    return options
