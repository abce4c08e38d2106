"""Runs of small suites on real labs, for what a report says of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.labs.helpers import need_lab, unique

CONFIGURATION = Path(__file__).parents[2] / "testbed" / "pytest.ini"


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int
    output: str
    report: Path
    name: str

    @property
    def whole(self) -> dict[str, Any]:
        """checks.json."""
        found: dict[str, Any] = json.loads((self.report / "checks.json").read_text())
        return found

    def check(self, row: str) -> dict[str, Any]:
        """What checks.json says of a row."""
        return next(check for check in self.whole["checks"] if check["id"] == row)


Runner = Callable[..., Ended]


@pytest.fixture
def run_in_a_lab(tmp_path: Path) -> Runner:
    """Run a suite, given as its text, on a vxlan lab."""
    need_lab()

    def run(code: str, *options: str) -> Ended:
        folder = tmp_path / "suites"
        folder.mkdir(exist_ok=True)
        (folder / "test_some.py").write_text("from testbed.checks import check\n" + code)
        report, name = tmp_path / "reports" / "run", unique("report")
        argv = [sys.executable, "-m", "pytest", "-c", str(CONFIGURATION), "--rootdir", str(tmp_path)]
        argv += ["--backend=vxlan", f"--reports={report}", "--name", name, *options, str(folder / "test_some.py")]
        environment = {key: value for key, value in os.environ.items() if key not in ("CI", "COLUMNS")}
        done = subprocess.run(
            argv, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240, start_new_session=True
        )
        assert (report / "checks.json").is_file(), done.stdout + done.stderr
        return Ended(done.returncode, done.stdout + done.stderr, report, name)

    return run
