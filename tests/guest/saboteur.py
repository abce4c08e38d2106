"""A pytest plugin that does to a run what SABOTAGE says: `die` ends its guest, `wait` never goes on."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

POWER_OFF = 0x4321FEDC


def pytest_runtest_logstart() -> None:
    if os.environ.get("SABOTAGE") == "wait":
        (Path(os.environ["TESTBED_PART"]) / "waiting").touch()
        while True:
            time.sleep(0.05)


def pytest_runtest_logfinish() -> None:
    if os.environ.get("SABOTAGE") == "die":
        Path("/dev/kmsg").write_text("<0>last words")
        ctypes.CDLL(None).reboot(POWER_OFF)
