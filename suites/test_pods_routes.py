"""POD: routes that a pod could do without, and a node that comes back with another podCIDR."""

from __future__ import annotations

from testbed.checks import check
from testbed.fixtures import Path
from testbed.nodes.deploy import Cluster
from testbed.nodes.scratch import scratch_pod
from testbed.probes.flows import http_get
from testbed.probes.iproute import route_get


@check("POD-07")
def test_pod_reaches_others_without_the_route_to_the_network(path: Path, cluster: Cluster) -> None:
    """The default route leads to the same gateway. Source: S0."""
    node = path.source_node.name
    gateway = cluster.pod_cidr(node)[1]
    with scratch_pod(cluster, node) as pod:
        pod.run(["ip", "route", "delete", str(cluster.flannel.network)])
        (route,) = route_get(pod, path.address)
        assert route is not None, f"no other route of {pod.name} leads to {path.address}"
        assert (route.dst.prefixlen, route.gateway) == (0, gateway), f"{pod.name} goes by {route}"
        answer = http_get(pod, path.address)
        assert not answer.error, f"{path.address} without a route of its own: {answer.error}"
        assert answer.facts.get("node") == path.target_node.name, answer.facts
