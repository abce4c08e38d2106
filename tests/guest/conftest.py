"""A guest kernel for the tests, where this machine has one; they never build it."""

from __future__ import annotations

import pytest

from testbed.guest.build import Kernel, find_built
from testbed.guest.kernels import given


@pytest.fixture(scope="session")
def kernel() -> Kernel:
    found = given() or find_built()  # the others are slow, and have tests of their own
    if found is None:
        pytest.skip("no guest kernel is here: `testbed kernel build` makes one")
    return found
