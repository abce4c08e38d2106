"""A lease in etcd that a stranger wrote: it is refused by name, and nothing of the nodes changes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from testbed.deadline import Deadline
from testbed.nodes import deploy
from testbed.nodes.deploy import Cluster
from testbed.nodes.etcd import PREFIX, Etcd
from testbed.nodes.store import EtcdLeases
from testbed.options import RunOptions
from tests.labs.helpers import unique

SECONDS = 10.0


@pytest.fixture(scope="module", params=["vxlan", "host_gw", "udp"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The smallest topology with each backend."""
    made = deploy.bring_up(RunOptions(backend=request.param, name=unique("hostile"), topology="flat"))
    yield made
    made.lab.down()


@pytest.fixture
def etcd(cluster: Cluster) -> Etcd:
    """Its etcd."""
    assert isinstance(cluster.store, EtcdLeases)
    return cluster.store.etcd


def kernel(cluster: Cluster) -> dict[str, str]:
    """All of a node's routes, permanent neighbours, FDB entries and addresses."""
    script = "ip -4 route show table all; ip -4 neigh show nud permanent; bridge fdb show; ip -4 -o addr"
    return {node.name: node.run(["sh", "-c", script]).stdout for node in cluster.members}


GOOD_MAC = "02:00:00:00:00:66"


@pytest.mark.parametrize(
    ("subnet", "ip", "mac"),
    [
        pytest.param("192.168.7.0-24", "10.0.0.66", GOOD_MAC, id="outside the Network"),
        pytest.param("0.0.0.0-0", "10.0.0.66", GOOD_MAC, id="everything"),
        pytest.param("10.244.0.0-16", "10.0.0.66", GOOD_MAC, id="the whole Network"),
        pytest.param("10.240.0.0-12", "10.0.0.66", GOOD_MAC, id="more than the Network"),
        pytest.param("{own}-25", "10.0.0.66", GOOD_MAC, id="part of ours"),
        pytest.param("{peers}-25", "10.0.0.66", GOOD_MAC, id="part of a peer's"),
        pytest.param("10.244.200.0-24", "{me}", GOOD_MAC, id="our own address"),
        pytest.param("10.244.200.0-24", "10.0.0.255", GOOD_MAC, id="our link's broadcast address"),
        pytest.param("10.244.200.0-24", "127.0.0.1", GOOD_MAC, id="loopback"),
        pytest.param("10.244.200.0-24", "0.0.0.0", GOOD_MAC, id="no address"),
        pytest.param("10.244.200.0-24", "255.255.255.255", GOOD_MAC, id="broadcast"),
        pytest.param("10.244.200.0-24", "239.1.2.3", GOOD_MAC, id="multicast"),
        pytest.param("10.244.200.0-24", "10.244.3.4", GOOD_MAC, id="inside the Network"),
        pytest.param("10.244.200.0-24", "fe80::1", GOOD_MAC, id="IPv6 link-local"),
        pytest.param("10.244.200.0-24", "10.0.0.66", "01:00:5e:00:00:01", id="multicast MAC"),
        pytest.param("10.244.200.0-24", "10.0.0.66", "ff:ff:ff:ff:ff:ff", id="broadcast MAC"),
        pytest.param("10.244.200.0-24", "10.0.0.66", "00:00:00:00:00:00", id="no MAC"),
        pytest.param("10.244.200.0-24/../../config", "10.0.0.66", GOOD_MAC, id="no subnet"),
    ],
)
def test_a_hostile_lease_is_refused_by_name_and_touches_nothing(
    cluster: Cluster, etcd: Etcd, subnet: str, ip: str, mac: str
) -> None:
    kind = cluster.flannel.backend.type
    if mac != GOOD_MAC and kind != "vxlan":
        pytest.skip(f"{kind} uses no MAC")
    victim = cluster.members[1]
    facts = {"own": cluster.pod_cidr(victim.name).network_address, "me": victim.spec.ip}
    facts["peers"] = cluster.pod_cidr(cluster.members[0].name).network_address + 128
    name = subnet.format(**facts)
    value: dict[str, Any] = {"PublicIP": ip.format(**facts)}
    if kind != "udp":
        value["BackendType"] = kind
    if kind == "vxlan":
        value["BackendData"] = {"VNI": 1, "VtepMAC": mac}
    before = kernel(cluster)
    victim.run(["sh", "-c", ": >/var/log/flanneld.log"])
    etcd.put(f"{PREFIX}/subnets/{name}", json.dumps(value))
    try:
        said = name.split("-", maxsplit=1)[0]
        log = Deadline(SECONDS).poll(
            lambda: next(
                (line for line in victim.read("/var/log/flanneld.log").decode().splitlines()
                 if "gnoring the lease" in line and said in line), None,
            )
        )  # fmt: skip
        assert log, f"it is not refused by name\n{victim.read('/var/log/flanneld.log').decode()}"
        # For other nodes one that is hostile to this one alone may be a peer like any other.
        changed = {node for node, text in kernel(cluster).items() if text != before[node]}
        assert victim.name not in changed
        assert not changed or "{" in subnet + ip, changed
        assert all(cluster.flanneld_pid(node.name) for node in cluster.members)
    finally:
        etcd.delete(f"{PREFIX}/subnets/{name}")
    assert Deadline(SECONDS).poll(lambda: kernel(cluster) == before or None), "something of it is left"
