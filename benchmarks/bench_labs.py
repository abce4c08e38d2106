"""How long labs take: made and wired, converged, with flannel, down; and what they weigh.

Usage: python -m benchmarks.bench_labs [--rounds N] [--json FILE]. Prints a table; medians over the rounds.

Where root can have a Docker engine (the one that runs, else a private one for the time of it) labs of containers are
measured beside the embedded ones, and beside `containerlab deploy` of the same file alone. The kinds take turns, since
what else a machine does changes more than what is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from testbed.engine import private
from testbed.errors import LabError
from testbed.labs import kinds
from testbed.labs.fabric import wait_converged
from testbed.labs.kinds import AnyLab
from testbed.labs.netns import NetnsLab
from testbed.nodes import deploy
from testbed.options import RunOptions
from testbed.topology import load_topology


def timed(function: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.monotonic()
    function()
    return time.monotonic() - began


def megabytes(belongs: Callable[[Path], bool]) -> float:
    """Memory of some processes in MB, each shared page counted once for those that share it."""
    total = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if belongs(entry):
                    lines = (entry / "smaps_rollup").read_text().splitlines()
                    total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            except OSError:
                continue
    return total / 1024


def weight(lab: AnyLab) -> float:
    """Memory of all processes of a lab in MB; with containers, all of the engine, too."""
    if isinstance(lab, NetnsLab):
        inside = os.stat(f"/proc/{lab.record.holder.pid}/ns/user").st_ino
        return megabytes(lambda entry: (entry / "ns/user").stat().st_ino == inside)
    return engine_weight()


def engine_weight() -> float:
    """Memory of the private engine and its containers in MB; 0 for another engine, whose processes are not known."""
    engine = private.running()
    if engine is None:
        return 0.0
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[entry.name] = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            except OSError:
                continue

    def below(name: str) -> bool:
        while name in parents and name != str(engine.holder.pid):
            name = parents[name]
        return name == str(engine.holder.pid)

    return megabytes(lambda entry: below(entry.name))


class Steps:
    """Progress that keeps how long each step took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[text.split()[0]] = time.monotonic() - began


def bare(kind: str, topology: str, settings: dict[str, str]) -> dict[str, float]:
    """One round of a lab without flannel."""
    spec = load_topology(topology, f"bench-{os.getpid()}", overrides=settings)
    before = engine_weight() if kind == "clab" else 0.0
    began = time.monotonic()
    lab = kinds.bring_up(kind, spec)
    wired = time.monotonic() - began
    try:
        wait_converged(lab)
        converged = time.monotonic() - began
        memory = weight(lab) - before
        one = lab.node(spec.nodes[0].name)
        command = statistics.median(timed(lambda: one.run(["true"])) for _ in range(20))
    finally:
        down = timed(lab.down)
    return {"up s": wired, "converged s": converged, "a command ms": command * 1000, "MB": memory, "down s": down}


MADE = ("Making", "Looking", "Deploying", "Addressing")
"""First words of the steps that make a lab; the others are flannel's."""


def whole(kind: str, backend: str) -> dict[str, float]:
    """One round of racks with flannel and pods."""
    options = RunOptions(backend=backend, name=f"bench-{os.getpid()}", topology="racks", lab=kind)
    before = engine_weight() if kind == "clab" else 0.0
    steps = Steps()
    began = time.monotonic()
    cluster = deploy.bring_up(options, steps)
    up = time.monotonic() - began
    memory = weight(cluster.lab) - before
    flannel = sum(seconds for word, seconds in steps.seconds.items() if word not in MADE)
    made = steps.seconds.get("Deploying", 0.0)
    down = timed(cluster.lab.down)
    return {"up s": up, "of it containerlab s": made, "of it flannel s": flannel, "MB": memory, "down s": down}


