"""NEG: what must not be there, though texts about flannel say so."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

from testbed.checks import check
from testbed.fixtures import Facts
from testbed.nodes.deploy import Cluster
from testbed.probes.iproute import State

OF_CALICO = IPv4Address("169.254.1.1")
EVERYWHERE = IPv4Network((0, 0))
MISTYPED = IPv4Network("10.224.0.0/16")


def of_calico(state: State) -> list[str]:
    """Interfaces and routes as Calico makes them."""
    links = [link.name for link in state.links if link.name.startswith(("cali", "tunl", "vxlan.calico"))]
    routes = [f"a route by {gateway}" for route in state.routes for gateway, _ in route.hops if gateway == OF_CALICO]
    return [name for name in links if name != "tunl0"] + routes


@check("NEG-01")
def test_nothing_of_calico_is_there(cluster: Cluster, facts: Facts) -> None:
    """A pod's default route is by its node's bridge; no `cali` interface, no 169.254.1.1. Source: S1's errors."""
    facts.forget()
    for pod in cluster.pods.values():
        defaults = [route.gateway for route in facts.pod(pod).routes_to(EVERYWHERE)]
        assert defaults == [cluster.pod_cidr(pod.node.name)[1]], f"{pod.name} goes by {defaults}"
        assert not of_calico(facts.pod(pod)), f"{pod.name} has {of_calico(facts.pod(pod))}"
    for node in cluster.members:
        assert not of_calico(facts.node(node.name)), f"{node.name} has {of_calico(facts.node(node.name))}"


@check("NEG-02")
def test_every_address_is_of_the_network(cluster: Cluster, facts: Facts) -> None:
    """Networks are written by their base address, nodes get none but the Network's subnets. Source: S2's errors."""
    flannel = cluster.flannel
    facts.forget()
    for node in cluster.members:
        text = cluster.subnet_env(node.name)["FLANNEL_NETWORK"]
        assert text == str(flannel.network), f"{node.name}: FLANNEL_NETWORK={text} is not {flannel.network}"
        typos = [route.dst for route in facts.node(node.name).routes if route.dst.subnet_of(MISTYPED)]
        assert not typos or flannel.network.overlaps(MISTYPED), f"{node.name} has routes to {typos}"
    for pod in cluster.pods.values():
        assert pod.address in flannel.network, f"{pod.name}: {pod.address} is not of {flannel.network}"
    for name, lease in cluster.leases().items():
        subnet = lease["key"].rpartition("/")[2].partition("&")[0].replace("-", "/")
        assert IPv4Network(subnet).subnet_of(flannel.network), f"{name}'s lease is {subnet}"
