"""DEP: where flanneld keeps its leases, and what becomes of another configuration there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from testbed.checks import check
from testbed.fixtures import Facts, Path, Paths
from testbed.flannelspec import BACKENDS, run_of
from testbed.labs.base import Node
from testbed.nodes.deploy import Cluster
from testbed.nodes.otherwise import reconfigure
from testbed.probes.flows import ping

SWITCHED_SECONDS = 20.0
ETCD_PORT = 2379


def peers_of(node: Node) -> set[tuple[str, int]]:
    """Address and port of whoever a node's flanneld has a TCP connection with."""
    lines = node.run(["ss", "-Htnp", "state", "established"]).stdout.splitlines()
    ends = [line.split()[3] for line in lines if '"flanneld"' in line]
    return {(address.strip("[]"), int(port)) for address, _, port in (end.rpartition(":") for end in ends)}


@check("DEP-14")
def test_leases_are_the_api_s_alone(cluster: Cluster, facts: Facts) -> None:
    """flanneld speaks to the API server, and to no etcd. Source: S0, S4."""
    plane = cluster.kubernetes.plane

    def look() -> None:
        for node in cluster.members:
            found = peers_of(node)
            assert (plane.address, plane.port) in found, f"{node.name}: flanneld speaks to {found}, not to the API"
            strangers = found - {(plane.address, plane.port)}
            assert not strangers, f"{node.name}: flanneld speaks to {strangers} as well"

    facts.eventually(look)


def other_conf(cluster: Cluster) -> Mapping[str, Any]:
    """The cluster's net-conf.json with another backend: host-gw for vxlan, vxlan for all others."""
    kind = "host-gw" if cluster.flannel.backend.type == "vxlan" else "vxlan"
    return {**cluster.flannel.net_conf, "Backend": {"Type": kind}}


@check("DEP-25", disruptive=True)
def test_another_backend_is_everywhere_after_a_restart(paths: Paths, cluster: Cluster, facts: Facts) -> None:
    """Every lease says the new type, every route is the new one's, and packets follow. Source: S2."""
    path, conf = paths.take("SS"), other_conf(cluster)
    try:
        reconfigure(cluster, conf)
        facts.eventually(lambda: switched(cluster, facts, path, conf), seconds=SWITCHED_SECONDS)
    finally:
        reconfigure(cluster, cluster.flannel.net_conf)
        facts.forget()
    facts.eventually(lambda: switched(cluster, facts, path, cluster.flannel.net_conf), seconds=SWITCHED_SECONDS)


def switched(cluster: Cluster, facts: Facts, path: Path, conf: Mapping[str, Any]) -> None:
    """Assert that leases, routes and packets between two nodes of one subnet are those of conf's backend."""
    facts.forget()
    kind = conf["Backend"]["Type"]
    said = {name: lease["value"].get("BackendType") or "udp" for name, lease in cluster.leases().items()}
    assert set(said.values()) == {kind}, f"not every lease is of {kind}: {said}"
    cidr = cluster.pod_cidr(path.target_node.name)
    network, routes = cluster.flannel.network, facts.node(path.source_node.name).routes
    devices = {route.dev for route in routes if path.address in route.dst and route.dst.subnet_of(network)}
    wanted = device_of(conf, path)
    assert devices == wanted, f"{path.source_node.name} reaches {cidr} by {devices}, not by {wanted}"
    answer = ping(path.source, path.address, wait=1)
    assert answer.lost == 0, answer.output


def device_of(conf: Mapping[str, Any], path: Path) -> set[str]:
    """The device that a backend's routes to a node of the same subnet lead to; none where its policies take packets."""
    run = run_of(conf)
    assert run is not None, f"no run has the backend of {conf}"
    backend = BACKENDS[run]
    if backend.direct or not backend.tunnels:
        return {path.source_node.spec.underlay.name}
    device = backend.tunnel_device(conf)
    return {device} if device else set()
