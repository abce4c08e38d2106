"""etcd: compacted, restarted, away, emptied; and leases that are lost."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from testbed.deadline import Deadline
from testbed.nodes.etcd import PREFIX, Etcd
from testbed.nodes.store import ETCD_SECONDS, EtcdLeases
from tests.heals.heallab import FULL, HEALS_WITHIN, HealLab
from tests.heals.test_down import Strangers
from tests.heals.traffic import Traffic

#: Seconds that etcd is away.
AWAY = 600.0 if FULL else 10.0
#: How long flanneld waits between two tries at most, and the time to list everything.
RECONNECTS_WITHIN = 12.0


@pytest.fixture(scope="module")
def lab(make_lab: Callable[..., HealLab]) -> HealLab:
    """vxlan."""
    return make_lab("vxlan")


@pytest.fixture
def etcd(lab: HealLab) -> Iterator[Etcd]:
    """The lab's etcd; what a test left there is removed."""
    store = lab.cluster.store
    assert isinstance(store, EtcdLeases)
    yield store.etcd
    for number in range(201, 206):
        store.etcd.delete(f"{PREFIX}/subnets/10.244.{number}.0-24")
    lab.settled()


def kill(lab: HealLab) -> None:
    """End etcd without a word."""
    master = lab.cluster.lab.spec.control_plane
    lab.sh('kill -KILL "$(cat /run/etcd.pid)"', node=master)
    assert Deadline(5).poll(lambda: lab.sh('kill -0 "$(cat /run/etcd.pid)" 2>&1 || echo gone', node=master) or None)


def start(etcd: Etcd) -> None:
    """Start etcd, and wait until it serves."""
    etcd.start()
    etcd.wait_ready(ETCD_SECONDS)


def routed(lab: HealLab, number: int) -> bool:
    """Whether every node has a route to a stranger."""
    return all(any(f"10.244.{number}.0/24" in line for line in lab.peers_routes(name)) for name in lab.names)


def unrouted(lab: HealLab, number: int) -> bool:
    """Whether no node has one."""
    return not any(f"10.244.{number}.0/24" in line for name in lab.names for line in lab.peers_routes(name))


@contextmanager
def cut_off(lab: HealLab) -> Iterator[None]:
    """While this lasts, the victim does not reach etcd."""
    rules = ("OUTPUT -p tcp --dport 2379 -j REJECT --reject-with tcp-reset", "INPUT -p tcp --sport 2379 -j DROP")
    lab.sh("\n".join(f"iptables -I {rule}" for rule in rules))
    try:
        yield
    finally:
        lab.sh("\n".join(f"iptables -D {rule}" for rule in rules))


def compact(etcd: Etcd) -> None:
    """Make etcd forget all of its history."""
    revision = etcd._ask("/v3/kv/range", {"key": "AA=="})["header"]["revision"]
    etcd._ask("/v3/kv/compaction", {"revision": revision, "physical": True})


def test_a_compaction_while_a_node_was_cut_off_loses_nothing(lab: HealLab, etcd: Etcd) -> None:
    """F5: what changed before the compaction is learned, and the own lease stays."""
    strangers = Strangers(lab)
    strangers.put(201, 201)
    strangers.put(202, 202)
    lab.eventually("etcd: two new leases", lambda: routed(lab, 201) and routed(lab, 202), HEALS_WITHIN)
    leases = lab.cluster.leases()
    with cut_off(lab):
        kill(lab)
        start(etcd)
        strangers.remove(201)
        strangers.put(202, 222)
        strangers.put(203, 203)
        for _ in range(20):
            strangers.put(204, 204)
        compact(etcd)
        Deadline(1.0).poll(lambda: None)

    def followed() -> bool:
        words = " ".join(lab.state()).split()
        return {"10.0.0.222", "10.0.0.204"} <= {*words} and not {"10.244.201.0", "10.0.0.202"} & {*words}

    lab.eventually("etcd: compacted while a node was cut off", followed, RECONNECTS_WITHIN)
    strangers.remove(203)  # by the watch, which goes on
    lab.eventually("etcd: a removal after that", lambda: unrouted(lab, 203), HEALS_WITHIN)
    assert lab.cluster.leases()[lab.victim] == leases[lab.victim]


