"""What happened to peers while a node's flanneld was down."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from testbed.nodes.etcd import PREFIX
from testbed.nodes.store import EtcdLeases
from tests.heals.heallab import HEALS_WITHIN, RESTARTS_WITHIN, HealLab


@pytest.fixture(scope="module", params=["vxlan", "host_gw", "vxlan_direct", "ipip"])
def lab(request: pytest.FixtureRequest, make_lab: Callable[..., HealLab]) -> HealLab:
    """A cluster of each backend that programs the kernel by peer."""
    return make_lab(request.param)


class Strangers:
    """Nodes that exist in the store alone: 10.244.N.0/24 at 10.0.0.M."""

    def __init__(self, lab: HealLab) -> None:
        self._kind = lab.flannel.backend.type
        store = lab.cluster.store
        assert isinstance(store, EtcdLeases)
        self._etcd = store.etcd

    def put(self, number: int, host: int) -> None:
        value: dict[str, object] = {"PublicIP": f"10.0.0.{host}", "PublicIPv6": None, "BackendType": self._kind}
        if self._kind == "vxlan":
            value["BackendData"] = {"VNI": 1, "VtepMAC": f"02:00:00:00:01:{host:02x}"}
        self._etcd.put(f"{PREFIX}/subnets/10.244.{number}.0-24", json.dumps(value))

    def remove(self, number: int) -> None:
        self._etcd.delete(f"{PREFIX}/subnets/10.244.{number}.0-24")


def test_nothing_is_missed(lab: HealLab) -> None:
    strangers = Strangers(lab)
    usual = lab.settled()
    for number in (201, 202, 203):
        strangers.put(number, number)

    def named(*words: str) -> bool:
        state = " ".join(lab.state())
        return all((word.lstrip("!") in state) != word.startswith("!") for word in words)

    reached = ("10.244.201.0", "10.244.202.0", "10.244.203.0", "10.0.0.202")
    lab.eventually("peers added while it runs", lambda: named(*reached), HEALS_WITHIN)
    lab.cluster.stop_flanneld(lab.victim, "KILL")
    strangers.remove(201)  # gone
    strangers.put(202, 212)  # has another address, and for vxlan another MAC
    strangers.remove(203)  # gone and come back as another
    strangers.put(203, 213)
    strangers.put(204, 204)  # new
    lab.start([lab.victim])
    wanted = ("!10.244.201.0", "!10.0.0.201", "10.244.202.0", "10.0.0.212", "!10.0.0.202", "!02:00:00:00:01:ca",
              "10.244.203.0", "10.0.0.213", "!10.0.0.203", "10.244.204.0", "10.0.0.204")  # fmt: skip
    lab.eventually("peers added, removed and changed while it was down", lambda: named(*wanted), RESTARTS_WITHIN)
    for number in (202, 203, 204):
        strangers.remove(number)
    lab.eventually("peers removed while it runs", lambda: lab.state() == usual, HEALS_WITHIN)
    assert lab.answers()
