"""Waiting for something to become true: against a deadline, never for a fixed time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


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
        """
        while True:
            over = self.passed
            seen = look()
            if seen is not None and seen is not False:
                return seen
            if over:
                return None
            time.sleep(min(every, self.left))
