"""The Kubernetes store: annotations, the podCIDR as lease, list and watch, and what it makes of faults and strangers.

Each test runs against a small API written for it, and against Kubernetes' own where that can be built. A proxy in front
of either makes it fail.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import parse_qs

import pytest

from flannel.lease import Lease, LeaseAttrs
from flannel.netconf import NetConf, parse
from flannel.stores.base import Event, LeaseLost, Remembered, Snapshot, StoreDown, StoreError
from flannel.stores.kubernetes import KubernetesStore, Patience
from flannel.stores.kubernetes_config import find_access
from flannel.stores.kubernetes_http import KubeClient
from flannel.stores.kubernetes_nodes import Addresses, Keys, wanted_annotations
from flannel.stores.kubernetes_open import KubeFlags, open_store
from flannel.stores.kubernetes_watch import Timing
from testbed.tools import ToolUnavailable
from tests.flannel.conftest import Recorder, eventually
from tests.flannel.kubeapi import FaultProxy, SmallApi, annotations_of, node_object
from tests.flannel.realapi import RealApi

PREFIX = "flannel.alpha.coreos.com/"
OWN = LeaseAttrs(IPv4Address("192.0.2.1"), "vxlan", {"VNI": 1, "VtepMAC": "0a:00:00:00:00:01"})
QUICK = Timing(first_back_off=0.05, longest_back_off=0.4, watch_least=20, bookmarks=2.0, grace=2.0, page=3)
MakeStore = Callable[..., tuple[KubernetesStore, Recorder]]
Api: TypeAlias = SmallApi | RealApi


@pytest.fixture(scope="module")
def real_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealApi]:
    """Kubernetes' own API server, for all tests."""
    try:
        api = RealApi(tmp_path_factory.mktemp("kubernetes"))
    except ToolUnavailable as error:
        pytest.skip(str(error))
    try:
        api.wait_ready()
        yield api
    finally:
        api.close()


@pytest.fixture(params=["small", "real"])
def api(request: pytest.FixtureRequest) -> Iterator[Api]:
    api = SmallApi() if request.param == "small" else request.getfixturevalue("real_api")
    if isinstance(api, RealApi):
        api.delete_all()
    api.put(node_object(1, annotations={}))
    yield api
    if isinstance(api, SmallApi):
        api.close()


@pytest.fixture
def small(api: Api) -> SmallApi:
    """The small API, for tests that look inside it."""
    if not isinstance(api, SmallApi):
        pytest.skip("looks inside the small API")
    return api


@pytest.fixture
def real(api: Api) -> RealApi:
    """Kubernetes' own API, for tests of what only that can do."""
    if not isinstance(api, RealApi):
        pytest.skip("asks what only Kubernetes' own API can answer")
    return api


@pytest.fixture
def proxy(api: Api) -> Iterator[FaultProxy]:
    proxy = FaultProxy(api.port, tls=api.tls)
    yield proxy
    proxy.close()


@pytest.fixture
def make_store(proxy: FaultProxy, tmp_path: Path) -> Iterator[MakeStore]:
    made: list[KubernetesStore] = []

    def make(name: str = "node1", **options: Any) -> tuple[KubernetesStore, Recorder]:
        recorder = Recorder()
        options = {"timing": QUICK, "patience": Patience(1.5, 0.1, 0.4), **options}
        client = KubeClient(find_access(proxy.url, "", {}), timeout=options.pop("timeout", 5.0))
        made.append(KubernetesStore(client, name, str(tmp_path / "net-conf.json"), recorder.log, **options))
        return made[-1], recorder

    yield make
    for store in made:
        store.close()


@pytest.fixture
def following(make_store: MakeStore, conf: NetConf) -> Callable[..., tuple[KubernetesStore, Recorder]]:
    """Return a function that makes a store which has a lease and follows the others'."""

    def follow(**options: Any) -> tuple[KubernetesStore, Recorder]:
        store, recorder = make_store(**options)
        store.acquire(conf, OWN, None)
        store.watch(recorder.post)
        recorder.wait(Snapshot)
        # What a test makes fail is meant to hit what comes after the first watch.
        eventually(lambda: store._watcher and store._watcher._stream is not None, "it watches", 10)
        return store, recorder

    return follow


