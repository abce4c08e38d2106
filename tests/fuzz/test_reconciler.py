"""Whatever leases come and go, and whatever is done to the kernel: what is programmed in steps is what would be
programmed at once, and nothing is left half done. The kernel is a model here; tests/heals has the real one."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network
from itertools import combinations
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st

from flannel.backends.base import Backend
from flannel.backends.hostgw import HostGwBackend
from flannel.backends.vxlan import VxlanBackend
from flannel.interface import External
from flannel.kernel import rtnl
from flannel.kernel.monitor import Change
from flannel.kernel.netlink import Failure, Message, attribute
from flannel.kernel.values import IFF_UP, PROTOCOL_BOOT, Fdb, Link, Neigh, Route, SeenEntry, SeenRoute, Vxlan
from flannel.lease import Lease, LeaseAttrs, Network
from flannel.netconf import parse
from flannel.reconcile import Reconciler
from flannel.state import Recorded
from flannel.stores.base import Event, Snapshot
from tests.fuzz.test_parsers import FULL, SEED

EXTERNAL = External(2, "eth0", 1500, IPv4Address("192.168.50.1"), IPv4Address("192.168.50.1"))
OWN = IPv4Network("10.244.1.0/24")
TUNNEL = Link(7, "flannel.1", 1450, b"\x02\0\0\0\0\x01", 1, "vxlan", Vxlan(1, 2, 3, 8472, False, False))


@pytest.fixture
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flannel.log._write", lambda *_: None)


EXAMPLES = int(os.environ.get("TESTBED_EXAMPLES", "20000" if FULL else "150"))


class Kernel:
    """As much of the kernel as a reconciler speaks to, by its own messages."""

    def __init__(self, refused: frozenset[int] = frozenset()) -> None:
        self.routes: dict[Any, Route] = {}
        self.entries: dict[Any, Neigh | Fdb] = {}
        self.refused = refused  # gateways that it takes no route by

    def request(self, message: Message) -> list[tuple[int, bytes]]:
        assert message.type == rtnl.GETLINK
        body = rtnl._LINK.pack(0, 0, 2, IFF_UP, 0) + attribute(3, b"eth0\0")
        return [(rtnl.NEWLINK, body)]

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        if kind == rtnl.GETADDR:
            return [rtnl.new_address(2, int(EXTERNAL.address), 24).body]
        if kind == rtnl.GETROUTE:
            return [rtnl.set_route(route).body for route in self.routes.values()]
        wanted = Fdb if body[0] == 7 else Neigh
        return [rtnl.set_entry(entry).body for entry in self.entries.values() if isinstance(entry, wanted)]

    def batch(self, requests: Sequence[Message]) -> list[Failure]:
        failures = []
        for position, message in enumerate(requests):
            code = self._do(message)
            if code:
                failures.append(Failure(position, code, ""))
        return failures

    def _do(self, message: Message) -> int:
        if message.type in (rtnl.NEWROUTE, rtnl.DELROUTE):
            route = rtnl.parse_route(message.body).route
            if message.type == rtnl.DELROUTE:
                there = self.routes.get(route.key)
                return errno.ESRCH if there is None or self.routes.pop(route.key) is None else 0
            if route.gateway in self.refused:
                return errno.ENETUNREACH
            self.routes[route.key] = route._replace(scope=0)
            return 0
        entry = rtnl.parse_entry(message.body).entry
        assert entry is not None
        if message.type == rtnl.NEWNEIGH:
            self.entries[key_of(entry)] = entry
            return 0
        return 0 if self.entries.pop(key_of(entry), None) else errno.ENOENT

    def state(self) -> tuple[Any, ...]:
        return frozenset(self.routes.values()), frozenset(self.entries.values())


def key_of(entry: Neigh | Fdb) -> tuple[Any, ...]:
    return (entry.ifindex, entry.ip) if isinstance(entry, Neigh) else (entry.ifindex, entry.mac)


class AnyVxlan(VxlanBackend):
    """With a device that is always there."""

    def device(self, netlink: Any, external: External) -> Link | None:
        return TUNNEL


def make(kind: str, kernel: Kernel, clock: list[float]) -> Reconciler:
    conf = parse(f'{{"Network": "10.244.0.0/16", "Backend": {{"Type": "{kind}"}}}}')
    backend: Backend = (AnyVxlan if kind == "vxlan" else HostGwBackend)(conf, EXTERNAL)
    netlink: Any = kernel
    return Reconciler(
        netlink, backend, EXTERNAL, conf.network, OWN, Recorded(), grace=0.0, clock=lambda: clock[0]
    )  # fmt: skip


def settle(reconciler: Reconciler, clock: list[float]) -> None:
    """Let it run until it waits for nothing but its timer."""
    for _ in range(20):
        if reconciler.next_run() > clock[0] + 5:
            return
        clock[0] = max(clock[0], reconciler.next_run())
        reconciler.run()
    # What the kernel refuses is tried again for ever, every 10 s at most.


SUBNETS = [*(f"10.244.{number}.0/24" for number in (2, 3, 4)), "10.244.2.0/25", "10.244.1.128/25", "10.244.1.0/24",
           "10.244.2.128/25", "10.244.2.0/23"]  # fmt: skip


def lease(kind: str, index: int, variant: int) -> Lease:
    """One of a few leases; those of one subnet differ by variant, each node has a MAC address of its own."""
    ip = IPv4Address("192.168.50.0") + (10 + 3 * index + variant if variant < 3 else (1, 255, 0)[variant - 3])
    data: Any = {"VtepMAC": f"02:00:00:00:{index:02x}:{variant:02x}"} if kind == "vxlan" else None
    if variant == 2 and kind == "vxlan":
        data = {"VtepMAC": "01:00:5e:00:00:01"}
    return Lease(IPv4Network(SUBNETS[index]), LeaseAttrs(ip, kind, data))


which = st.integers(0, len(SUBNETS) - 1)
variants = st.integers(0, 5)
peers = st.dictionaries(which, variants, max_size=4)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("added"), which, variants),
        st.tuples(st.just("removed"), which),
        st.tuples(st.just("listed"), peers),
        st.tuples(st.just("damaged"), st.integers(0, 20), st.booleans()),
        st.tuples(st.just("run")),
    ),
    max_size=25,
)


def damage(kernel: Kernel, reconciler: Reconciler, number: int, *, change: bool) -> None:
    """Delete or change something, and tell of it as the kernel does."""
    things: list[Any] = [*kernel.routes.values(), *kernel.entries.values()]
    if not things:
        return
    thing = things[number % len(things)]
    if isinstance(thing, Route):
        del kernel.routes[thing.key]
        told = SeenRoute(thing, PROTOCOL_BOOT, 0, False, rtnl.MAIN_TABLE)
        reconciler.notice([Change(rtnl.DELROUTE, told)], False)
        return
    if not change:
        del kernel.entries[key_of(thing)]
        reconciler.notice([Change(rtnl.DELNEIGH, SeenEntry(thing, 7, 0x80))], False)
        return
    other = thing._replace(mac=b"\x02\0\0\0\xff\xff") if isinstance(thing, Neigh) else thing._replace(dst=0xC0A832EE)
    kernel.entries[key_of(thing)] = other
    reconciler.notice([Change(rtnl.NEWNEIGH, SeenEntry(other, 7, 0x80))], False)


@pytest.mark.parametrize("kind", ["vxlan", "host-gw"])
@seed(SEED)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@example(steps=[("added", 1, 0), ("added", 3, 0), ("added", 0, 0)], refused=frozenset())
@example(steps=[("added", 0, 3), ("added", 3, 0), ("run",), ("added", 0, 0)], refused=frozenset())
@example(steps=[("added", 0, 0), ("added", 3, 0), ("run",), ("removed", 3), ("run",)], refused=frozenset())
@example(steps=[("added", 0, 0), ("run",), ("added", 3, 1), ("removed", 0), ("run",)], refused=frozenset())
@given(steps=steps, refused=st.frozensets(st.integers(0xC0A8320A, 0xC0A83214), max_size=2))
@pytest.mark.usefixtures("_quiet")
def test_steps_come_to_what_one_step_comes_to(kind: str, steps: list[Any], refused: frozenset[int]) -> None:
    clock, kernel = [0.0], Kernel(refused)
    reconciler = make(kind, kernel, clock)
    known: dict[Network, Lease] = {}
    reconciler.take(Snapshot(()))
    settle(reconciler, clock)
    for what, *more in steps:
        if what == "added":
            one = lease(kind, *more)
            known[one.subnet] = one
            reconciler.take(Event("added", one))
        elif what == "removed":
            one = lease(kind, more[0], 0)
            known.pop(one.subnet, None)
            reconciler.take(Event("removed", one))
        elif what == "listed":
            listed = [lease(kind, *each) for each in more[0].items()]
            known = {**{s: k for s, k in known.items() if s in {one.subnet for one in listed}}}
            known.update({one.subnet: one for one in listed})
            reconciler.take(Snapshot((Lease(OWN, LeaseAttrs(EXTERNAL.public, kind)), *listed)))
        elif what == "damaged":
            damage(kernel, reconciler, more[0], change=more[1])
        else:
            settle(reconciler, clock)
    settle(reconciler, clock)
    clock[0] += 1
    settle(reconciler, clock)
    in_steps = kernel.state()
    reconciler.compare_soon(0)
    settle(reconciler, clock)
    assert kernel.state() == in_steps, "a full comparison finds something to do"

    fresh = Kernel(refused)
    at_once = make(kind, fresh, clock)
    at_once.take(Snapshot((Lease(OWN, LeaseAttrs(EXTERNAL.public, kind)), *known.values())))
    settle(at_once, clock)
    if not any(one.overlaps(other) for one, other in combinations(known, 2)):  # else who came first has the addresses
        assert kernel.state() == fresh.state()
    routed = [OWN, *map(rtnl.network_of, kernel.routes.values())]
    assert not any(one.overlaps(other) for one, other in combinations(routed, 2))
