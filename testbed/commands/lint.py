"""`testbed lint FILE...`: every fault of a user's manifest for flannel, without a lab."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

import click

from testbed.errors import Exit, Fault, InputError, printable
from testbed.manifest import lint as lint_texts
from testbed.manifestcluster import read_pod_cidrs
from testbed.yamlmarks import MAX_BYTES, read_text


def texts_of(files: Sequence[str]) -> tuple[list[tuple[str, str]], list[Fault]]:
    """Name and text of each file, `-` being standard input, and a fault for each that cannot be read."""
    texts: list[tuple[str, str]] = []
    faults: list[Fault] = []
    for file in dict.fromkeys(files):
        try:
            texts.append(
                ("standard input", _standard_input()) if file == "-" else (file, read_text(file, what="manifest"))
            )
        except InputError as error:
            faults += error.faults or [Fault(file, 0, "", str(error).removeprefix(f"{file}: "))]
    return texts, faults


def _standard_input() -> str:
    data = sys.stdin.buffer.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        what = f"larger than {MAX_BYTES // 1024} KiB, so it is no manifest"
        raise InputError(faults=[Fault("standard input", 0, "", what)])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"the manifest is not UTF-8 text: {error}") from None


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--pod-cidr", multiple=True, metavar="NETWORK", help="The network of the cluster's pods; dual stack: A,B."
)
@click.option("--json", "as_json", is_flag=True, help="Print faults and warnings as JSON.")
def lint(files: tuple[str, ...], pod_cidr: tuple[str, ...], as_json: bool) -> int:
    """Name every fault of kube-flannel.yml with its line, without a lab or a cluster.

    Several FILEs are read as one manifest: rights, configuration, kubeadm's or kind's configuration with the pods'
    network. `-` is standard input. Exit codes: 0 clean, 3 with faults; warnings change nothing.
    """
    networks, wrong = read_pod_cidrs(",".join(pod_cidr), "--pod-cidr")
    texts, unread = texts_of(files)
    found = lint_texts(texts, [(network, "--pod-cidr") for network in networks])
    faults = [*wrong, *unread, *found.faults]
    if as_json:
        lists = {"faults": faults, "warnings": found.warnings}
        facts = {name: [asdict(fault) for fault in items] for name, items in lists.items()}
        click.echo(json.dumps({"schema": 1, **facts}, indent=1, ensure_ascii=False))
    else:
        for fault in faults:
            click.echo(f"{click.style('fault:', fg='red', bold=True)} {printable(str(fault))}")
        for warning in found.warnings:
            click.echo(f"{click.style('warning:', fg='yellow')} {printable(str(warning))}")
        click.echo(f"{_count(len(faults), 'fault')}, {_count(len(found.warnings), 'warning')}")
    return int(Exit.INPUT if faults else Exit.HELD)


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