def test_a_restarted_etcd_is_listened_to_again(lab: HealLab, etcd: Etcd) -> None:
    kill(lab)
    start(etcd)
    Strangers(lab).put(205, 205)
    lab.eventually("etcd: restarted", lambda: routed(lab, 205), RECONNECTS_WITHIN)


def test_an_etcd_that_is_away_costs_no_packet(lab: HealLab, etcd: Etcd) -> None:
    pids = {name: lab.cluster.flanneld_pid(name) for name in lab.names}
    kill(lab)
    with Traffic.between(lab, "worker2") as traffic:
        away = Deadline(AWAY)
        lab.sh("ip route del " + next(line for line in lab.peers_routes("worker3")), node="worker3")
        pod = lab.cluster.add_pod("worker3", "new")  # what is there goes on, damage heals, and pods still start
        assert Deadline(10).poll(lambda: len(lab.peers_routes("worker3")) == len(lab.names) - 1 or None)
        while not away.passed:
            assert {name: lab.cluster.flanneld_pid(name) for name in lab.names} == pids
            Deadline(min(5.0, away.left)).poll(lambda: None, every=1.0)
        assert lab.answers()
        lab.cluster.delete_pod(pod)
        start(etcd)
        Strangers(lab).put(201, 201)
        lab.eventually(f"etcd: away for {AWAY:.0f} s", lambda: routed(lab, 201), 2 * RECONNECTS_WITHIN)
    assert not traffic.missing, str(traffic)
    assert {name: lab.cluster.flanneld_pid(name) for name in lab.names} == pids


def test_an_emptied_etcd_is_filled_again(lab: HealLab, etcd: Etcd) -> None:
    """Every node takes its own subnet again, and meanwhile nothing is removed."""
    before = {name: lease["key"] for name, lease in lab.cluster.leases().items()}
    kill(lab)
    with Traffic.between(lab, "worker2") as traffic:
        lab.sh("rm -rf /var/lib/etcd", node=lab.cluster.lab.spec.control_plane)
        start(etcd)
        etcd.put(f"{PREFIX}/config", json.dumps(lab.flannel.net_conf))

        def back() -> bool:
            return {name: lease["key"] for name, lease in lab.cluster.leases().items()} == before

        lab.eventually("etcd: emptied", back, 2 * RECONNECTS_WITHIN)
        assert lab.answers()
    assert not traffic.missing, str(traffic)


@pytest.mark.parametrize("how", ["its key deleted", "its etcd lease revoked"])
def test_a_lost_lease_is_taken_again(lab: HealLab, etcd: Etcd, how: str) -> None:
    lease = lab.cluster.leases()["worker2"]
    with Traffic.between(lab, "worker2") as traffic:
        if how == "its key deleted":
            etcd.delete(lease["key"])
        else:
            key = base64.b64encode(lease["key"].encode()).decode()
            (found,) = etcd._ask("/v3/kv/range", {"key": key})["kvs"]
            etcd._ask("/v3/lease/revoke", {"ID": found["lease"]})
        lab.eventually(
            f"lease: {how}", lambda: lab.cluster.leases().get("worker2") == lease and lab.answers(), HEALS_WITHIN
        )
        lab.settled()
    # Peers are told that the node is gone, and then that it is back: what is on the way meanwhile is lost.
    assert traffic.gap < HEALS_WITHIN, traffic


def test_a_short_outage_of_etcd_at_the_start_is_waited_for(lab: HealLab, etcd: Etcd) -> None:
    kill(lab)
    lab.cluster.stop_flanneld(lab.victim)
    lab.sh("rm -f /run/flannel/subnet.env; : >/var/log/flanneld.log")
    lab.cluster.start_flanneld(lab.victim)
    assert Deadline(10).poll(lambda: "Couldn't fetch network config" in lab.log() or None), lab.log()
    start(etcd)
    lab.eventually("etcd: not there at the start", lambda: lab.serves(lab.victim), RECONNECTS_WITHIN)
