"""`./run mutants`: make each mutation in a running lab, and demand that the check it is meant for fails by it."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import click
import pytest
from rich.console import Console
from rich.table import Table

from testbed.cli import complain
from testbed.collecting import IPV6_NEEDED
from testbed.commands.run import pytest_arguments
from testbed.doctor import require_tools, search_path
from testbed.errors import Exit, InputError, TestbedError
from testbed.flannelspec import BACKENDS, normalise
from testbed.guest import runs
from testbed.mutants.driver import Driver, Proof
from testbed.mutants.inguest import WRITTEN, prove_in_guest
from testbed.mutants.mutations import Mutation, load_mutations
from testbed.mutants.proven import write_proven
from testbed.options import IN_GUEST, KERNELS
from testbed.report.parts import VARIABLE

HERE = ("vxlan", "vxlan_direct", "host_gw", "udp", "dual_stack")
"""Backends that every kernel has which can run the test-bed at all: preferred, since the others may take a guest."""

Run = tuple[str, tuple[tuple[str, str], ...], str]
"""A backend, the options that the lab needs, and what the kernel has to have for it beside the backend's own needs."""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", metavar="ID,…", default="", help="these mutations, or all of these rows, alone")
@click.option("--backend", "backends", metavar="NAME", multiple=True, help="in this backend's lab; may be given again")
@click.option("--each", is_flag=True, help="in the lab of every backend that it applies to, instead of the first")
@click.option("--smoke", is_flag=True, help="those of rows of the smoke part alone")
@click.option("--full", is_flag=True, help="run the smoke part under each, to see that no other row fails")
@click.option("--kernel", type=click.Choice(KERNELS), default="auto", show_default=True, help="as for a run")
@click.option("--name", default="mutants", show_default=True, help="the lab's name")
@click.option("--reports", type=click.Path(path_type=Path), default=Path("reports/mutants"), show_default=True)
@click.option("--file", type=click.Path(path_type=Path), help="other mutations than those of suites; not noted")
@click.option("--proofs/--no-proofs", default=True, help="write suites/proven")
def main(
    only: str, backends: tuple[str, ...], each: bool, smoke: bool, full: bool, kernel: str, name: str,
    reports: Path, file: Path | None, proofs: bool,
) -> int:  # fmt: skip
    """Prove that the checks can fail."""
    every = load_mutations(file)
    mutations = chosen(every.values(), only, smoke=smoke)
    labs = runs_of(mutations, [normalise(backend) for backend in backends], every=each)
    if not labs:
        raise InputError("no mutation is left to make", hint="--only, --backend and --smoke choose among them")
    require_tools(*{run[0] for run in labs})
    os.environ["PATH"] = search_path()
    found: list[Proof] = []
    for run, wanted in labs.items():
        found += prove(run, wanted, name=name, full=full, kernel=kernel, file=file)
    report(found, reports)
    stands = {proof.mutation for proof in found if proof.stands}
    refuted = {proof.row for proof in found if proof.refutes}
    if proofs and file is None:
        proved = [one for one in mutations if one.id in stands and one.row not in refuted]
        write_proven(proved, refuted, mutations=every)  # which may be written to while this runs
    return int(Exit.HELD if all(proof.stands for proof in found) else Exit.FAILED)


def chosen(mutations: Iterable[Mutation], only: str, *, smoke: bool) -> list[Mutation]:
    """The mutations that were asked for. Raises InputError for a name that is none."""
    from testbed.checks import load_catalogue

    words = [word for word in only.split(",") if word]
    every = list(mutations)
    strangers = [word for word in words if not any(word in (one.id, one.row) for one in every)]
    if strangers:
        raise InputError(f"no mutation is called {', '.join(strangers)}, or about it", where="--only")
    rows = load_catalogue()
    wanted = [one for one in every if not words or one.id in words or one.row in words]
    return [one for one in wanted if rows[one.row].smoke or not smoke]


