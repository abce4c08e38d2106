"""Waiting for something with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

PATIENCE = 15.0  # seconds that anything may take on a busy machine


def until(holds: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """Return the first true value of `holds`; fail at the deadline."""
    deadline = time.monotonic() + seconds
    while not (value := holds()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds} s: {what}")
        time.sleep(0.01)
    return value
