"""The tests of labs that this machine's kernel skips, in the guest."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.guest.build import Kernel
from tests.labs.helpers import need_lab

HERE = Path(__file__).parents[2]
SECONDS = 600

TESTS = {
    "tests/labs/test_link_faults.py": ("measured or rate or declares", 4),
    "tests/labs/test_vrf.py": ("fabric", 3),
}
"""Files with the names of the tests that need more than this kernel may have, and how many these are."""


@pytest.mark.parametrize("path", TESTS)
def test_in_the_guest(kernel: Kernel, path: str) -> None:
    if kernel.way == "packaged":
        pytest.skip("Debian's own guest kernel does not have everything")
    need_lab()
    names, count = TESTS[path]
    inner = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", "/var/tmp/tests"]
    argv = [sys.executable, "-m", "testbed", "kernel", "run", "--", *inner, path, "-k", names]
    # Where this process keeps its labs the guest may not write.
    env = {name: value for name, value in os.environ.items() if name != "TESTBED_STATE"}
    done = subprocess.run(argv, cwd=HERE, env=env, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"\b{count} passed, \d+ deselected", done.stdout), done.stdout
