"""Commands that are killed at random moments leave nothing that `testbed down --all` does not remove.

A few kills by default; the soak makes 200 of them (TESTBED_KILLS).
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.deadline import Deadline
from tests.labs.helpers import processes_of, unique

KILLS = int(os.environ.get("TESTBED_KILLS", "8"))
SEED = int(os.environ.get("TESTBED_SEED", "0")) or random.SystemRandom().randrange(1 << 32)


def command(what: str, name: str, reports: Path) -> list[str]:
    """A command line of the test-bed, for a small lab."""
    base = [sys.executable, "-m", "testbed"]
    if what in ("run", "runs"):
        names = ["host_gw"] if what == "run" else ["host_gw", "udp"]
        return [*base, "run", *names, "--", "--name", name, "--reports", str(reports), "-k", "POD-01 or HGW-01"]
    if what == "up":
        return [*base, "up", "flat", "--backend", "host_gw", "--name", name]
    return [*base, "down", "--name", name]


def leavings(name: str, state: Path, temporary: Path) -> list[str]:
    """Whatever of a lab is still there."""
    processes = [f"process {pid}" for pid in processes_of(name)]
    files = [str(path) for folder in (state, temporary) for path in folder.rglob("*") if path.is_file()]
    return processes + files


def test_killed_commands_leave_nothing(tmp_path: Path) -> None:
    state, temporary, reports = tmp_path / "state", tmp_path / "tmp", tmp_path / "reports"
    temporary.mkdir()
    env = os.environ | {"TESTBED_STATE": str(state), "TMPDIR": str(temporary)}
    dice = random.Random(SEED)
    print(f"TESTBED_SEED={SEED}")

    def run(argv: list[str], timeout: float | None = None) -> bool:
        """Run a command, or kill it after so many seconds; whether it was killed."""
        process = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return True
        return False

    killed = 0
    for number in range(KILLS):
        name = unique("soak")
        what = ("up", "run", "down", "runs")[number % 4]
        if what == "down":
            run(command("up", name, reports))
        killed += run(command(what, name, reports), timeout=dice.uniform(0.2, 0.8 if what == "down" else 7))
        run([sys.executable, "-m", "testbed", "down", "--all"])
        clean = Deadline(20).poll(lambda name=name: not leavings(name, state, temporary))  # type: ignore[misc]
        assert clean, f"killing `{what}` ({number}) left {leavings(name, state, temporary)}"
    assert killed, "nothing was killed: the moments are badly chosen"


@pytest.mark.parametrize("signal", ["INT", "TERM"])
def test_a_run_that_is_asked_to_end_removes_its_lab(tmp_path: Path, signal: str) -> None:
    name = unique("asked")
    env = os.environ | {"TESTBED_STATE": str(tmp_path / "state")}
    process = subprocess.Popen(
        command("run", name, tmp_path / "reports"), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert Deadline(30).poll(lambda: bool(processes_of(name))), "no lab came up"
        subprocess.run(["kill", f"-{signal}", str(process.pid)], check=True)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, out
    assert "Traceback" not in out
    assert Deadline(20).poll(lambda: not processes_of(name))
