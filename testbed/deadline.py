"""Waiting for something to become true: against a deadline, never for a fixed time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from testbed import journal

T = TypeVar("T")

LATE = 0.5
"""The share of its time from which on what a check waited for has come late."""


def time_scale() -> float:
    """The one factor that all deadlines are multiplied by, from TESTBED_TIME_SCALE; for slow machines."""
    try:
        return max(0.1, float(os.environ.get("TESTBED_TIME_SCALE", "1")))
    except ValueError:
        return 1.0


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point in time, `seconds` (scaled) after it was set; everything that waits on it shares that zero point."""

    seconds: float
    began: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        """Seconds since it was set."""
        return time.monotonic() - self.began

    @property
    def left(self) -> float:
        """Seconds until it passes; 0 once it has."""
        return max(0.0, self.seconds * time_scale() - self.elapsed)

    @property
    def passed(self) -> bool:
        """Whether its time is over."""
        return self.left == 0

    def poll(self, look: Callable[[], T | None], *, every: float = 0.05) -> T | None:
        """Look until there is something to see, and return it; None once the deadline has passed.

        It looks at least twice, the last time after the deadline, so that a slow machine does not miss what is there.
        A check that had to wait for it for more than half of the time is told to be slow.
        """
        looks = 0
        while True:
            over = self.passed
            seen = look()
            looks += 1
            if seen is not None and seen is not False:
                if looks > 1:
                    self._note_late()
                return seen
            if over:
                return None
            time.sleep(min(every, self.left))

    def _note_late(self) -> None:
        most = self.seconds * time_scale()
        if (notes := journal.current()) is not None and (took := self.elapsed) > LATE * most:
            notes.late.append(f"it came after {took:.1f} s of at most {most:.1f} s")
