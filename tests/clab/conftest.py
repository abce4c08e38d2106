"""A private engine for the tests of labs of containers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines import engine_state, using


@pytest.fixture(scope="session")
def engine() -> Iterator[Path]:
    """The state of a private engine that this session has to itself; skips where there can be none."""
    with engine_state() as folder:
        yield folder


@pytest.fixture
def on_engine(engine: Path) -> Iterator[Path]:
    """Labs of the test are on that engine; afterwards nothing of them may be there."""
    with using(engine):
        yield engine
        assert not list(engine.glob("*.json"))
        assert not (engine / "clab").exists()
