"""Bare labs for the tests: wired, but without flannel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from testbed.labs import netns, state
from testbed.labs.netns import NetnsLab
from testbed.model import LabSpec
from testbed.topology import load_topology
from tests.engines import engine_state, using
from tests.labs.helpers import need_lab, unique

_numbers = count()


@pytest.fixture(scope="session", autouse=True)
def _tools() -> None:
    need_lab()


@pytest.fixture(scope="session")
def engine() -> Iterator[Path]:
    """The state of a private engine that this session has to itself; skips where there can be none."""
    with engine_state() as folder:
        yield folder


@pytest.fixture(scope="module", params=["netns", "clab"])
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every lab kind in turn, for tests of what all of them have to do."""
    name: str = request.param
    if name == "netns":
        yield name
        return
    with using(request.getfixturevalue("engine")):
        yield name


@pytest.fixture
def flat() -> LabSpec:
    """The smallest shipped topology, under an id of this test's own."""
    return load_topology("flat", unique("flat"))


@pytest.fixture
def make_lab() -> Iterator[Callable[[LabSpec], NetnsLab]]:
    """Bring labs up; whatever is still up afterwards is brought down."""
    made: list[NetnsLab] = []

    def make(spec: LabSpec) -> NetnsLab:
        lab = netns.bring_up(spec)
        made.append(lab)
        return lab

    yield make
    for lab in made:
        if state.read_record(lab.spec.id):
            lab.down()


@pytest.fixture(scope="module", params=["entered", "settled"])
def lab(request: pytest.FixtureRequest) -> Iterator[NetnsLab]:
    """One bare lab for tests that leave it as it was; commands are run in it in both ways that there are."""
    lab = netns.bring_up(load_topology("flat", unique("shared")))
    if request.param == "settled":
        lab.settle(lab.nodes)
    yield lab
    lab.down()
