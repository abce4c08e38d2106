"""Every session holds at every MTU and with every kind of rules, and whole runs hold on a machine that has much to do.

A few of the former and one smoke run by default; the soak (TESTBED_SOAK) makes all of them, and 20 whole vxlan runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path

import pytest

from testbed.errors import Exit
from testbed.flannelspec import BACKENDS
from tests.labs.helpers import unique

SOAK = bool(os.environ.get("TESTBED_SOAK"))
FULL_RUNS = int(os.environ.get("TESTBED_FULL_RUNS", "20"))
RULES = ("iptables-nft", "iptables-legacy", "nftables")
EVERY = list(product(BACKENDS, ("9150", "1500", "1400"), RULES))
SOME = [("vxlan", "1500", "nftables"), ("udp", "1400", "iptables-legacy"), ("host_gw", "1500", "iptables-legacy")]

BUSY = "while True: sum(range(10000))"
"""What keeps a processor at work for as long as it lives."""

FULL_ROWS = 120
"""A whole vxlan run has more rows than that."""


def run(backend: str, folder: Path, *options: str, timeout: float = 900) -> tuple[int, Counter[str], str]:
    """Run a session; its exit code, how many checks ended how and how many rows (`rows`) held, and what it printed."""
    argv = [sys.executable, "-m", "testbed", "run", backend, "--", "--name", unique("soak"), "--reports", str(folder)]
    done = subprocess.run([*argv, *options], capture_output=True, text=True, timeout=timeout)
    report = folder / "checks.json"
    checks = json.loads(report.read_text())["checks"] if report.is_file() else []
    found = Counter(check["verdict"] for check in checks)
    found["rows"] = len({check["id"] for check in checks if check["verdict"] == "held"})
    return done.returncode, found, done.stdout + done.stderr


@pytest.mark.parametrize(("backend", "mtu", "rules"), EVERY if SOAK else SOME)
def test_a_session_holds_at_that_mtu_with_those_rules(backend: str, mtu: str, rules: str, tmp_path: Path) -> None:
    options = ["--mtu", mtu, "--rules", rules]
    code, verdicts, said = run(backend, tmp_path, *options, *(["--full"] if SOAK else []))
    assert code == Exit.HELD, said
    assert verdicts["held"] > 20, said


@contextmanager
def load() -> Iterator[None]:
    """Keep every processor of this machine at work."""
    with ExitStack() as stack:
        for _ in range(os.cpu_count() or 1):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", BUSY]))
            stack.callback(process.kill)
        yield


@pytest.mark.parametrize("number", range(FULL_RUNS if SOAK else 1))
def test_a_run_holds_where_processors_are_busy(number: int, tmp_path: Path) -> None:
    with load():
        code, verdicts, said = run("vxlan", tmp_path, *(["--full"] if SOAK else []))
    assert code == Exit.HELD, said
    assert set(verdicts) <= {"held", "skipped", "expected_failure", "rows"}, said
    assert verdicts["rows"] > (FULL_ROWS if SOAK else 40), said
