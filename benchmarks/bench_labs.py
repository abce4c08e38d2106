"""How long an embedded lab takes: made and wired, converged, with flannel, down; and what it weighs.

Usage: python -m benchmarks.bench_labs [--rounds N]. Prints a table; medians over the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from testbed.labs import netns
from testbed.labs.netns import NetnsLab
from testbed.nodes import deploy
from testbed.nodes.fabric import wait_converged
from testbed.options import RunOptions
from testbed.topology import load_topology


def timed(function: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.monotonic()
    function()
    return time.monotonic() - began


def resident(lab: NetnsLab) -> float:
    """Memory of all processes of a lab, in MB, each shared page counted once for those that share it."""
    namespaces = {os.stat(f"/proc/{lab.record.holder.pid}/ns/user").st_ino}
    total = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "ns/user").stat().st_ino in namespaces:
                    lines = (entry / "smaps_rollup").read_text().splitlines()
                    total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            except OSError:
                continue
    return total / 1024


def bare(topology: str, settings: dict[str, str]) -> dict[str, float]:
    """One round of a lab without flannel."""
    spec = load_topology(topology, f"bench-{os.getpid()}", overrides=settings)
    began = time.monotonic()
    lab = netns.bring_up(spec)
    wired = time.monotonic() - began
    try:
        converged = timed(lambda: wait_converged(lab))
        memory = resident(lab)
        one = lab.node(spec.nodes[0].name)
        command = statistics.median(timed(lambda: one.run(["true"])) for _ in range(20))
    finally:
        down = timed(lab.down)
    return {"wired s": wired, "converged s": converged, "a command ms": command * 1000, "MB": memory, "down s": down}


def whole(backend: str) -> dict[str, float]:
    """One round of racks with flannel and pods."""
    options = RunOptions(backend=backend, name=f"bench-{os.getpid()}", topology="racks")
    began = time.monotonic()
    cluster = deploy.bring_up(options)
    up = time.monotonic() - began
    assert isinstance(cluster.lab, NetnsLab)
    memory = resident(cluster.lab)
    return {"up s": up, "MB": memory, "down s": timed(cluster.lab.down)}


CASES: dict[str, Callable[[], dict[str, float]]] = {
    "racks, bare": lambda: bare("racks", {}),
    "clos of 36 nodes, bare": lambda: bare("clos", {"racks": "6", "nodes": "6"}),
    "racks with flannel (vxlan)": lambda: whole("vxlan"),
}


def main() -> None:
    """Run every case in turn, round by round, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in CASES}
    for _ in range(rounds):
        for name, case in CASES.items():
            seen[name].append(case())
    for name, results in seen.items():
        figures = {key: statistics.median(result[key] for result in results) for key in results[0]}
        print(f"{name:28}", "  ".join(f"{key} {value:.2f}" for key, value in figures.items()))


if __name__ == "__main__":
    main()
