"""What the guest must be able to do, proven in it; and a run of the suites there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from testbed.flannelspec import BACKENDS
from testbed.guest.build import Kernel
from testbed.guest.check import Checked, check, rows
from tests.labs.helpers import need_lab

HERE = Path(__file__).parents[2]
RUN_SECONDS = 300

WELL: Mapping[str, Any] = {"ok": True, "detail": ""}


@pytest.fixture(scope="module")
def checked(kernel: Kernel) -> Checked:
    return check(kernel)


def test_everything_that_can_be_tried_works_for_root_and_for_an_ordinary_user(checked: Checked) -> None:
    assert [row for row in checked.rows if not row.ok] == []
    kernel_rows = [row for row in checked.rows if row.feature not in ("etcd", "frr", "strongswan") and row.tried]
    assert len(kernel_rows) > 35
    assert all(row.root == "" and row.user == "" for row in kernel_rows)


def test_every_backend_s_features_are_among_them(checked: Checked) -> None:
    works = {row.feature for row in checked.rows if row.root == "" and row.user == ""}
    for backend in BACKENDS.values():
        assert set(backend.kernel_features) <= works, backend.run


def test_a_feature_that_fails_for_either_user_is_seen() -> None:
    bad = {"ok": False, "detail": "Operation not supported"}
    table = {row.feature: row for row in rows({"root": {"veth": WELL}, "user": {"veth": bad}, "services": {}})}
    assert not table["veth"].ok
    assert table["veth"].user == "Operation not supported"
    assert not table["vxlan"].tried
    assert table["vxlan"].ok, "what could not be tried is no failure"


def arguments(folder: Path, *options: str) -> list[str]:
    argv = [sys.executable, "-m", "testbed", "run", "host_gw", "--kernel", "guest"]
    return [*argv, "--reports", str(folder / "reports" / "host_gw"), *options]


@pytest.fixture
def ready(kernel: Kernel) -> None:
    need_lab()


@pytest.mark.usefixtures("ready")
def test_a_run_in_the_guest_has_the_same_report_and_exit_code(tmp_path: Path) -> None:
    argv = arguments(tmp_path, "-k", "HGW-01")
    done = subprocess.run(argv, cwd=HERE, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "reports" / "host_gw" / "checks.json").read_text())
    assert report["run"]["kernel"] == "guest"
    assert report["run"]["exit"] == 0
    assert {entry["verdict"] for entry in report["checks"]} == {"held"}
    assert (tmp_path / "reports" / "host_gw" / "junit.xml").stat().st_uid == os.getuid()


@pytest.mark.usefixtures("ready")
def test_an_interrupted_run_ends_with_130_and_its_report(tmp_path: Path) -> None:
    with subprocess.Popen(
        arguments(tmp_path), cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout
        said = ""
        for line in process.stdout:
            said += line
            if " held " in line:
                break
        process.send_signal(signal.SIGINT)
        said += process.communicate(timeout=RUN_SECONDS)[0]
    assert process.returncode == 130, said
    report = json.loads((tmp_path / "reports" / "host_gw" / "checks.json").read_text())
    assert report["run"]["exit"] == 130


@pytest.mark.usefixtures("ready")
def test_wrong_input_is_told_as_outside(tmp_path: Path) -> None:
    argv = arguments(tmp_path, "--net-conf", "nonsense")
    done = subprocess.run(argv, cwd=HERE, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "nonsense" in done.stdout + done.stderr
