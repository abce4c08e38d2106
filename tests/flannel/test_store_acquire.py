"""Getting and keeping a lease, with a real etcd."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Network
from typing import TYPE_CHECKING, Any

import pytest

from flannel.lease import LeaseAttrs
from flannel.netconf import NetConf, parse
from flannel.stores.base import LeaseLost, Renewed, Snapshot, StoreError
from flannel.stores.leasecodec import lease_value

if TYPE_CHECKING:
    from tests.flannel.conftest import Etcd

MakeStore = Callable[..., Any]
Attrs = Callable[[int], LeaseAttrs]
SEVEN = IPv4Network("10.244.7.0/24")


def named(subnet: IPv4Network) -> str:
    return f"{subnet.network_address}-{subnet.prefixlen}"


def test_configuration(etcd: Etcd, make_store: MakeStore) -> None:
    store, _ = make_store(etcd)
    with pytest.raises(StoreError, match=r"no key /coreos\.com/network/config"):
        store.network_config()
    etcd.put("config", '{"Network": "10.1.0.0/16"}')
    assert store.network_config() == '{"Network": "10.1.0.0/16"}'


def test_first_lease(etcd: Etcd, make_store: MakeStore, conf: NetConf, attrs_of: Attrs) -> None:
    store, _ = make_store(etcd)
    lease = store.acquire(conf, attrs_of(1), None)
    key = etcd.get(f"subnets/{named(lease.subnet)}")
    assert key is not None
    assert key["value"] == (
        '{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"vxlan",'
        '"BackendData":{"VNI":1,"VtepMAC":"0a:00:00:00:00:01"}}'
    )
    granted, left = etcd.time_to_live(key["lease"])
    assert granted == 86400
    assert 86390 <= left <= 86400
    assert abs(lease.expiration - time.time() - 86400) < 10
    # Upstream picks among the first hundred, and leaves out the very first.
    assert IPv4Network("10.244.1.0/24") <= lease.subnet <= IPv4Network("10.244.100.0/24")


def test_the_previous_subnet_if_it_is_free(etcd: Etcd, make_store: MakeStore, conf: NetConf, attrs_of: Attrs) -> None:
    assert make_store(etcd)[0].acquire(conf, attrs_of(1), SEVEN).subnet == SEVEN
    assert make_store(etcd)[0].acquire(conf, attrs_of(2), SEVEN).subnet != SEVEN
    outside = IPv4Network("10.9.7.0/24")
    assert make_store(etcd)[0].acquire(conf, attrs_of(3), outside).subnet != outside
    assert len(etcd.keys()) == 3


def test_a_node_gets_its_own_lease_again(etcd: Etcd, make_store: MakeStore, conf: NetConf, attrs_of: Attrs) -> None:
    first = make_store(etcd)[0].acquire(conf, attrs_of(1), None)
    changed = LeaseAttrs(attrs_of(1).public_ip, "host-gw")
    again = make_store(etcd)[0].acquire(conf, changed, None)
    assert again.subnet == first.subnet
    key = etcd.get(f"subnets/{named(first.subnet)}")
    assert key is not None
    assert json.loads(key["value"])["BackendType"] == "host-gw"
    assert etcd.keys() == [named(first.subnet)]


def test_what_a_node_published_is_known_by_its_address(
    etcd: Etcd, make_store: MakeStore, conf: NetConf, attrs_of: Attrs
) -> None:
    store, _ = make_store(etcd)
    assert store.published_by(attrs_of(1).public_ip) is None
    for number in (1, 2):
        make_store(etcd)[0].acquire(conf, attrs_of(number), None)
    etcd.put("subnets/10.244.200.0-24", lease_value(attrs_of(1)._replace(backend_data={"VtepMAC": "later"})).decode())
    etcd.put("subnets/10.244.201.0-24", "nobody can read this")
    assert store.published_by(attrs_of(1).public_ip) == attrs_of(1)


def test_a_lease_that_does_not_fit_any_more_is_given_up(
    etcd: Etcd, make_store: MakeStore, conf: NetConf, attrs_of: Attrs
) -> None:
    make_store(etcd)[0].acquire(conf, attrs_of(1), SEVEN)
    narrow = parse('{"Network": "10.244.0.0/16", "SubnetLen": 26, "Backend": {"Type": "vxlan"}}')
    lease = make_store(etcd)[0].acquire(narrow, attrs_of(1), SEVEN)
    assert lease.subnet.prefixlen == 26
    assert etcd.keys() == [named(lease.subnet)]


def test_a_reservation_stays_one(etcd: Etcd, make_store: MakeStore, conf: NetConf, attrs_of: Attrs) -> None:
    etcd.put(f"subnets/{named(SEVEN)}", '{"PublicIP":"192.0.2.1"}')
    store, seen = make_store(etcd, ttl=2, renew_margin=1.5)
    lease = store.acquire(conf, attrs_of(1), None)
    assert (lease.subnet, lease.expiration) == (SEVEN, 0.0)
    store.watch(seen.post)
    store.update(attrs_of(9))
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        key = etcd.get(f"subnets/{named(SEVEN)}")
        assert key is not None
        assert key.get("lease", "0") == "0"
        time.sleep(0.1)
    last = etcd.get(f"subnets/{named(SEVEN)}") or {}
    assert json.loads(last["value"])["PublicIP"] == "192.0.2.9"
    assert not seen.of(Renewed)
    assert not seen.of(LeaseLost)


def test_a_reservation_that_does_not_fit_is_left_alone(
    etcd: Etcd, make_store: MakeStore, conf: NetConf, attrs_of: Attrs
) -> None:
    etcd.put("subnets/10.99.7.0-24", '{"PublicIP":"192.0.2.1"}')
    store, seen = make_store(etcd)
    lease = store.acquire(conf, attrs_of(1), None)
    assert sorted(etcd.keys()) == sorted(["10.99.7.0-24", named(lease.subnet)])
    assert seen.warned("does not fit")


def test_several_keys_of_one_node(etcd: Etcd, make_store: MakeStore, conf: NetConf, attrs_of: Attrs) -> None:
    value = lease_value(attrs_of(1)).decode()
    for number in (5, 7, 6):
        etcd.put(f"subnets/10.244.{number}.0-24", value)
    store, seen = make_store(etcd)
    assert store.acquire(conf, attrs_of(1), None).subnet == IPv4Network("10.244.5.0/24")
    assert make_store(etcd)[0].acquire(conf, attrs_of(1), SEVEN).subnet == SEVEN
    assert seen.warned("several leases of 192.0.2.1")
    assert len(etcd.keys()) == 3


def test_strange_keys_and_values_do_not_stop_a_node(
    etcd: Etcd, make_store: MakeStore, conf: NetConf, attrs_of: Attrs
) -> None:
    for name, value in (("0.0.0.0-0", "{}"), ("10.244.7.0-24", "junk"), ("what", ""), ("10.244.7.1-24", "{}")):
        etcd.put(f"subnets/{name}", value)
    lease = make_store(etcd)[0].acquire(conf, attrs_of(1), SEVEN)
    assert lease.subnet != SEVEN  # its value is junk, but it is somebody's
    assert len(etcd.keys()) == 5


def test_ten_nodes_race(etcd: Etcd, make_store: MakeStore, attrs_of: Attrs) -> None:
    """Ten nodes for eleven subnets, all at once: none fails, none shares (upstream's loser exits)."""
    conf = parse('{"Network": "10.9.0.0/24", "SubnetLen": 28, "SubnetMax": "10.9.0.176", "Backend": {"Type": "vxlan"}}')
    stores = [make_store(etcd) for _ in range(10)]
    with ThreadPoolExecutor(10) as pool:
        pending = [pool.submit(store.acquire, conf, attrs_of(n), None) for n, (store, _) in enumerate(stores, 1)]
        subnets = {future.result(60).subnet for future in pending}
    assert len(subnets) == 10
    assert len(etcd.keys()) == 10
    lost = [text for _, seen in stores for _, text in seen.lines if "taken by another node" in text]
    assert lost, "nobody lost a race, so that nothing was tested"
    leases = etcd.ask("/v3/lease/leases", {})["leases"]
    assert len(leases) == 10, "who loses a race takes its etcd lease back"


def test_out_of_subnets(etcd: Etcd, make_store: MakeStore, attrs_of: Attrs) -> None:
    text = '{"Network": "10.9.0.0/24", "SubnetLen": 28, "SubnetMin": "10.9.0.64", "SubnetMax": "10.9.0.64"}'
    conf = parse(text)
    make_store(etcd)[0].acquire(conf, attrs_of(1), None)
    with pytest.raises(StoreError, match=r"out of subnets: all of 10\.9\.0\.64 to 10\.9\.0\.64"):
        make_store(etcd)[0].acquire(conf, attrs_of(2), None)


def test_renewal(etcd: Etcd, make_store: MakeStore, conf: NetConf, attrs_of: Attrs) -> None:
    store, seen = make_store(etcd, ttl=4, renew_margin=3)
    lease = store.acquire(conf, attrs_of(1), None)
    other, others = make_store(etcd)
    other.acquire(conf, attrs_of(2), None)
    other.watch(others.post)
    others.wait(Snapshot)
    before = etcd.get(f"subnets/{named(lease.subnet)}")
    store.watch(seen.post)
    renewed = seen.wait(Renewed, 5)
    after = etcd.get(f"subnets/{named(lease.subnet)}")
    assert before is not None
    assert after is not None
    assert after["lease"] != before["lease"]
    assert after["value"] == before["value"]
    expirations = [lease.expiration, *(message.lease.expiration for message in renewed)]
    assert expirations == sorted(set(expirations))
    assert renewed[-1].lease.subnet == lease.subnet
    assert not seen.of(LeaseLost)
    assert [type(message) for message in others.of(object)] == [Snapshot], "a renewal is no news to a peer"


def test_an_update_is_published_with_the_lease_that_is_there(
    etcd: Etcd, make_store: MakeStore, conf: NetConf, attrs_of: Attrs
) -> None:
    store, seen = make_store(etcd)
    lease = store.acquire(conf, attrs_of(1), None)
    before = etcd.get(f"subnets/{named(lease.subnet)}")
    moved = LeaseAttrs(attrs_of(1).public_ip, "vxlan", {"VNI": 1, "VtepMAC": "0a:00:00:00:00:99"})
    store.update(moved)
    after = etcd.get(f"subnets/{named(lease.subnet)}")
    assert before is not None
    assert after is not None
    assert after["value"] == lease_value(moved).decode()
    assert after["lease"] == before["lease"]
    etcd.delete(f"subnets/{named(lease.subnet)}")
    with pytest.raises(StoreError, match="changed or deleted"):
        store.update(attrs_of(1))
    assert etcd.keys() == []
    assert not seen.of(LeaseLost)
