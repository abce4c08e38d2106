"""The runtime that the tests of the CNI plugin are."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.flannel.cnilab import Runtime


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    return Runtime(tmp_path)
