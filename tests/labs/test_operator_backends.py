"""alloc and extension in a lab: a subnet for each node, and the operator's own commands to reach the others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from ipaddress import IPv4Network

import pytest

from testbed.deadline import Deadline
from testbed.labs import Quiet
from testbed.nodes import deploy
from testbed.nodes.deploy import Cluster
from testbed.nodes.etcd import PREFIX, Etcd
from testbed.nodes.madeup import etcd_of, free_subnets, made_up_leases
from testbed.options import RunOptions
from testbed.probes.flows import http_get
from testbed.probes.iproute import read_state
from tests.labs.helpers import unique

SECONDS = 10.0
EXTENSION = {
    "Type": "extension",
    "PreStartupCommand": "hostname",
    "PostStartupCommand": "mkdir -p /run/extension/$SUBNET",
    "SubnetAddCommand": "ip route replace $SUBNET via $PUBLIC_IP proto static",
    "SubnetRemoveCommand": "ip route del $SUBNET via $PUBLIC_IP",
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Nodes on one link, with host-gw to begin with."""
    running = deploy.bring_up(RunOptions(backend="host_gw", name=unique("operator")), Quiet())
    yield running
    running.lab.down()


def switch(cluster: Cluster, backend: dict[str, str]) -> Etcd:
    """Give every node another backend."""
    etcd = etcd_of(cluster)
    assert etcd is not None
    etcd.put(f"{PREFIX}/config", json.dumps({**cluster.flannel.net_conf, "Backend": backend}))
    for member in cluster.members:
        cluster.stop_flanneld(member.name)
    for member in cluster.members:
        cluster.start_flanneld(member.name)
    return etcd


def routes(cluster: Cluster, node: str) -> set[tuple[IPv4Network, str]]:
    """A node's routes into the Network, with their gateways."""
    found = read_state(cluster.lab.node(node)).routes
    return {(r.dst, str(r.gateway)) for r in found if r.dst.subnet_of(cluster.flannel.network) and r.gateway}


def by_peers(cluster: Cluster, node: str) -> set[tuple[IPv4Network, str]]:
    """A route by each other node."""
    return {(cluster.pod_cidr(m.name), str(m.spec.ip)) for m in cluster.members if m.name != node}


def reached(cluster: Cluster) -> set[tuple[str, str]]:
    """Which pods answer which, of different nodes."""
    pods = [pod for pod in cluster.pods.values() if pod.name.endswith("/testapp")]
    return {
        (one.name, other.name)
        for one in pods
        for other in pods
        if one is not other and not http_get(one, other.address, wait=0.5).error
    }


def test_alloc_gives_subnets_and_extension_s_commands_make_the_rest(cluster: Cluster) -> None:
    subnets = {member.name: cluster.pod_cidr(member.name) for member in cluster.members}
    names = [member.name for member in cluster.members]
    count = len(names)
    assert len(reached(cluster)) == count * (count - 1), "host-gw does not work"

    switch(cluster, {"Type": "alloc"})
    assert Deadline(SECONDS).poll(lambda: not any(routes(cluster, name) for name in names) or None), "routes are left"
    assert {name: cluster.pod_cidr(name) for name in names} == subnets
    assert all(lease["value"].get("BackendType", "") == "" for lease in cluster.leases().values())
    assert reached(cluster) == set()

    etcd = switch(cluster, EXTENSION)
    done = Deadline(SECONDS).poll(lambda: all(routes(cluster, n) == by_peers(cluster, n) for n in names) or None)
    assert done, {name: routes(cluster, name) for name in names}
    assert {name: cluster.pod_cidr(name) for name in names} == subnets
    assert len(reached(cluster)) == count * (count - 1)
    for name, lease in cluster.leases().items():
        assert (lease["value"]["BackendType"], lease["value"]["BackendData"]) == ("extension", name)
        assert cluster.lab.node(name).run(["test", "-d", f"/run/extension/{subnets[name]}"], check=False).ok
    (free,) = free_subnets(cluster, 1)
    far = cluster.members[-1].spec.ip
    lease = {"PublicIP": str(far), "BackendType": "extension", "BackendData": "far"}
    more = {(free, str(far))}
    with made_up_leases(etcd, {free: lease}):
        assert Deadline(SECONDS).poll(lambda: more <= routes(cluster, names[0]) or None), cluster.flanneld_log(names[0])
    assert Deadline(SECONDS).poll(lambda: not more & routes(cluster, names[0]) or None), cluster.flanneld_log(names[0])
