"""The Kubernetes store and other nodes: list, watch, strangers, and both IP versions."""

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

import pytest

from flannel.lease import Lease, LeaseAttrs
from flannel.netconf import NetConf, parse
from flannel.stores.base import Event, Snapshot, StoreError
from flannel.stores.kubernetes_nodes import Addresses, Keys, wanted_annotations
from tests.flannel.kubeapi import FaultProxy, annotations_of, node_object
from tests.flannel.kubelab import OWN, PREFIX, Api, MakeStore, annotation, events, settled, subnets


def test_list_and_watch(api: Api, following: MakeStore, proxy: FaultProxy) -> None:
    for number in range(2, 9):
        api.put(node_object(number))
    api.put(node_object(9, annotations={}))
    _, recorder = following()
    (snapshot,) = recorder.of(Snapshot)
    assert snapshot.complete
    assert subnets(snapshot) == [f"10.244.{number}.0/24" for number in range(1, 9)]
    assert proxy.count("limit=3") == 3, "in pages of three"
    api.put(node_object(9))
    api.put(node_object(2, annotations=annotations_of(2, public_ip="192.0.2.77")))
    api.put(node_object(3))
    api.delete("node4")
    recorder.wait(Event, 3)
    settled(api, proxy, recorder)
    assert events(recorder)[:-1] == [
        ("added", "10.244.9.0/24"),
        ("added", "10.244.2.0/24"),
        ("removed", "10.244.4.0/24"),
    ]
    assert recorder.of(Event)[1].lease.attrs.public_ip == IPv4Address("192.0.2.77")
    assert proxy.count("watch=1") == 1


def test_changed_pod_cidr(api: Api, following: MakeStore) -> None:
    api.put(node_object(2))
    _, recorder = following()
    api.delete("node2")
    api.put(node_object(2, cidr="10.244.22.0/24"))
    recorder.wait(Event, 2)
    assert events(recorder) == [("removed", "10.244.2.0/24"), ("added", "10.244.22.0/24")]


def test_annotations_that_went_away_remove_nothing(api: Api, following: MakeStore, proxy: FaultProxy) -> None:
    api.put(node_object(2))
    store, recorder = following()
    api.put(node_object(2, annotations={}))
    settled(api, proxy, recorder)
    assert len(recorder.of(Event)) == 1
    store._watcher.relist()  # type: ignore[union-attr]
    assert "10.244.2.0/24" in subnets(recorder.wait(Snapshot, 2)[1])


def test_two_nodes_with_one_pod_cidr(api: Api, following: MakeStore, proxy: FaultProxy) -> None:
    api.put(node_object(2))
    _, recorder = following()
    api.put(node_object(3, cidr="10.244.2.0/24"))
    settled(api, proxy, recorder)
    assert len(recorder.of(Event)) == 1
    assert recorder.warned("another, older node has the podCIDR 10.244.2.0/24")
    api.delete("node2")
    recorder.wait(Event, 2)
    assert recorder.of(Event)[1].lease.attrs.public_ip == IPv4Address("192.0.2.3")


HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"cidr": "10.9.2.0/24"}, "not a part of the Network"),
    ({"cidr": "10.244.0.0/16"}, "not a part of the Network"),
    ({"cidr": "10.244.1.128/25"}, "overlaps this node's"),
    ({"cidr": "fd00::/64"}, "no IPv4 podCIDR"),
    ({"annotations": annotations_of(2, public_ip=None)}, "no public-ip annotation"),
    ({"annotations": annotations_of(2, public_ip="192.0.2")}, "no IPv4 address"),
    ({"annotations": annotations_of(2, public_ip="192.0.2.1")}, "this node's own"),
    ({"annotations": annotations_of(2, public_ip="0.0.0.0")}, "no node's address"),
    ({"annotations": annotations_of(2, public_ip="224.0.0.1")}, "no node's address"),
    ({"annotations": annotations_of(2, public_ip="10.244.7.7")}, "inside the Network"),
    ({"annotations": annotations_of(2, backend_type="magic\nI0101 forged")}, "BackendType 'magic\\nI0101"),
    ({"annotations": annotations_of(2, backend_data="{")}, "not JSON"),
    ({"annotations": annotations_of(2, backend_data="[" * 100000)}, "not JSON"),
    ({"annotations": annotations_of(2, backend_data="[]")}, "not a JSON object"),
    ({"annotations": annotations_of(2, backend_data='{"VtepMAC":"01:00:5e:00:00:01"}')}, "no unicast MAC"),
    ({"annotations": annotations_of(2, backend_data='{"VtepMAC":7}')}, "no unicast MAC"),
]


@pytest.mark.parametrize(("change", "said"), HOSTILE)
def test_node_that_cannot_be_used_is_ignored_by_name(
    api: Api, following: MakeStore, proxy: FaultProxy, change: dict[str, Any], said: str
) -> None:
    api.put(node_object(3))
    api.put(node_object(2, **change))
    _, recorder = following()
    assert subnets(recorder.of(Snapshot)[0]) == ["10.244.1.0/24", "10.244.3.0/24"]
    assert recorder.warned("Ignoring the node 'node2': ")
    assert recorder.warned(said)


@pytest.mark.parametrize(("change", "said"), HOSTILE[4:])
def test_node_that_becomes_unusable_keeps_its_last_good_data(
    api: Api, following: MakeStore, proxy: FaultProxy, change: dict[str, Any], said: str
) -> None:
    api.put(node_object(2))
    _, recorder = following()
    api.put(node_object(2, **change))
    settled(api, proxy, recorder)
    assert events(recorder) == [("added", "10.244.200.0/24")]
    assert recorder.warned("Ignoring the node 'node2'")


