"""Runs in the guest kernel what this machine's kernel skips: `python -m tests.heals.inguest`, and options of pytest.

Ends at once where nothing is missing, but for runs that are asked for: `-k dual_stack`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from testbed.doctor import probe_features
from testbed.flannelspec import BACKENDS

RUNS = ("ipip", "wireguard", "dual_stack")
HERE = Path(__file__).parents[2]


def main() -> int:
    """Run them; returns pytest's exit status."""
    features = probe_features()
    missing = [run for run in RUNS if not all(features[one]["ok"] for one in BACKENDS[run].kernel_features)]
    if not missing and "-k" not in sys.argv:
        print("this kernel has it all: nothing is left for the guest")
        return 0
    reports = HERE / "reports" / "heals-guest"
    reports.mkdir(parents=True, exist_ok=True)
    passed = [f"{key}={text}" for key, text in os.environ.items() if key.startswith("TESTBED_")]
    # Everything takes some five times as long there.
    words = ["env", *passed, "TESTBED_TIME_SCALE=8", sys.executable, "-m", "pytest", "-q"]
    words += ["-k", " or ".join(missing), f"--reports={reports}", *sys.argv[1:]]
    words += [] if any(word.startswith("tests/") for word in sys.argv[1:]) else ["tests/heals"]
    argv = [sys.executable, "-m", "testbed", "kernel", "run", "--writable", str(reports), "--", *words]
    return subprocess.run(argv, cwd=HERE, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