def annotation(api: Api, name: str, key: str) -> str | None:
    text: str | None = api.get(name)["metadata"].get("annotations", {}).get(PREFIX + key)
    return text


def subnets(snapshot: Snapshot) -> list[str]:
    return sorted(str(lease.subnet) for lease in snapshot.leases)


def events(recorder: Recorder) -> list[tuple[str, str]]:
    return [(event.kind, str(event.lease.subnet)) for event in recorder.of(Event)]


def settled(api: Api, proxy: FaultProxy, recorder: Recorder, number: int = 200) -> None:
    """Wait until the watch tells of a new node: what came before it has been told as well."""
    count = len(recorder.of(Event))
    api.put(node_object(number))
    subnet = IPv4Network(f"10.244.{number}.0/24")
    eventually(lambda: any(event.lease.subnet == subnet for event in recorder.of(Event)[count:]), "news arrive", 10)


# -- the own node --------------------------------------------------------------------------------------------------


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
    assert recorder.warned("Somebody changed this node's annotations")


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


# -- the others ----------------------------------------------------------------------------------------------------


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

OWN_BOTH = replace(OWN, public_ip6=IPv6Address("2001:db8::1"), backend_data6={"VNI": 1, "VtepMAC": "0a:00:00:00:06:01"})


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
    [("host-gw", None, "null"), ("vxlan", None, None), ("ipip", None, None), ("extension", "x", '"x"')],
)
def test_which_backends_publish_ipv6(kind: str, data6: Any, wanted: str | None) -> None:
    """flannel-behaviour.md, 4.1.10."""
    attrs = LeaseAttrs(IPv4Address("192.0.2.1"), kind, None, IPv6Address("2001:db8::1"), data6)
    keys = Keys("flannel.alpha.coreos.com")
    texts = wanted_annotations(attrs, Addresses(attrs.public_ip, attrs.public_ip6), keys)
    assert texts.get(keys.backend_data6) == wanted
    assert texts.get(keys.public_ip6) == (None if wanted is None else "2001:db8::1")


# -- an API in trouble ---------------------------------------------------------------------------------------------


def test_410_lists_again(api: Api, following: MakeStore, proxy: FaultProxy) -> None:
    api.put(node_object(2))
    _, recorder = following()
    proxy.add("error", "watch=1", status=410)
    api.put(node_object(3))
    snapshot = recorder.wait(Snapshot, 2)[1]
    assert subnets(snapshot) == ["10.244.1.0/24", "10.244.2.0/24", "10.244.3.0/24"]
    assert not recorder.of(StoreDown), "it is no outage"
    settled(api, proxy, recorder)


def test_410_for_the_watch_itself_and_within_a_list(api: Api, following: MakeStore, proxy: FaultProxy) -> None:
    for number in range(2, 9):
        api.put(node_object(number))
    proxy.add("status", "continue=", status=410)
    proxy.add("status", "watch=1", status=410)
    _, recorder = following()
    recorder.wait(Snapshot, 2)
    assert all(len(snapshot.leases) == 8 for snapshot in recorder.of(Snapshot)), "never half a list"
    settled(api, proxy, recorder)


def test_list_whose_pages_are_of_different_versions_is_not_used(
    small: SmallApi, following: MakeStore, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2, 9):
        small.put(node_object(number))
    real, lies = SmallApi._list, [True]

    def lie(self: SmallApi, handler: Any, limit: int, token: str) -> None:
        if token and lies:
            lies.pop()
            self.nodes.pop("node8")
            token = "99/6"
        real(self, handler, limit, token)

    monkeypatch.setattr(SmallApi, "_list", lie)
    _, recorder = following()
    assert "changed its version" in recorder.of(StoreDown)[0].reason
    assert len(recorder.of(Snapshot)[0].leases) == 7


