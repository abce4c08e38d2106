"""A private Docker engine for the tests that need one, under a folder of state of its own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from testbed.clab.program import find_containerlab
from testbed.engine import private
from testbed.errors import TestbedError


@contextmanager
def engine_state() -> Iterator[Path]:
    """The folder of a private engine that runs as long as the block; skips, and says why, where none can."""
    if os.geteuid() != 0:
        pytest.skip("a Docker engine is started by root only")
    if shutil.which("dockerd") is None:
        pytest.skip("there is no dockerd on this machine")
    try:
        find_containerlab()
    except TestbedError as error:
        pytest.skip(f"no containerlab: {error}")
    folder = Path(tempfile.mkdtemp(prefix="testbed-engine-"))  # short: a socket's path has at most 107 characters
    try:
        with using(folder):
            private.start()
        try:
            yield folder
        finally:
            with using(folder):
                private.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def using(folder: Path) -> Iterator[None]:
    """Labs of the block are of that state, and on that engine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESTBED_STATE", str(folder))
        patch.delenv("DOCKER_HOST", raising=False)
        yield
