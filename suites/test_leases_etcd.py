"""LSE: how long a lease is a node's own."""

from __future__ import annotations

import json

from testbed.checks import check
from testbed.deadline import Deadline
from testbed.nodes.alone import Alone
from testbed.nodes.deploy import Cluster

DAY, HOUR = 86400, 3600
SOON = 1
FOLLOWED_SECONDS = 15.0


def own_key(alone: Alone) -> str:
    """The key of its only lease."""
    (key,) = alone.leases()
    return key


@check("LSE-11")
def test_a_lease_is_kept_for_a_day_and_never_somebody_else_s(alone: Alone, cluster: Cluster) -> None:
    """For 24 hours, again before they end; a reservation stays one; a lost subnet ends flanneld. Source: src, #1343."""
    alone.configure({"Type": cluster.flannel.backend.type})
    alone.start()
    alone.wait_ready()
    key = own_key(alone)
    for_a_day(alone, key)
    text = json.dumps(alone.leases()[key])
    alone.etcd.put(key, text, ttl=SOON)
    Deadline(FOLLOWED_SECONDS).poll(lambda: long_lived(alone, key))
    for_a_day(alone, key)
    assert alone.running, f"a lease that was about to end ends flanneld\n{alone.log()}"
    loses(alone, key)
    reserved(alone)


def long_lived(alone: Alone, key: str) -> bool:
    """Whether a key has far more time than there is to a renewal."""
    found = alone.etcd.ttl(key)
    return found is not None and found[1] > HOUR


def for_a_day(alone: Alone, key: str) -> None:
    """The only lease is there for a day, with more left than the hour before its end that it is renewed in."""
    assert set(alone.leases()) == {key}, f"its leases are {set(alone.leases())}, and was {key}\n{alone.log()}"
    found = alone.etcd.ttl(key)
    assert found is not None, f"{key} has no end"
    granted, left = found
    assert granted == DAY, f"{key} is there for {granted} s"
    assert HOUR < left <= DAY, f"{key} has {left} s left"


def loses(alone: Alone, key: str) -> None:
    """A flanneld whose lease ended, and whose subnet is another node's by now, ends as well."""
    stranger = {"PublicIP": str(alone.address + 9), "BackendType": "alloc"}
    alone.signal("STOP")
    alone.etcd.delete(key)
    alone.etcd.put(key, json.dumps(stranger))
    alone.signal("CONT")
    gone = Deadline(FOLLOWED_SECONDS).poll(lambda: not alone.running or None)
    assert gone, f"flanneld goes on with a subnet that is somebody else's\n{alone.log()}"
    alone.stop()


def reserved(alone: Alone) -> None:
    """A key that an operator has made without an end has none after a start either."""
    alone.clear_leases()
    alone.start()
    alone.wait_ready()
    key = own_key(alone)
    alone.stop()
    alone.etcd.put(key, json.dumps(alone.leases()[key]))
    alone.start()
    alone.wait_ready()
    assert own_key(alone) == key, f"the reserved subnet {key} was left for {own_key(alone)}"
    assert alone.etcd.ttl(key) is None, f"the reservation {key} has become a lease: {alone.etcd.ttl(key)}"
