"""What the tests of labs share."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path

import pytest

from testbed.errors import LabError
from testbed.labs import netns

_numbers = count(1)


def need_lab() -> None:
    """Skip, and say why, where this machine lacks what a lab needs."""
    try:
        netns.frr_folder()
    except LabError as error:
        pytest.skip(str(error))


def unique(word: str) -> str:
    """A lab id that no other test run on this machine has."""
    return f"test-{word}-{os.getpid()}-{next(_numbers)}"


def processes_of(lab_id: str) -> list[int]:
    """The live processes on this machine that hold a lab or one of its nodes."""
    marker = f"testbed-lab={lab_id}\0".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if marker in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue  # ended between the two looks
    return found
