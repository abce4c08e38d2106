"""The Kubernetes store and an API in trouble."""

from __future__ import annotations

import time
from ipaddress import IPv4Network
from typing import Any
from urllib.parse import parse_qs

import pytest

from flannel.netconf import NetConf
from flannel.stores.base import Event, Snapshot, StoreDown, StoreError
from tests.flannel.conftest import eventually
from tests.flannel.kubeapi import FaultProxy, SmallApi, node_object
from tests.flannel.kubelab import OWN, QUICK, Api, MakeStore, events, settled, subnets


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
