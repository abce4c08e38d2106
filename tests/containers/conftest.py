"""A private Docker engine for the tests that need one; they are skipped, and say so, where there can be none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

from testbed.engine import private


def lacking() -> str:
    """Why there can be no private engine here; nothing where there can."""
    if os.getuid() != 0:
        return "only root can start a Docker engine"
    missing = [name for name in ("dockerd", "docker") if shutil.which(name) is None]
    return f"there is no {' and no '.join(missing)}" if missing else ""


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[private.PrivateEngine]:
    """An engine with no image, which commands find by themselves as long as the test uses `at_home`."""
    if why := lacking():
        pytest.skip(why)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESTBED_STATE", str(tmp_path_factory.mktemp("e")))
        try:
            yield private.start()
        finally:
            private.stop()


@pytest.fixture
def at_home(engine: private.PrivateEngine, monkeypatch: pytest.MonkeyPatch) -> private.PrivateEngine:
    """The same engine, as the one of this user."""
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    monkeypatch.setenv("TESTBED_STATE", str(engine.socket.parent.parent))
    return engine
