"""What the bundled flanneld and CNI plugin cost, beside others where their paths are given, and beside the floors.

Usage: ./run bench -- [--peer FLANNELD] [--peer-cni PLUGIN] [--bundle-cni PLUGIN] [--only PART,…] [--quick] …
The programs take turns within one run: only then can they be compared. Prints a table and writes bench.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import arena, figures
from benchmarks.bench_kubernetes import kubernetes
from benchmarks.figures import Figure
from benchmarks.parts import PARTS, Bench
from flannel import __version__

_INSIDE = "FLANNEL_BENCH_INSIDE"
_MODULE = "benchmarks.bench_flanneld"
ALL = (*PARTS, "kubernetes")
BUNDLED = Path("dist/bundle/flannel/flannel")
"""Where `nox -s bundle` puts the plugin."""


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="./run bench --", description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--peer", type=Path, metavar="PATH", help="another flanneld")
    parser.add_argument("--peer-cni", type=Path, metavar="PATH", help="another CNI plugin")
    parser.add_argument(
        "--bundle-cni", type=Path, metavar="PATH", help=f"the bundled plugin ({BUNDLED}, if it is there)"
    )
    parser.add_argument("--only", type=_parts, default=list(ALL), metavar="PART,…", help=f"of {', '.join(ALL)}")
    parser.add_argument("--leases", type=_numbers, metavar="N,…", help="remote leases (0,200,1000,4000)")
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes of the kubernetes part (1000)")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds that medians are taken of (3)")
    parser.add_argument("--quick", action="store_true", help="a look in two minutes, without the kubernetes part")
    parser.add_argument("--python", default="", metavar="PATH", help="interpreter of the bundled programs")
    parser.add_argument("--output", type=Path, default=Path("reports/bench/bench.json"), metavar="PATH")
    given = parser.parse_args()
    if given.bundle_cni is None and os.access(BUNDLED, os.X_OK):
        given.bundle_cni = BUNDLED
    for path in (given.peer, given.peer_cni, given.bundle_cni):
        if path is not None and not os.access(path, os.X_OK):
            parser.error(f"{path} is no program")
    if given.quick:
        given.only = [part for part in given.only if part != "kubernetes" or len(given.only) == 1]
    given.leases = given.leases or ([0, 200] if given.quick else [0, 200, 1000, 4000])
    given.nodes = given.nodes or (100 if given.quick else 1000)
    given.rounds = given.rounds or (1 if given.quick else 3)
    if min(given.rounds, given.nodes, max(given.leases)) < 1 or max(given.leases) > 4000:
        parser.error("rounds, nodes and leases are at least 1, leases at most 4000")
    return given


def _parts(text: str) -> list[str]:
    parts = text.split(",")
    unknown = [part for part in parts if part not in ALL]
    if unknown:
        raise argparse.ArgumentTypeError(f"no part {', '.join(unknown)}; there are {', '.join(ALL)}")
    return [part for part in ALL if part in parts]


def _numbers(text: str) -> list[int]:
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers") from None


def interpreter(given: str) -> str:
    """The interpreter itself: where `python3` is a version manager's script, starting it says nothing of Python."""
    return os.path.realpath(given or sys.executable)


def inside(given: argparse.Namespace, results: Path) -> None:
    """Measure in this box of namespaces; each figure goes to `results` as it comes."""
    box = arena.Arena()
    python = interpreter(given.python)
    ours, plugin, library = arena.bundled(box.folder, python)
    programs, plugins = [ours], {"ours": plugin}
    if given.peer:
        programs.append(arena.Program("peer", [str(given.peer.absolute())]))
    for name, path in (("peer", given.peer_cni), ("bundled form", given.bundle_cni)):
        if path:
            plugins[name] = path.absolute()
    bench = Bench(
        box, programs, plugins, python, str(library), given.leases, given.rounds,
        seconds=2 if given.quick else 5, idle=10 if given.quick else 60,
    )  # fmt: skip
    with results.open("a") as file:
        for part in given.only:
            if part not in PARTS:
                continue
            print(f"{part} …", file=sys.stderr, flush=True)
            try:
                for one in PARTS[part](bench):
                    file.write(json.dumps(one.as_json()) + "\n")
                    file.flush()
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                print(f"{part} could not be measured: {error}", file=sys.stderr, flush=True)
                file.write(json.dumps(Figure(part, "", None, note=f"not measured: {error}"[:300]).as_json()) + "\n")


def main() -> int:
    """Measure, print the table, write the file; 1 where a part could not be measured."""
    given = options()
    if results := os.environ.get(_INSIDE):
        arena.settle()
        inside(given, Path(results))
        return 0
    with tempfile.TemporaryDirectory(prefix="flannel-bench-") as folder:
        path = Path(folder) / "figures"
        path.touch()
        if any(part in PARTS for part in given.only):
            arena.enter(_MODULE, {_INSIDE: str(path)})
        seen = [figures.from_json(json.loads(line)) for line in path.read_text().splitlines()]
    if "kubernetes" in given.only:
        print("kubernetes …", file=sys.stderr, flush=True)
        seen += kubernetes(given.nodes, given.peer)
    print(figures.table(seen))
    for one in seen:
        if one.note:
            print(f"{one.figure}: {one.note}")
    python = interpreter(given.python)
    versions = {
        "ours": __version__,
        "python": figures.version_of([python, "-VV"]),
        "etcd": figures.version_of(["etcd", "--version"]),
    }
    if given.peer:
        versions["peer"] = figures.version_of([str(given.peer), "--version"])
    figures.write(given.output, seen, versions=versions, seed=None, leases=given.leases, rounds=given.rounds)
    print(f"written to {given.output}")
    return 1 if any(one.note.startswith("not measured") for one in seen) else 0


if __name__ == "__main__":
    sys.exit(main())
