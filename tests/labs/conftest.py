"""Bare labs for the tests: wired, but without flannel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import pytest

from testbed.errors import LabError
from testbed.labs import netns, state
from testbed.labs.netns import NetnsLab
from testbed.model import LabSpec
from testbed.topology import load_topology
from tests.labs.helpers import unique

_numbers = count()


@pytest.fixture(scope="session", autouse=True)
def _tools() -> None:
    """Skip, and say why, where this machine lacks what a lab needs."""
    try:
        netns.frr_folder()
    except LabError as error:
        pytest.skip(str(error))


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
