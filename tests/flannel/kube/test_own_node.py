"""The Kubernetes store and its own node: annotations, the podCIDR as lease, the condition."""

from __future__ import annotations

import json
import threading
from ipaddress import IPv4Address, IPv4Network

import pytest

from flannel.lease import LeaseAttrs
from flannel.netconf import NetConf
from flannel.stores.base import LeaseLost, Remembered, Snapshot, StoreError
from flannel.stores.kubernetes import Patience
from flannel.stores.kubernetes_nodes import Keys
from tests.flannel.conftest import eventually
from tests.flannel.kubeapi import FaultProxy, SmallApi, annotations_of, node_object
from tests.flannel.kubelab import OWN, PREFIX, Api, MakeStore, annotation, settled


def test_lease_is_the_pod_cidr(api: Api, make_store: MakeStore, conf: NetConf) -> None:
    store, _ = make_store()
    lease = store.acquire(conf, OWN, None)
    assert (lease.subnet, lease.attrs) == (IPv4Network("10.244.1.0/24"), OWN)
    assert api.get("node1")["metadata"]["annotations"] == {
        PREFIX + "kube-subnet-manager": "true",
        PREFIX + "backend-type": "vxlan",
        PREFIX + "backend-data": '{"VNI":1,"VtepMAC":"0a:00:00:00:00:01"}',
        PREFIX + "public-ip": "192.0.2.1",
    }


def test_only_what_changed_is_patched(api: Api, make_store: MakeStore, conf: NetConf, proxy: FaultProxy) -> None:
    make_store()[0].acquire(conf, OWN, None)
    before = proxy.count("PATCH")
    make_store()[0].acquire(conf, OWN, None)
    assert proxy.count("PATCH") == before, "nothing has changed"
    moved = LeaseAttrs(IPv4Address("192.0.2.9"), OWN.backend_type, OWN.backend_data)
    make_store()[0].acquire(conf, moved, None)
    assert proxy.count("PATCH /api/v1/nodes/node1/status") == before + 1
    if isinstance(api, SmallApi):
        assert api.patches[-1] == {"metadata": {"annotations": {PREFIX + "public-ip": "192.0.2.9"}}}


def test_backend_without_data_writes_null(api: Api, make_store: MakeStore, conf: NetConf) -> None:
    make_store()[0].acquire(conf, LeaseAttrs(IPv4Address("192.0.2.1"), ""), None)
    assert (annotation(api, "node1", "backend-type"), annotation(api, "node1", "backend-data")) == ("", "null")


@pytest.mark.parametrize(("data", "text"), [("a text", '"a text"'), (None, "")])
def test_an_extension_writes_a_text_or_nothing(
    api: Api, make_store: MakeStore, conf: NetConf, data: str | None, text: str
) -> None:
    store, _ = make_store()
    store.acquire(conf, LeaseAttrs(IPv4Address("192.0.2.1"), "extension", data), None)
    assert annotation(api, "node1", "backend-data") == text
    before = store.remembered().attrs
    assert before is not None
    assert before.backend_data == data


def test_it_is_called_by_the_nodes_name_and_its_lease_has_no_end(
    api: Api, make_store: MakeStore, conf: NetConf
) -> None:
    store, _ = make_store()
    assert store.name == "Kubernetes Subnet Manager - node1"
    assert store.acquire(conf, OWN, None).expiration == 0.0


def test_another_prefix(api: Api, make_store: MakeStore, conf: NetConf) -> None:
    make_store(prefix="example.com/net")[0].acquire(conf, OWN, None)
    assert api.get("node1")["metadata"]["annotations"]["example.com/net-public-ip"] == "192.0.2.1"


@pytest.mark.parametrize(
    ("prefix", "full"),
    [("a.b", "a.b/"), ("a.b/", "a.b/"), ("a.b/c", "a.b/c-"), ("a.b/c-", "a.b/c-"), ("x-y.a_b.c/d.e", "x-y.a_b.c/d.e-")],
)
def test_prefix(prefix: str, full: str) -> None:
    assert Keys(prefix).public_ip == full + "public-ip"


@pytest.mark.parametrize(
    "prefix", ["", "a", "a/b", "a.b/c/d", "A.b", "a..b", "a.b\n", "ä.b", " a.b", "a.b/ä", ".b/c", "-/"]
)
def test_prefix_that_cannot_be_one(prefix: str) -> None:
    with pytest.raises(StoreError, match="kube-annotation-prefix"):
        Keys(prefix)


def test_operator_overwrites_the_address(api: Api, following: MakeStore) -> None:
    key = PREFIX + "public-ip-overwrite"
    api.put(node_object(1, annotations={key: "198.51.100.7"}))
    store, recorder = following()
    assert annotation(api, "node1", "public-ip") == "198.51.100.7"
    own = store.own()
    assert own is not None
    assert own.lease.attrs == OWN, "the device keeps the real address"
    node = api.get("node1")
    node["metadata"]["annotations"][key] = "198.51.100.8"
    api.put(node)
    eventually(lambda: annotation(api, "node1", "public-ip") == "198.51.100.8", "the new address is published", 5)
    # A peer with our address would have our packets.
    api.put(node_object(7, annotations=annotations_of(7, public_ip="198.51.100.8")))
    eventually(lambda: recorder.warned("this node's own"), "the peer with our address is refused", 5)


def test_overwritten_address_that_is_none(api: Api, make_store: MakeStore, conf: NetConf) -> None:
    api.put(node_object(1, annotations={PREFIX + "public-ip-overwrite": "example.com"}))
    store, recorder = make_store()
    store.acquire(conf, OWN, None)
    assert annotation(api, "node1", "public-ip") == "192.0.2.1"
    assert any("public-ip-overwrite" in text for level, text in recorder.lines if level == "error")


