"""Clusters to damage, and the table of how long each damage took to heal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from testbed.doctor import probe_features
from testbed.errors import LabError
from testbed.flannelspec import BACKENDS
from testbed.nodes import deploy
from testbed.nodes.nodefiles import cni_folder
from testbed.options import RunOptions
from tests.heals.heallab import FULL, Heal, HealLab
from tests.labs.helpers import need_lab, unique

_HEALS = pytest.StashKey[list[Heal]]()
_features: dict[str, dict[str, Any]] = {}


def need(run: str) -> None:
    """Skip, and say why, where this machine's kernel lacks what a backend needs."""
    if not BACKENDS[run].implemented:
        pytest.skip(f"the lab cannot bring up {run} yet")
    if not _features:
        _features.update(probe_features())
    for feature in BACKENDS[run].kernel_features:
        found = _features.get(feature, {"ok": True})
        if not found["ok"]:
            pytest.skip(f"this kernel has no {feature}: `testbed kernel run -- python -m pytest tests/heals` has")


@pytest.fixture(scope="session", autouse=True)
def _tools() -> None:
    need_lab()
    try:
        cni_folder()
    except LabError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def record_heal(request: pytest.FixtureRequest) -> Callable[[Heal], None]:
    """Return what takes a time to heal for the table."""
    return request.config.stash.setdefault(_HEALS, []).append


@pytest.fixture(scope="module")
def make_lab(record_heal: Callable[[Heal], None]) -> Iterator[Callable[..., HealLab]]:
    """Return a function that brings up a cluster for a run; the last one's labs go with the module."""
    made: list[HealLab] = []

    def make(run: str, **options: Any) -> HealLab:
        need(run)
        asked = RunOptions(backend=run, name=unique("heals"), **{"topology": "flat", **options})
        made.append(HealLab(deploy.bring_up(asked), record_heal))
        return made[-1]

    yield make
    for lab in made:
        lab.cluster.lab.down()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table, and write it for programs."""
    heals = config.stash.get(_HEALS, [])
    if not heals:
        return
    terminalreporter.section("seconds to heal")
    for heal in heals:
        terminalreporter.write_line(f"{heal.seconds:9.3f}  {heal.run:24}  {heal.what}")
    folder = Path(config.getoption("--reports") or "reports/heals")
    folder.mkdir(parents=True, exist_ok=True)
    table = {"schema": 1, "full": FULL, "heals": [heal._asdict() for heal in heals]}
    (folder / "heals.json").write_text(json.dumps(table, indent=2) + "\n")
