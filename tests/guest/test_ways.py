"""The other ways to a guest keep the same contract: Debian's user-mode-linux, and QEMU; where they were fetched."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.deadline import Deadline
from testbed.guest.build import Kernel
from testbed.guest.packaged import find_packaged
from testbed.guest.qemu import find_qemu
from tests.guest import test_run

FINDERS = {"packaged": find_packaged, "qemu": find_qemu}


@pytest.fixture(params=list(FINDERS))
def guest(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[test_run.Guest]:
    found: Kernel | None = FINDERS[request.param]()
    if found is None:
        pytest.skip(f"it was not fetched: `testbed kernel run --way {request.param} -- true` does so")
    monkeypatch.setattr(test_run, "SECONDS", 300)
    # Not below pytest's own folder, which every pytest closes to others again; root's guest is somebody else.
    with tempfile.TemporaryDirectory(prefix="test-guest-") as name:
        Path(name).chmod(0o755)
        guest = test_run.Guest(found, Path(name))
        yield guest
        guest.end()


def test_output_errors_files_and_the_exit_code_are_the_command_s(guest: test_run.Guest) -> None:
    done = guest.run("sh", "-c", f"uname -r; echo wrong >&2; echo data >{guest.shared}/kept; exit 7")
    assert done.returncode == 7, done.stderr.decode()
    assert done.stdout.decode().strip() not in ("", os.uname().release)
    assert done.stderr == b"wrong\n"
    assert (guest.shared / "kept").read_text() == "data\n"
    assert guest.processes() == []


def test_a_signal_reaches_the_command(guest: test_run.Guest) -> None:
    process = guest.start("sh", "-c", f"trap 'exit 9' TERM; touch {guest.shared}/ready; while :; do sleep 0.2; done")
    assert Deadline(200).poll(lambda: (guest.shared / "ready").exists() or None)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 9


def test_nothing_outlives_a_caller_that_is_killed(guest: test_run.Guest) -> None:
    process = guest.start("sh", "-c", f"touch {guest.shared}/ready; sleep 600")
    assert Deadline(200).poll(lambda: (guest.shared / "ready").exists() or None)
    assert guest.processes()
    process.kill()
    process.wait()
    assert Deadline(30).poll(lambda: not guest.processes() or None)