def test_pod_cidr_is_waited_for(api: Api, make_store: MakeStore, conf: NetConf) -> None:
    api.put(node_object(2, cidr="", annotations={}))
    store, recorder = make_store("node2")
    with pytest.raises(StoreError, match="'node2': pod cidr not assigned.*given up"):
        store.acquire(conf, OWN, None)
    assert annotation(api, "node2", "public-ip") is None, "nothing is published of a node without a subnet"
    patient = make_store("node2", patience=Patience(20, 0.1, 1))[0]
    timer = threading.Timer(0.5, lambda: api.put(node_object(2, annotations={})))
    timer.start()
    assert patient.acquire(conf, OWN, None).subnet == IPv4Network("10.244.2.0/24")
    assert recorder.warned("pod cidr not assigned")


def test_pod_cidr_outside_the_network(api: Api, make_store: MakeStore, conf: NetConf) -> None:
    api.put(node_object(2, cidr="10.9.2.0/24", annotations={}))
    with pytest.raises(StoreError, match=r"10\.9\.2\.0/24 is not within the Network 10\.244\.0\.0/16"):
        make_store("node2")[0].acquire(conf, OWN, None)
    assert annotation(api, "node2", "public-ip") is None


def test_node_that_is_not_there(make_store: MakeStore, conf: NetConf) -> None:
    with pytest.raises(StoreError, match="404.*nobody.*given up"):
        make_store("nobody")[0].acquire(conf, OWN, None)


def test_what_the_node_published_before_is_remembered(api: Api, make_store: MakeStore, conf: NetConf) -> None:
    store, recorder = make_store()
    assert store.remembered() == Remembered()
    store.acquire(conf, OWN, None)
    assert store.remembered() == Remembered("", OWN)
    annotations = annotations_of(
        1, backend_data='{ "VNI" : 1,\n "VtepMAC": "0a:00:00:00:00:01" }', node_public_ip="1.2.3.4"
    )
    api.put(node_object(1, annotations=annotations))
    assert store.remembered() == Remembered("1.2.3.4", OWN), "white space makes no difference"
    api.put(node_object(1, annotations=annotations_of(1, backend_data="{")))
    assert store.remembered() == Remembered()
    assert not recorder.warned("nobody reads")
    api.put(node_object(1, annotations=annotations_of(1, public_ip_overide="1.2.3.4")))
    store.remembered()
    assert recorder.warned("nobody reads the annotation 'flannel.alpha.coreos.com/public-ip-overide'")


def test_annotations_that_somebody_changed_are_written_again(api: Api, following: MakeStore) -> None:
    _, recorder = following()
    api.put(node_object(1, annotations=annotations_of(1, backend_type="host-gw", public_ip=None)))
    eventually(lambda: annotation(api, "node1", "backend-type") == "vxlan", "the type is back", 5)
    eventually(lambda: annotation(api, "node1", "public-ip") == "192.0.2.1", "the address is back", 5)
    # The API has them before the store has its answer.
    eventually(lambda: recorder.warned("Somebody changed this node's annotations"), "it is said", 5)


def test_new_data_is_published(api: Api, following: MakeStore, proxy: FaultProxy) -> None:
    store, recorder = following()
    proxy.add("status", "PATCH", status=500, times=2)
    new = {"VNI": 1, "VtepMAC": "0a:00:00:00:00:99"}
    store.update(LeaseAttrs(OWN.public_ip, "vxlan", new))
    eventually(lambda: json.loads(annotation(api, "node1", "backend-data") or "0") == new, "the MAC is published", 5)
    assert not recorder.warned("Somebody changed"), "it was us"


def test_condition_is_cleared(api: Api, following: MakeStore, proxy: FaultProxy) -> None:
    proxy.add("drop", "PATCH /api/v1/nodes/node1/status", times=2)
    following()

    def cleared() -> bool:
        conditions = api.get("node1").get("status", {}).get("conditions", [])
        return any(
            (one["type"], one["status"], one["reason"]) == ("NetworkUnavailable", "False", "FlannelIsUp")
            for one in conditions
        )

    eventually(cleared, "the condition is cleared, at the second try", 5)


def test_condition_is_left_alone_if_told_so(api: Api, proxy: FaultProxy, following: MakeStore) -> None:
    _, recorder = following(set_condition=False)
    settled(api, proxy, recorder)
    assert not api.get("node1").get("status", {}).get("conditions", [])


def test_deleted_own_node_is_a_lost_lease(api: Api, following: MakeStore, conf: NetConf) -> None:
    store, recorder = following()
    api.delete("node1")
    (lost,) = recorder.wait(LeaseLost)
    assert "deleted" in lost.reason
    api.put(node_object(1, annotations={}))
    assert store.acquire(conf, OWN, None).subnet == IPv4Network("10.244.1.0/24")
    assert annotation(api, "node1", "public-ip") == "192.0.2.1"
    recorder.wait(Snapshot, 2)


def test_another_pod_cidr_is_a_lost_lease(api: Api, following: MakeStore, proxy: FaultProxy) -> None:
    _, recorder = following()
    # Seen by a list, too: the watch breaks, and by then the node has been made anew.
    proxy.add("error", "watch=1", status=410)
    api.delete("node1")
    api.put(node_object(1, cidr="10.244.99.0/24", annotations={}))
    assert "10.244.1.0/24 is lost" in recorder.wait(LeaseLost)[0].reason
