"""Lab kinds: how a `LabSpec` is brought to life."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Protocol

from testbed.errors import LabError


class Progress(Protocol):
    """Tells the user what is being done, one ticked and timed line a step."""

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Show that this is being done, and how it ended."""
        ...


class Quiet:
    """Progress that nobody wants to see."""

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Say nothing."""
        yield


@cache
def interpreter() -> str:
    """The Python that programs inside a lab run on: the real file, never a wrapper script, and readable in there.

    Raises LabError where this Python lives in a folder that a lab cannot see.
    """
    real = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    for path in (real, "/usr/bin/python3"):
        path = os.path.realpath(path)
        if path.startswith("/usr/") and os.access(path, os.X_OK):
            return path
    raise LabError(
        f"the Python at {real} lies outside /usr, where programs inside a lab cannot read it",
        hint="install the distribution's own python3, for example `apt-get install python3`",
    )
