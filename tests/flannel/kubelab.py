"""What the tests of the Kubernetes store share: who the own node is, and reading what an API and a store have."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network
from typing import TypeAlias

from flannel.lease import LeaseAttrs
from flannel.stores.base import Event, Snapshot
from flannel.stores.kubernetes import KubernetesStore
from flannel.stores.kubernetes_watch import Timing
from tests.flannel.conftest import Recorder, eventually
from tests.flannel.kubeapi import FaultProxy, SmallApi, node_object
from tests.flannel.realapi import RealApi

PREFIX = "flannel.alpha.coreos.com/"
OWN = LeaseAttrs(IPv4Address("192.0.2.1"), "vxlan", {"VNI": 1, "VtepMAC": "0a:00:00:00:00:01"})
QUICK = Timing(first_back_off=0.05, longest_back_off=0.4, watch_least=20, bookmarks=2.0, grace=2.0, page=3)
MakeStore = Callable[..., tuple[KubernetesStore, Recorder]]
Api: TypeAlias = SmallApi | RealApi


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