def containerlab_alone() -> dict[str, float]:
    """One round of `containerlab deploy` and `destroy` of the file that we render for racks."""
    from testbed.clab import remains
    from testbed.clab.program import find_containerlab
    from testbed.engine.find import find_engine
    from testbed.images.chosen import images_of
    from testbed.labs import clab

    spec = load_topology("racks", f"bench-{os.getpid()}")
    engine, program = find_engine(), find_containerlab()
    clab.write_files(spec, images_of(engine, "host"))
    folder = remains.folder_of(spec.id)
    with remains.one_at_a_time() as lock:
        try:
            up = timed(lambda: program.deploy(folder, engine, lock))
        finally:
            down = timed(lambda: program.destroy(folder, engine, lock))
            remains.remove_files(spec.id)
    return {"up s": up, "down s": down}


CASES: dict[str, Callable[[], dict[str, float]]] = {
    "netns: racks": partial(bare, "netns", "racks", {}),
    "netns: clos of 36 nodes": partial(bare, "netns", "clos", {"racks": "6", "nodes": "6"}),
    "netns: racks with flannel": partial(whole, "netns", "vxlan"),
}
CONTAINERS: dict[str, Callable[[], dict[str, float]]] = {
    "clab: racks": partial(bare, "clab", "racks", {}),
    "clab: containerlab alone": containerlab_alone,
    "clab: racks with flannel": partial(whole, "clab", "vxlan"),
}


@contextmanager
def engine() -> Iterator[bool]:
    """Whether there is an engine for labs of containers as long as the block lasts; starts one where none runs."""
    from testbed.engine.find import find_engine

    started = False
    try:
        try:
            found = find_engine()
        except LabError:
            private.start()
            started = True
            found = find_engine()
        if not found.local:
            raise LabError("its namespaces are out of reach")
    except LabError as error:
        print(f"no labs of containers: {error}", file=sys.stderr)
        yield False
        return
    try:
        yield True
    finally:
        if started:
            private.stop()


def ratios(rounds: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """How containers compare, medians of each round's ratio: with containerlab's own and flannel's start, and with
    network namespaces.

    Of the first two the one with the deploy that was part of it says what we add, whatever the machine does meanwhile.
    """
    if "clab: racks" not in rounds:
        return {}
    whole, embedded = rounds["clab: racks with flannel"], rounds["netns: racks with flannel"]
    bare = zip(rounds["clab: racks"], rounds["netns: racks"], strict=True)
    alone = zip(whole, rounds["clab: containerlab alone"], strict=True)
    return {
        "our up / (containerlab deploy + flannel's start)": statistics.median(
            ours["up s"] / (deploy["up s"] + ours["of it flannel s"]) for ours, deploy in alone
        ),
        "the same, with the deploy that was part of it": statistics.median(
            ours["up s"] / (ours["of it containerlab s"] + ours["of it flannel s"]) for ours in whole
        ),
        "clab up / netns up": statistics.median(ours["up s"] / theirs["up s"] for ours, theirs in bare),
        "with flannel": statistics.median(
            ours["up s"] / theirs["up s"] for ours, theirs in zip(whole, embedded, strict=True)
        ),
    }


def measure(wanted: dict[str, Callable[[], dict[str, float]]], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Run every case in turn, round by round; each other round backwards, as neighbours are alike."""
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in wanted}
    for number in range(rounds):
        for name, case in list(wanted.items())[:: -1 if number % 2 else 1]:
            seen[name].append(case())
    return seen


def main() -> None:
    """Measure, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="put all figures there, too")
    given = parser.parse_args()
    with engine() as there:
        seen = measure(CASES | CONTAINERS if there else CASES, given.rounds)
    figures = {
        name: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for name, results in seen.items()
    }
    for name, values in figures.items():
        print(f"{name:28}", "  ".join(f"{key} {value:.2f}" for key, value in values.items()))
    for name, ratio in ratios(seen).items():
        print(f"{name}: {ratio:.2f}")
    if given.json:
        record = {"medians": figures, "rounds": seen, "ratios": ratios(seen), "load": os.getloadavg()[0]}
        given.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
