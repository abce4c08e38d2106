"""Backends are as fast as what they do to a packet lets expect: plain routes, then vxlan, then a process on the way.

Each run's figure is in proportion to its own underlay's, taken at the same moments, and all have the same topology.
Only in the soak (TESTBED_SOAK): what else a machine does disturbs even that, so that it takes several runs each.
Round trips tell all three apart. Throughput tells udp apart alone: on a busy machine vxlan's was the higher one of
the other two, by two runs each at a load of 20 (0.8 and 1.4 of the underlay's by one connection, beside host-gw's
0.40 and 0.41).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.errors import Exit
from tests.labs.helpers import unique

ROUNDS = 3
BACKENDS = ("host_gw", "vxlan", "udp")
THROUGHPUT, ROUND_TRIP = "SS: TCP, 1 connection", "SS: round trip, p50"
NOISE = 1.1
"""So many times as long as by vxlan may a round trip by plain routes take."""


def run(backend: str, folder: Path) -> None:
    """Measure what pods of two nodes have of the underlay, with that backend."""
    argv = [sys.executable, "-m", "testbed", "run", backend, "--", "--name", unique("speed"), "--reports", str(folder)]
    argv += ["--topology", "flat", "-k", "PERF-01"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=600)
    assert done.returncode == Exit.HELD, done.stdout + done.stderr


def figures(folder: Path) -> dict[str, float]:
    """What a run's report says that it measured."""
    checks = json.loads((folder / "checks.json").read_text())["checks"]
    return {one["figure"]: float(one["value"]) for check in checks for one in check["figures"]}


def assert_in_order(reports: dict[str, list[Path]]) -> None:
    """Assert it of the medians of each backend's runs."""
    seen = {
        figure: {name: statistics.median(figures(one)[figure] for one in folders) for name, folders in reports.items()}
        for figure in (THROUGHPUT, ROUND_TRIP)
    }
    trip, throughput = seen[ROUND_TRIP], seen[THROUGHPUT]
    assert trip["host_gw"] <= NOISE * trip["vxlan"], seen
    assert trip["vxlan"] <= trip["udp"], seen
    assert min(throughput["host_gw"], throughput["vxlan"]) >= throughput["udp"], seen


@pytest.mark.skipif(not os.environ.get("TESTBED_SOAK"), reason="a part of the soak (TESTBED_SOAK)")
@pytest.mark.timeout(3600)
def test_plain_routes_are_fastest_and_a_process_is_slowest(tmp_path: Path) -> None:
    reports: dict[str, list[Path]] = {backend: [] for backend in BACKENDS}
    for number in range(ROUNDS):  # in turn, for a machine's load changes
        for backend in BACKENDS:
            reports[backend].append(tmp_path / f"{backend}-{number}")
            run(backend, reports[backend][-1])
    assert_in_order(reports)


@pytest.mark.parametrize("swapped", [("host_gw", "vxlan"), ("vxlan", "udp"), ("host_gw", "udp")])
def test_any_other_order_is_noticed(tmp_path: Path, swapped: tuple[str, str]) -> None:
    measured = {"host_gw": (0.4, 1.5), "vxlan": (1.4, 2.9), "udp": (0.06, 61.0)}  # of the two, as they were once
    reports: dict[str, list[Path]] = {}
    for backend, (throughput, trip) in measured.items():
        folder = tmp_path / backend
        folder.mkdir()
        found = [{"figure": THROUGHPUT, "value": throughput}, {"figure": ROUND_TRIP, "value": trip}]
        (folder / "checks.json").write_text(json.dumps({"checks": [{"figures": found}]}))
        reports[backend] = [folder]
    assert_in_order(reports)
    first, second = swapped
    with pytest.raises(AssertionError, match="round trip"):
        assert_in_order(reports | {first: reports[second], second: reports[first]})