@pytest.mark.parametrize("status", [429, 500, 503])
def test_trouble_is_told_once_and_waited_out(api: Api, following: MakeStore, proxy: FaultProxy, status: int) -> None:
    api.put(node_object(2))
    _, recorder = following()
    proxy.add("status", "/api/v1/nodes?", status=status, times=3)
    proxy.add("half", "watch=1")
    api.put(node_object(3))
    settled(api, proxy, recorder)
    assert len(recorder.of(StoreDown)) == 1
    assert events(recorder)[0] == ("added", "10.244.3.0/24"), "nothing was lost, and nothing listed anew"
    assert proxy.count("limit=3") == 1
    assert len(recorder.of(Snapshot)) == 2, "one at the start, one when it was back"


def test_retry_after_is_obeyed(api: Api, following: MakeStore, proxy: FaultProxy) -> None:
    _, recorder = following()
    proxy.add("status", "watch=1", status=429, headers={"Retry-After": "1"})
    proxy.add("half", "watch=1")
    seen = len(proxy.requests)
    api.put(node_object(3))
    settled(api, proxy, recorder)
    first, second = [at for at, text in proxy.requests[seen:] if "watch=1" in text][:2]
    assert second - first >= 1.0


def test_half_a_line(api: Api, following: MakeStore, proxy: FaultProxy) -> None:
    _, recorder = following()
    settled(api, proxy, recorder)
    proxy.add("half", "watch=1")
    api.put(node_object(3))
    recorder.wait(Event, 2)
    assert events(recorder) == [("added", "10.244.200.0/24"), ("added", "10.244.3.0/24")]
    assert "in the middle of a line" in recorder.of(StoreDown)[0].reason
    assert proxy.count("limit=3") == 1, "nothing is listed again"
    (_, again) = [text for _, text in proxy.requests if "watch=1" in text]
    version = parse_qs(again)["resourceVersion"][0]
    assert int(version) >= int(api.get("node200")["metadata"]["resourceVersion"]), "it goes on from where it was"


def test_half_a_list(api: Api, make_store: MakeStore, conf: NetConf, proxy: FaultProxy) -> None:
    for number in range(2, 9):
        api.put(node_object(number))
    proxy.add("half", "continue=")
    store, recorder = make_store()
    store.acquire(conf, OWN, None)
    store.watch(recorder.post)
    assert len(recorder.wait(Snapshot)[0].leases) == 8
    assert "broke off" in recorder.of(StoreDown)[0].reason


def test_watch_that_hangs(api: Api, following: MakeStore, proxy: FaultProxy) -> None:
    # The small API sends bookmarks all the time, whose end is noticed; Kubernetes' own waits a minute before the first.
    _, recorder = following(timing=QUICK if isinstance(api, SmallApi) else QUICK._replace(watch_least=2, grace=1.0))
    proxy.add("hang", "watch=1")
    api.put(node_object(3))
    recorder.wait(Event, seconds=15)
    assert "fell silent" in recorder.of(StoreDown)[0].reason


def test_call_that_hangs(api: Api, make_store: MakeStore, conf: NetConf, proxy: FaultProxy) -> None:
    proxy.add("hang", "GET /api/v1/nodes/node1")
    store, _ = make_store(timeout=0.5)
    assert store.acquire(conf, OWN, None).subnet == IPv4Network("10.244.1.0/24")


def test_outage(api: Api, following: MakeStore, proxy: FaultProxy) -> None:
    api.put(node_object(2))
    _, recorder = following()
    proxy.away = True
    api.delete("node2")  # the proxy cuts a watch when something comes
    recorder.wait(StoreDown)
    eventually(lambda: proxy.count("/api/v1/nodes?") > 4, "it tries again", 10)
    proxy.away = False
    recorder.wait(Snapshot, 2)
    recorder.wait(Event)
    assert events(recorder) == [("removed", "10.244.2.0/24")]
    assert len(recorder.of(StoreDown)) == 1