# -- dual stack ----------------------------------------------------------------------------------------------------

OWN_BOTH = OWN._replace(public_ip6=IPv6Address("2001:db8::1"), backend_data6={"VNI": 1, "VtepMAC": "0a:00:00:00:06:01"})


@pytest.fixture
def conf_both() -> NetConf:
    backend = {"Type": "vxlan"}
    keys = {"Network": "10.244.0.0/16", "EnableIPv6": True, "IPv6Network": "fd00:10:244::/48", "Backend": backend}
    return parse(json.dumps(keys))


def both(number: int, *, cidr6: str = "", **changed: str | None) -> dict[str, Any]:
    """Node number N of a dual-stack cluster."""
    texts = {
        "public_ipv6": f"2001:db8::{number:x}",
        "backend_v6_data": json.dumps({"VNI": 1, "VtepMAC": f"0a:00:00:00:06:{number:02x}"}),
        **changed,
    }
    return node_object(
        number, cidr6=cidr6 or f"fd00:10:244:{number:x}::/64", annotations=annotations_of(number, **texts)
    )


def test_dual_stack(api: Api, make_store: MakeStore, conf_both: NetConf, proxy: FaultProxy) -> None:
    overwrite = {PREFIX + "public-ipv6-overwrite": "2001:db8::7"}
    api.put(node_object(12, cidr6="fd00:10:244:c::/64", annotations=overwrite))
    api.put(both(3))
    api.put(both(4, cidr6="fd00:10:245::/64"))
    api.put(both(5, public_ipv6="2001:db8::7"))
    api.put(both(6, backend_v6_data="{"))
    store, recorder = make_store("node12")
    lease = store.acquire(conf_both, OWN_BOTH, None)
    assert lease == Lease(IPv4Network("10.244.12.0/24"), OWN_BOTH, subnet6=IPv6Network("fd00:10:244:c::/64"))
    assert annotation(api, "node12", "backend-v6-data") == '{"VNI":1,"VtepMAC":"0a:00:00:00:06:01"}'
    assert annotation(api, "node12", "public-ipv6") == "2001:db8::7"
    assert annotation(api, "node12", "public-ip") == "192.0.2.1"
    store.watch(recorder.post)
    recorder.wait(Snapshot)
    (good,) = (one for one in recorder.of(Snapshot)[0].leases if one.subnet == IPv4Network("10.244.3.0/24"))
    assert (good.subnet6, good.attrs.public_ip6) == (IPv6Network("fd00:10:244:3::/64"), IPv6Address("2001:db8::3"))
    assert good.attrs.backend_data6 == {"VNI": 1, "VtepMAC": "0a:00:00:00:06:03"}
    assert subnets(recorder.of(Snapshot)[0]) == ["10.244.12.0/24", "10.244.3.0/24"]
    for why in ("not a part of the IPv6Network", "2001:db8::7 is this node's own", "backend-v6-data annotation is not"):
        assert recorder.warned(why)


@pytest.mark.parametrize("change", [{"public_ip": "192.0.2.77"}, {"public_ipv6": "2001:db8::77"}])
def test_a_change_of_one_version_is_told(
    api: Api, make_store: MakeStore, conf_both: NetConf, change: dict[str, str]
) -> None:
    """Upstream takes it for no change at all, for the other version's data are the same."""
    api.put(node_object(12, cidr6="fd00:10:244:c::/64", annotations={}))
    api.put(both(3))
    store, recorder = make_store("node12")
    store.acquire(conf_both, OWN_BOTH, None)
    store.watch(recorder.post)
    recorder.wait(Snapshot)
    api.put(both(3, **change))
    [event] = recorder.wait(Event)
    assert (str(event.lease.attrs.public_ip), str(event.lease.attrs.public_ip6)) == (
        change.get("public_ip", "192.0.2.3"), change.get("public_ipv6", "2001:db8::3"),
    )  # fmt: skip


def test_ipv6_is_left_alone_without_it(api: Api, following: MakeStore) -> None:
    api.put(both(3))
    _, recorder = following()
    assert [lease.subnet6 for lease in recorder.of(Snapshot)[0].leases] == [None, None]
    assert annotation(api, "node1", "public-ipv6") is None


def test_dual_stack_needs_both_pod_cidrs(api: Api, make_store: MakeStore, conf_both: NetConf) -> None:
    with pytest.raises(StoreError, match="pod cidr not assigned, of IPv6"):
        make_store()[0].acquire(conf_both, OWN_BOTH, None)
    api.put(node_object(2, cidr6="fd00:99::/64", annotations={}))
    with pytest.raises(StoreError, match="fd00:99::/64 is not within the IPv6Network fd00:10:244::/48"):
        make_store("node2")[0].acquire(conf_both, OWN_BOTH, None)


@pytest.mark.parametrize(
    ("kind", "data6", "wanted"),
    [("host-gw", None, "null"), ("vxlan", None, None), ("ipip", None, None), ("extension", None, "null")],
)
def test_which_backends_publish_ipv6(kind: str, data6: Any, wanted: str | None) -> None:
    """flannel-behaviour.md, 4.1.10."""
    address = IPv4Address("192.0.2.1")
    attrs = LeaseAttrs(address, kind, None, IPv6Address("2001:db8::1"), data6)
    keys = Keys("flannel.alpha.coreos.com")
    texts = wanted_annotations(attrs, Addresses(address, attrs.public_ip6), keys)
    assert texts.get(keys.backend_data6) == wanted
    assert texts.get(keys.public_ip6) == (None if wanted is None else "2001:db8::1")
