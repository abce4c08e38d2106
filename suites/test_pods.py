"""POD: what CNI leaves on the node and in the pod."""

from __future__ import annotations

from ipaddress import IPv4Interface, IPv4Network

from testbed.checks import check
from testbed.fixtures import Facts
from testbed.nodes.deploy import Cluster
from testbed.probes.iproute import route_get

EVERYWHERE = IPv4Network((0, 0))


@check("POD-01")
def test_bridge_is_up_with_the_first_address(cluster: Cluster, facts: Facts) -> None:
    """The bridge is up and has the podCIDR's first host address with its mask. Source: S0, S2, S4."""
    for node, cidr in facts.pod_cidrs().items():
        bridge = facts.link(node, cluster.flannel.bridge)
        assert bridge.kind == "bridge", f"{node}: {bridge.name} is a {bridge.kind or 'plain device'}"
        assert bridge.up, f"{node}: {bridge.name} has {sorted(bridge.flags)}"
        wanted = (IPv4Interface((cidr[1], cidr.prefixlen)),)
        assert bridge.addresses == wanted, f"{node}: {bridge.name} has {bridge.addresses}"


@check("POD-05")
def test_pod_has_exactly_three_routes(cluster: Cluster, facts: Facts) -> None:
    """Default and Network by the bridge's address, the podCIDR on the link. Source: S0, S1, S3."""
    for pod in cluster.pods.values():
        cidr = cluster.pod_cidr(pod.node.name)
        found = {(r.dst, r.gateway, r.dev, r.prefsrc if r.scope == "link" else None) for r in facts.pod(pod).routes}
        wanted = {
            (EVERYWHERE, cidr[1], "eth0", None),
            (cluster.flannel.network, cidr[1], "eth0", None),
            (cidr, None, "eth0", pod.address),
        }
        assert found == wanted, f"{pod.name}: {found}"


@check("POD-06")
def test_longest_prefix_wins_in_the_pod(cluster: Cluster, facts: Facts) -> None:
    """A remote pod by the Network's route, a local one on the link, the outside by default. Source: S0, S1, S3."""
    outside = cluster.lab.spec.outside.ip
    for pod in cluster.pods.values():
        cidr = cluster.pod_cidr(pod.node.name)
        remote = next(iter(facts.peers(pod.node.name).values()))[2]
        local = cidr[-2] if pod.address != cidr[-2] else cidr[-3]
        routes = route_get(pod, remote, local, outside)
        found = [(route.dst, route.gateway) if route else None for route in routes]
        wanted = [(cluster.flannel.network, cidr[1]), (cidr, None), (EVERYWHERE, cidr[1])]
        assert found == wanted, f"{pod.name}: {found}"


@check("POD-08")
def test_own_subnet_beats_wider_routes_on_the_node(cluster: Cluster, facts: Facts) -> None:
    """The podCIDR's kernel route by the bridge is there, and wins for every local pod. Source: S0 to S4."""
    for pod in cluster.pods.values():
        node, cidr = pod.node.name, cluster.pod_cidr(pod.node.name)
        own = facts.node(node).routes_to(cidr)
        assert len(own) == 1, f"{node}: {len(own)} routes to {cidr}"
        found = (own[0].dev, own[0].protocol, own[0].scope, own[0].prefsrc)
        assert found == (cluster.flannel.bridge, "kernel", "link", cidr[1]), f"{node}: {found}"
        (winner,) = route_get(pod.node, pod.address)
        assert winner, f"{node} has no route to {pod.name}"
        assert (winner.dst, winner.dev) == (cidr, cluster.flannel.bridge), f"{node}: {pod.name} by {winner}"


@check("POD-09")
def test_one_mtu_from_the_pod_to_the_bridge(cluster: Cluster, facts: Facts) -> None:
    """The pod's interface, its veth and the bridge have FLANNEL_MTU. Source: S1, S3."""
    for pod in cluster.pods.values():
        chain = facts.mtus(pod)
        assert chain == (facts.mtu(pod.node.name),) * 3, f"{pod.name}: bridge, veth and eth0 have {chain}"