def runs_of(mutations: Iterable[Mutation], backends: Sequence[str], *, every: bool) -> dict[Run, list[Mutation]]:
    """In which labs the mutations are made; each once, unless every backend's lab is to see it."""
    from testbed.checks import KERNEL_NEEDS, load_catalogue

    order = list(backends or dict.fromkeys([*HERE, *BACKENDS]))
    found: dict[Run, list[Mutation]] = {}
    for mutation in mutations:
        fitting = [
            backend for backend in order if backend in mutation.acts_on and _has_what_it_needs(backend, mutation)
        ]
        for backend in fitting if every else fitting[:1]:
            needs = load_catalogue()[mutation.row].needs
            run = backend, mutation.options, needs if needs in KERNEL_NEEDS else ""
            found.setdefault(run, []).append(mutation)
    return dict(sorted(found.items(), key=lambda item: (list(BACKENDS).index(item[0][0]), *item[0][1:])))


def _has_what_it_needs(backend: str, mutation: Mutation) -> bool:
    """Whether a backend's lab has IPv6 where the row is about it: by itself, or by the options that are given."""
    from testbed.checks import load_catalogue

    ipv6 = BACKENDS[backend].dual or any(value.startswith("EnableIPv6=") for _, value in mutation.options)
    return ipv6 or load_catalogue()[mutation.row].needs != IPV6_NEEDED


def prove(
    run: Run, mutations: Sequence[Mutation], *, name: str, full: bool, kernel: str, file: Path | None
) -> list[Proof]:
    """Bring up one lab, here or in a guest, and make the mutations in it.

    Raises LabError where that gave no proofs at all.
    """
    backend, extra, needs = run
    words = [word for key, value in extra for word in (f"--{key}", value)]
    where = runs.choose(backend, ["--kernel", kernel, *words])
    if kernel == "auto" and needs and not os.environ.get(IN_GUEST) and runs.lacking("", (needs,)):
        where = "guest"
    if not os.environ.get(IN_GUEST):
        click.echo(f"{backend} {' '.join(words)}: {len(mutations)} mutations")
    if where == "guest":
        return prove_in_guest(backend, [one.id for one in mutations], words, name=name, full=full, file=file)
    driver = Driver(mutations, backend, full, tell)
    words += ["--kernel", "guest"] if os.environ.get(IN_GUEST) else []
    with tempfile.TemporaryDirectory(prefix="mutants-") as part:
        os.environ[VARIABLE] = part
        try:
            code = pytest.main(pytest_arguments(backend, ["--full", "--name", name, *words]), plugins=[driver])
        finally:
            del os.environ[VARIABLE]
    if len(driver.proofs) < len(mutations) and code == Exit.INTERRUPTED:
        raise KeyboardInterrupt
    missing = mutations[len(driver.proofs) :]
    return driver.proofs + [Proof(one.id, one.row, backend, "not run", "the run ended before") for one in missing]


def tell(proof: Proof) -> None:
    """Say at once what came of a mutation."""
    click.echo(f"  {proof.outcome:10} {proof.mutation:40} {proof.seconds:5.1f} s")
    if not proof.stands:
        click.echo("    " + proof.said.replace("\n", "\n    "))


def report(proofs: Sequence[Proof], folder: Path) -> None:
    """Write mutants.json, and show what is not proven as a table."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"schema": 1, "mutants": [proof.to_json() for proof in proofs]}
    (folder / WRITTEN).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if os.environ.get(IN_GUEST):
        return  # whoever started the guest shows all of them
    table = Table("row", "mutation", "backend", "outcome", title="mutants")
    for proof in proofs:
        table.add_row(proof.row, proof.mutation, proof.backend, proof.outcome, style="" if proof.stands else "bold red")
    Console().print(table)
    noticed = sum(proof.stands for proof in proofs)
    click.echo(f"{noticed} of {len(proofs)} mutations were noticed; {folder}/{WRITTEN}")


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)  # the lab is removed, as by Ctrl-C
    try:
        code = main.main(standalone_mode=False)
    except TestbedError as error:
        code = complain(error)
    except click.ClickException as error:
        error.show()
        code = int(Exit.INPUT)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        code = int(Exit.INTERRUPTED)
    sys.exit(code)
