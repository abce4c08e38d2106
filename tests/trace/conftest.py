"""Labs with flannel for the tests of the path trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from testbed.nodes.deploy import Cluster, bring_up
from testbed.options import RunOptions
from tests.labs.helpers import need_lab, unique


@pytest.fixture(scope="session", autouse=True)
def _tools() -> None:
    need_lab()


@pytest.fixture(scope="module")
def make_cluster() -> Iterator[Callable[..., Cluster]]:
    """Bring clusters up; all of them are removed at the module's end."""
    made: list[Cluster] = []

    def make(backend: str, **options: object) -> Cluster:
        cluster = bring_up(RunOptions(backend=backend, name=unique("trace"), **options))  # type: ignore[arg-type]
        made.append(cluster)
        return cluster

    yield make
    for cluster in made:
        cluster.lab.down()


@pytest.fixture(scope="module")
def vxlan(make_cluster: Callable[..., Cluster]) -> Cluster:
    """A vxlan lab over two racks."""
    return make_cluster("vxlan")
