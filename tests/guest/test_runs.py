"""Whole runs in guests: their parts, their ends and what is left of them.

The rows here are ones that no lab can check, so that none is brought up: they are skipped, in the guest.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.deadline import Deadline
from testbed.errors import Exit
from testbed.guest.build import Kernel

HERE = Path(__file__).parents[2]
SECONDS = 180
ROWS = "SVC-04 or SVC-05"


class Runs:
    """Starts runs; everything of theirs lies below one folder, by which their processes are known."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.report = folder / "reports" / "vxlan"
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *options: str, sabotage: str = "") -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "testbed", "run", "vxlan", "--", "--kernel", "guest", *options, "-k", ROWS]
        process = subprocess.Popen(
            [*argv, "--reports", str(self.report), "-p", "tests.guest.saboteur"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=HERE,
            env={**os.environ, "TMPDIR": str(self.folder), "SABOTAGE": sabotage, "CI": ""},
            start_new_session=True,  # no terminal whose Ctrl-C would reach all of them
        )
        self.started.append(process)
        return process

    def run(self, *options: str, sabotage: str = "") -> tuple[int, str]:
        process = self.start(*options, sabotage=sabotage)
        said = process.communicate(timeout=SECONDS)[0]
        return process.returncode, said

    def checks(self) -> list[tuple[str, str]]:
        found = json.loads((self.report / "checks.json").read_text())
        return [(check["id"], check["verdict"]) for check in found["checks"]]

    def waiting(self, count: int) -> bool:
        """Whether so many guests have come to their first check."""
        return bool(Deadline(SECONDS).poll(lambda: len(list(self.folder.rglob("waiting"))) == count))

    def processes(self) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    known = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                except OSError:
                    continue
                if str(self.folder).encode() in known and state not in "ZX":
                    found.append(int(entry.name))
        return found

    def gone(self) -> bool:
        return bool(Deadline(30).poll(lambda: not self.processes() or None))


@pytest.fixture
def runs(kernel: Kernel, tmp_path: Path) -> Iterator[Runs]:
    runs = Runs(tmp_path)
    yield runs
    for process in runs.started:
        process.kill()
        process.wait()


BOTH = [("SVC-04", "skipped"), ("SVC-05", "skipped")]


@pytest.mark.parametrize("options", [[], ["-n", "2"]])
def test_one_report_of_all_guests(runs: Runs, options: list[str]) -> None:
    code, said = runs.run(*options)
    assert code == Exit.NOTHING_RAN, said
    assert runs.checks() == BOTH
    assert json.loads((runs.report / "checks.json").read_text())["run"]["kernel"] == "guest"
    lines = [line for line in said.splitlines() if "     skipped  SVC" in line]
    where = [line.partition(" │ ")[0] for line in lines]
    assert sorted(where) == (["1", "2"] if options else sorted(lines)), said
    assert said.count("report: ") == 1, said
    assert [path.name for path in runs.report.parent.iterdir()].count("vxlan") == 1
    assert not list(runs.report.parent.glob(".vxlan.growing-*"))


@pytest.mark.parametrize(("options", "done"), [([], BOTH[:1]), (["-n", "2"], BOTH)])
def test_what_a_guest_did_before_it_died_is_reported(
    runs: Runs, options: list[str], done: list[tuple[str, str]]
) -> None:
    code, said = runs.run(*options, sabotage="die")
    assert code == Exit.LAB, said
    assert "last words" in said
    assert runs.checks() == done, said


@pytest.mark.parametrize("options", [[], ["-n", "2"]])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_all_guests(runs: Runs, options: list[str], number: signal.Signals) -> None:
    process = runs.start(*options, sabotage="wait")
    assert runs.waiting(2 if options else 1)
    assert runs.processes()
    process.send_signal(number)
    said = process.communicate(timeout=SECONDS)[0]
    assert process.returncode == Exit.INTERRUPTED or number == signal.SIGTERM, said
    assert process.returncode != 0, said
    assert runs.gone(), runs.processes()


def test_kill_9_leaves_no_guest_of_several(runs: Runs) -> None:
    process = runs.start("-n", "2", sabotage="wait")
    assert runs.waiting(2)
    process.kill()
    process.wait()
    assert runs.gone(), runs.processes()


def test_telling_what_would_run_takes_no_guest(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "testbed", "run", "vxlan", "--", "--kernel", "guest", "--collect-only", "-q"]
    env = {**os.environ, "TESTBED_GUEST_KERNEL": "/nowhere", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(argv, cwd=HERE, env=env, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    assert "SVC-04" in done.stdout
    assert not list(tmp_path.rglob("*"))
