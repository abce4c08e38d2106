"""Backends are as fast as what they do to a packet lets expect: plain routes, then vxlan, then a process on the way.

Each run's figure is a share of its own underlay, taken at the same moments, and all have the same topology. Only in the
soak (TESTBED_SOAK): what else a machine does disturbs even that, so that it takes several runs each.
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
FIGURE = "SS: TCP, 1 connection"
ROOM = 0.9
"""What noise may take from host-gw beside vxlan, which costs little where no packet leaves the machine."""


def share(backend: str, folder: Path) -> float:
    """What one connection between two nodes' pods has of the underlay's throughput, with that backend."""
    argv = [sys.executable, "-m", "testbed", "run", backend, "--", "--name", unique("speed"), "--reports", str(folder)]
    argv += ["--topology", "flat", "-k", "PERF-01"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=600)
    assert done.returncode == Exit.HELD, done.stdout + done.stderr
    checks = json.loads((folder / "checks.json").read_text())["checks"]
    found = [one["value"] for check in checks for one in check["figures"] if one["figure"] == FIGURE]
    assert len(found) == 1, f"{backend}: {found}"
    return float(found[0])


@pytest.mark.skipif(not os.environ.get("TESTBED_SOAK"), reason="a part of the soak (TESTBED_SOAK)")
@pytest.mark.timeout(3600)
def test_plain_routes_are_fastest_and_a_process_is_slowest(tmp_path: Path) -> None:
    backends = ("host_gw", "vxlan", "udp")
    shares: dict[str, list[float]] = {backend: [] for backend in backends}
    for number in range(ROUNDS):  # in turn, for a machine's load changes
        for backend in backends:
            shares[backend].append(share(backend, tmp_path / f"{backend}-{number}"))
    host_gw, vxlan, udp = (statistics.median(shares[backend]) for backend in backends)
    assert host_gw >= ROOM * vxlan, shares
    assert vxlan >= udp, shares
