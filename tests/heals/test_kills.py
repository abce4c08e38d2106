"""flanneld killed at random moments, and ended in order, while packets go to and fro: none may be lost."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest

from testbed.deadline import Deadline
from tests.heals.heallab import FULL, RESTARTS_WITHIN, HealLab
from tests.heals.traffic import Traffic

KILLS = int(os.environ.get("TESTBED_KILLS", "200" if FULL else "10"))
SEED = int(os.environ.get("TESTBED_SEED", "0")) or random.SystemRandom().randrange(1 << 32)
#: A start takes about this long: kills fall into every part of it, and some time after.
START_SECONDS = 1.5


@pytest.fixture(scope="module", params=["vxlan", "host_gw", "ipip", "wireguard"])
def lab(request: pytest.FixtureRequest, make_lab: Callable[..., HealLab]) -> HealLab:
    """A cluster of each backend whose packets the kernel moves by itself."""
    return make_lab(request.param)


def test_kills_at_random_moments_lose_no_packet(lab: HealLab) -> None:
    dice = random.Random(SEED)
    print(f"TESTBED_SEED={SEED}")
    before = {name: lab.settled(name, rules=True) for name in lab.names}
    ends = [lab.victim, "worker2"]
    with Traffic.between(lab, "worker2") as traffic:
        for number in range(KILLS):
            name = ends[number % 2]
            lab.cluster.stop_flanneld(name, "KILL")
            lab.cluster.start_flanneld(name)
            Deadline(dice.uniform(0, START_SECONDS)).poll(lambda: None, every=0.02)
        for name in ends:
            lab.cluster.stop_flanneld(name, "KILL")
        lab.start(ends)
        lab.eventually(
            f"flanneld killed {KILLS} times, after the last start",
            lambda: all(lab.state(name, rules=True) == before[name] for name in lab.names),
            RESTARTS_WITHIN,
        )
    assert not traffic.missing, str(traffic)
    assert lab.answers()


@pytest.mark.parametrize("signal", ["TERM", "INT"])
def test_an_end_in_order_leaves_what_upstream_leaves_and_loses_nothing(lab: HealLab, signal: str) -> None:
    """Devices, routes, neighbours, FDB entries, rules and subnet.env outlive flanneld: section 8."""
    before = lab.settled(rules=True)
    env = lab.cluster.subnet_env(lab.victim)
    leases = lab.cluster.leases()
    with Traffic.between(lab, "worker2") as traffic:
        lab.cluster.stop_flanneld(lab.victim, signal)
        assert lab.state(rules=True) == before
        assert lab.cluster.subnet_env(lab.victim) == env
        assert lab.cluster.leases() == leases
        lab.start([lab.victim])
        lab.eventually(
            f"flanneld ended by SIG{signal} and started", lambda: lab.state(rules=True) == before, RESTARTS_WITHIN
        )
    assert not traffic.missing, str(traffic)


def test_udp_takes_its_device_along_and_its_rules_stay(make_lab: Callable[..., HealLab]) -> None:
    """Section 8: what is this process ends with it."""
    lab = make_lab("udp")
    before = lab.settled(rules=True)
    lab.cluster.stop_flanneld(lab.victim)
    after = lab.state(rules=True)
    assert after < before
    assert {line for line in after if "FLANNEL" in line} == {line for line in before if "FLANNEL" in line}
    assert not [line for line in after if "flannel0" in line]
    lab.start([lab.victim])
    lab.eventually("flanneld ended by SIGTERM and started", lambda: lab.state(rules=True) == before, RESTARTS_WITHIN)
    assert lab.answers()