def test_api_that_has_forgotten_asks_for_a_new_list(api: Api, following: MakeStore, proxy: FaultProxy) -> None:
    _, recorder = following()
    proxy.add("error", "watch=1", status=504, reason="Too large resource version: 999, current: 7")
    api.put(node_object(3))
    assert "10.244.3.0/24" in subnets(recorder.wait(Snapshot, 2)[1])


def test_calls_are_tried_for_a_while(make_store: MakeStore, conf: NetConf, proxy: FaultProxy) -> None:
    store, recorder = make_store()
    proxy.add("status", "PATCH", status=500, times=3)
    store.acquire(conf, OWN, None)
    assert recorder.warned("trying again every")
    proxy.add("status", "GET", status=403, times=1000)
    began = time.monotonic()
    with pytest.raises(StoreError, match="403.*ClusterRole.*given up"):
        make_store()[0].acquire(conf, OWN, None)
    assert time.monotonic() - began < 5


# -- flags and environment -----------------------------------------------------------------------------------------


def flags(url: str = "", kubeconfig: str = "", prefix: str = "flannel.alpha.coreos.com") -> KubeFlags:
    return KubeFlags(url, kubeconfig, prefix, "/nonexistent/net-conf.json", set_condition=True)


def test_node_name(small: SmallApi, proxy: FaultProxy) -> None:
    log = Recorder().log
    assert open_store(flags(proxy.url), {"NODE_NAME": "here"}, log).node_name == "here"
    pod = {"POD_NAME": "flannel-x", "POD_NAMESPACE": "kube-flannel"}
    assert proxy.count("/pods/") == 0
    assert open_store(flags(proxy.url), pod, log).node_name == "node1"
    assert proxy.count("GET /api/v1/namespaces/kube-flannel/pods/flannel-x") == 1
    with pytest.raises(StoreError, match="NODE_NAME"):
        open_store(flags(proxy.url), {"POD_NAME": "x"}, log)
    with pytest.raises(StoreError, match="EVENT_QUEUE_DEPTH"):
        open_store(flags(proxy.url), {"NODE_NAME": "here", "EVENT_QUEUE_DEPTH": "many"}, log)
    with pytest.raises(StoreError, match="kube-annotation-prefix"):
        open_store(flags(proxy.url, prefix="x"), {"NODE_NAME": "here"}, log)


def test_network_configuration(make_store: MakeStore, tmp_path: Path) -> None:
    store, _ = make_store()
    with pytest.raises(StoreError, match="net-conf.json: No such file"):
        store.network_config()
    (tmp_path / "net-conf.json").write_text('{"Network": "10.244.0.0/16"}')
    assert store.network_config() == '{"Network": "10.244.0.0/16"}'


