"""Whose a peer's subnet is, whatever the backend does with it: no two leases that are used overlap."""

from __future__ import annotations

import random
import time
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import Any

import pytest

from flannel.backends.base import NOTHING, Backend, Facts, Ignored, Wants
from flannel.holders import Ground
from flannel.interface import External
from flannel.kernel.values import Link
from flannel.lease import Lease, LeaseAttrs, Network
from flannel.reconcile import Reconciler
from flannel.state import Recorded
from flannel.stores.base import Event, Snapshot
from tests.flannel.backendlab import EXTERNAL
from tests.fuzz.test_reconciler import Kernel

OWN, OWN6 = IPv4Network("10.244.1.0/24"), IPv6Network("fd00:10:244:1::/64")


class Table(Backend):
    """One without anything in the kernel, as udp, wireguard and ipsec are: it is told whose leases it may use."""

    name = "table"

    def __init__(self) -> None:
        self.leases: list[str] = []

    def device(self, netlink: Any, external: External) -> Link | None:
        return None

    def wants(self, lease: Lease, facts: Facts) -> Wants:
        if lease.attrs.backend_type != self.name:
            raise Ignored("it is of another backend")
        return NOTHING

    def update(self, leases: dict[Network, Lease], may_remove: bool) -> None:
        self.leases = sorted(map(str, leases))


class Steps:
    """A reconciler with such a backend, told of one thing after another."""

    def __init__(self, *, dual: bool) -> None:
        self.backend, self.clock, kernel = Table(), [0.0], Kernel()
        netlink: Any = kernel
        more: dict[str, Any] = {"network6": IPv6Network("fd00:10:244::/56"), "own6": OWN6} if dual else {}
        self.reconciler = Reconciler(
            netlink, self.backend, EXTERNAL, IPv4Network("10.244.0.0/16"), OWN, Recorded(), grace=0.0,
            clock=lambda: self.clock[0], **more,
        )  # fmt: skip

    def take(self, message: Event | Snapshot) -> list[str]:
        """What the backend may use then."""
        self.reconciler.take(message)
        for _ in range(5):
            self.clock[0] += 1
            self.reconciler.run()
        return self.backend.leases

    def added(self, one: Lease) -> list[str]:
        return self.take(Event("added", one))

    def removed(self, one: Lease) -> list[str]:
        return self.take(Event("removed", one))


def lease(subnet: str, subnet6: str = "", kind: str = "table") -> Lease:
    attrs = LeaseAttrs(IPv4Address("192.168.50.7"), kind, public_ip6=IPv6Address("fd50::7") if subnet6 else None)
    return Lease(ip_network(subnet), attrs, subnet6=IPv6Network(subnet6) if subnet6 else None)


@pytest.mark.parametrize("second", ["10.244.2.128/25", "10.244.2.0/25", "10.244.2.255/32", "10.244.2.0/23"])
def test_a_backend_of_its_own_table_gets_one_of_two_that_overlap(second: str) -> None:
    steps = Steps(dual=False)
    assert steps.take(Snapshot((lease("10.244.2.0/24"), lease(second), lease("10.244.9.0/24")))) == [
        "10.244.2.0/24", "10.244.9.0/24"
    ]  # fmt: skip
    assert steps.removed(lease("10.244.2.0/24")) == sorted([second, "10.244.9.0/24"])
    assert steps.added(lease("10.244.2.0/24")) == sorted([second, "10.244.9.0/24"])


@pytest.mark.parametrize("second", ["fd00:10:244:2::/64", "fd00:10:244:2:8000::/65", "fd00:10:244:2::/63"])
def test_the_same_of_ipv6_where_there_is_ipv6(second: str) -> None:
    first, other = lease("10.244.2.0/24", "fd00:10:244:2::/64"), lease("10.244.3.0/24", second)
    assert Steps(dual=True).take(Snapshot((first, other))) == ["10.244.2.0/24"]
    assert Steps(dual=False).take(Snapshot((first, other))) == ["10.244.2.0/24", "10.244.3.0/24"]


@pytest.mark.parametrize("subnet6", ["fd00:10:244:1::/64", "fd00:10:244:1::/80", "fd00:10:244::/56"])
def test_a_lease_that_overlaps_this_nodes_own_ipv6_subnet_is_refused(
    subnet6: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert Steps(dual=True).added(lease("10.244.2.0/24", subnet6)) == []
    assert f"its subnet {subnet6} overlaps this node's own, {OWN6}" in capfd.readouterr().err
    assert Steps(dual=False).added(lease("10.244.2.0/24", subnet6)) == ["10.244.2.0/24"]


def test_what_is_not_used_is_in_nobodys_way(capfd: pytest.CaptureFixture[str]) -> None:
    steps = Steps(dual=False)
    strange = lease("10.244.2.0/25", kind="another")
    steps.added(strange)
    assert steps.added(lease("10.244.2.0/24")) == ["10.244.2.0/24"]
    assert steps.removed(strange) == ["10.244.2.0/24"]
    assert capfd.readouterr().err.count("ignoring") == 1


def test_one_that_waits_for_several_gets_its_turn_after_the_last() -> None:
    steps = Steps(dual=False)
    halves, whole = (lease("10.244.2.0/25"), lease("10.244.2.128/25")), lease("10.244.2.0/24")
    steps.take(Snapshot((*halves, whole)))
    assert steps.removed(halves[1]) == ["10.244.2.0/25"]
    steps.reconciler.compare_soon(0)
    assert steps.removed(halves[0]) == ["10.244.2.0/24"]


def test_a_lease_that_moves_gives_back_what_it_had() -> None:
    steps = Steps(dual=True)
    steps.added(lease("10.244.2.0/24", "fd00:10:244:2::/64"))
    second = lease("10.244.3.0/24", "fd00:10:244:2::/64")
    assert steps.added(second) == ["10.244.2.0/24"]
    assert steps.added(lease("10.244.2.0/24", "fd00:10:244:4::/64")) == ["10.244.2.0/24", "10.244.3.0/24"]


@pytest.mark.parametrize("seed", range(20))
def test_what_is_in_the_way_is_what_ipaddress_says(seed: int) -> None:
    chosen, ground, held = random.Random(seed), Ground(), set[Network]()
    for _ in range(200):
        length = chosen.randint(20, 30)
        one = IPv4Network((0x0AF40000 + (chosen.randrange(1 << 12) << 4), length), strict=False)
        if one in held:
            ground.give_back(one)
            held.discard(one)
            continue
        way = {other for other in held if other.overlaps(one)}
        assert set(ground.in_the_way(one, one)) == way
        if not way:
            ground.take(one, (one,))
            held.add(one)


def test_four_thousand_leases_take_no_time() -> None:
    """10 ms are meant: the least of some tries is taken, for what else the machine does is not ours."""
    leases = [IPv4Network((0x0A000000 + (number << 8), 24)) for number in range(4000)]
    random.Random(1).shuffle(leases)
    best = 1e9
    for _ in range(5):
        ground, before = Ground(), time.process_time()
        for one in leases:
            assert not ground.in_the_way(one, one)
            ground.take(one, (one,))
        best = min(best, time.process_time() - before)
    assert best < 0.05, f"{best * 1000:.1f} ms"
