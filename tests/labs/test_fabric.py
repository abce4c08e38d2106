"""The fabric once it has converged: the routers find each other fast, and are quiet afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable

from testbed.labs.fabric import calm, missing_paths, wait_converged
from testbed.labs.netns import NetnsLab
from testbed.model import LabSpec
from testbed.topology import load_topology
from tests.labs.helpers import unique

WATCHED = 2.0


def wakeups(lab: NetnsLab) -> dict[str, float]:
    """How often a second each router's zebra wakes."""

    def now() -> dict[str, int]:
        script = "grep ^voluntary /proc/$(cat /run/zebra.pid)/status"
        routers = [node.name for node in lab.spec.nodes if node.routes]
        return {name: int(lab.node(name).run(["sh", "-c", script]).stdout.split()[1]) for name in routers}

    before = now()
    time.sleep(WATCHED)  # the time itself is what is looked at
    return {name: (count - before[name]) / WATCHED for name, count in now().items()}


def test_calm_routers_hardly_wake_and_keep_their_routes(make_lab: Callable[[LabSpec], NetnsLab]) -> None:
    lab = make_lab(load_topology("racks", unique("calm")))
    wait_converged(lab)
    assert max(wakeups(lab).values()) > 40, "there is nothing to calm"
    calm(lab)
    time.sleep(1)  # what an old advertisement's time brings with it
    assert max(wakeups(lab).values()) < 20
    assert not [line for node in lab.spec.nodes if node.routes for line in missing_paths(lab, node)]