def test_token_is_read_again(small: SmallApi, proxy: FaultProxy, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("first\n")
    access = find_access(proxy.url, "", {})
    client = KubeClient(replace(access, token_file=str(token)))
    client.get("/api/v1/nodes/node1")
    token.write_text("second\n")
    client.get("/api/v1/nodes/node1")
    assert small.authorizations[-2:] == ["Bearer first", "Bearer second"]
    token.write_text("")
    with pytest.raises(StoreError, match="holds no token"):
        client.get("/api/v1/nodes/node1")


# -- what only Kubernetes' own API can answer ----------------------------------------------------------------------


def come_back_at(
    version: str, store: KubernetesStore, proxy: FaultProxy, recorder: Recorder, meanwhile: Callable[[], None]
) -> None:
    """Have an outage, in which the version that all is known up to becomes another one."""
    watcher = store._watcher
    assert watcher is not None
    proxy.away = True
    watcher._end_stream()
    recorder.wait(StoreDown)
    meanwhile()
    watcher._version = version
    proxy.away = False


def test_history_that_is_another_one(api: Api, following: MakeStore, proxy: FaultProxy) -> None:
    store, recorder = following()
    come_back_at("99999999", store, proxy, recorder, lambda: None)
    recorder.wait(Snapshot, 2)
    assert recorder.warned("history is another one")
    settled(api, proxy, recorder)


def test_api_server_that_restarts_has_forgotten_old_versions(
    real: RealApi, following: MakeStore, proxy: FaultProxy
) -> None:
    real.put(node_object(2))
    store, recorder = following()
    come_back_at("2", store, proxy, recorder, real.restart_server)
    eventually(lambda: proxy.count("limit=3") == 2, "the nodes are listed again", 10)
    assert subnets(recorder.of(Snapshot)[-1]) == ["10.244.1.0/24", "10.244.2.0/24"]
    assert any("listing again" in text and "410" in text for _, text in recorder.lines)
    settled(real, proxy, recorder)


def kubeconfig(folder: Path, real: RealApi, user: dict[str, str], **cluster: str) -> KubeClient:
    """A client by a kubeconfig whose certificates stand in it."""
    config = {
        "current-context": "x",
        "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
        "clusters": [{"name": "x", "cluster": {"server": real.plane.url, **cluster}}],
        "users": [{"name": "x", "user": user}],
    }
    (folder / "kubeconfig").write_text(json.dumps(config))
    return KubeClient(find_access("", str(folder / "kubeconfig"), {}))


def encoded(path: str) -> str:
    return base64.b64encode(Path(path).read_bytes()).decode()


def test_certificates_inline_and_by_path(real: RealApi, tmp_path: Path) -> None:
    pki = real.plane.folder
    inline = {"client-certificate-data": encoded(f"{pki}/admin.crt"), "client-key-data": encoded(f"{pki}/admin.key")}
    by_path = {"client-certificate": f"{pki}/admin.crt", "client-key": f"{pki}/admin.key"}
    ca, ca_data = {"certificate-authority": f"{pki}/ca.crt"}, {"certificate-authority-data": encoded(f"{pki}/ca.crt")}
    for user, cluster in (
        (inline, ca_data),
        (by_path, ca),
        (inline, {"tls-server-name": "kubernetes.default.svc", **ca}),
    ):
        client = kubeconfig(tmp_path, real, user, **cluster)
        assert client.get("/api/v1/nodes/node1")["metadata"]["name"] == "node1"


def test_server_that_is_not_the_one_is_refused(real: RealApi, tmp_path: Path) -> None:
    pki = real.plane.folder
    for cluster in (
        {},
        {"certificate-authority": f"{pki}/admin.crt"},
        {"certificate-authority": f"{pki}/ca.crt", "tls-server-name": "x"},
    ):
        client = kubeconfig(tmp_path, real, {"token": "x"}, **cluster)
        with pytest.raises(StoreError, match="CERTIFICATE_VERIFY_FAILED"):
            client.get("/api/v1/nodes/node1")
    broken = kubeconfig(tmp_path, real, {}, **{"certificate-authority": f"{pki}/none.crt"})
    with pytest.raises(StoreError, match="cannot use the certificates"):
        broken.get("/api/v1/nodes/node1")


def test_token_and_what_it_may_do(real: RealApi, tmp_path: Path) -> None:
    ca = {"certificate-authority": f"{real.plane.folder}/ca.crt"}
    with pytest.raises(StoreError, match="401.*not accepted"):
        kubeconfig(tmp_path, real, {"token": "junk"}, **ca).get("/api/v1/nodes/node1")
    accounts = "/api/v1/namespaces/default/serviceaccounts"
    real.ask("POST", accounts, {"metadata": {"name": "nobody"}})
    _, answer = real.ask("POST", f"{accounts}/nobody/token", {"spec": {}})
    with pytest.raises(StoreError, match="403.*ClusterRole"):
        kubeconfig(tmp_path, real, {"token": answer["status"]["token"]}, **ca).get("/api/v1/nodes/node1")
