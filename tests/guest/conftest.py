"""A guest kernel for the tests, where this machine has one; they never build it."""

from __future__ import annotations

import pytest

from testbed.guest.build import Kernel
from testbed.guest.kernels import ready_kernel


@pytest.fixture(scope="session")
def kernel() -> Kernel:
    found = ready_kernel()
    if found is None:
        pytest.skip("no guest kernel is here: `testbed kernel build` makes one")
    return found
