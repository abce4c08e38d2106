"""NEG: what must not be there, though texts about flannel say so."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

from testbed.checks import check
from testbed.fixtures import Facts, Path, Paths
from testbed.nodes.byhand import without_flanneld
from testbed.nodes.deploy import Cluster
from testbed.probes.capture import Window
from testbed.probes.flows import ICMP_HEADERS, Nonce, http_get, ping, udp_flows
from testbed.probes.iproute import State, read_state

OF_CALICO = IPv4Address("169.254.1.1")
EVERYWHERE = IPv4Network((0, 0))
MISTYPED = IPv4Network("10.224.0.0/16")
FLOWS = 16


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


@check("NEG-04")
def test_fabric_is_what_host_gw_needs(path: Path, paths: Paths, cluster: Cluster, facts: Facts, window: Window) -> None:
    """Nodes that are reached directly are on one link, which lets pods' addresses pass; no others. Source: S2, S4."""
    assert paths.specs["XS"].reason, "pods are looked for beyond the nodes' own link, where host-gw reaches none"
    for node in cluster.members:
        for peer in facts.direct_peers(node.name):
            other = cluster.lab.spec.node(peer)
            ping(node, other.ip)
            seen = [one.mac for one in read_state(node).neighbours if one.address == other.ip and one.mac]
            assert seen == [other.underlay.mac], f"{node.name} and {peer} are on no common link: {seen} answers"
    nonce = Nonce.new()
    ping(path.source, path.address, nonce=nonce)
    arrived = window.select(path.target_nic, nonce, lambda p: bool(p.ip and p.ip.src == path.source.address))
    assert arrived, f"the fabric lets nothing from {path.source.address} pass to {path.target_node.name}"


@check("NEG-06", disruptive=True)
def test_packets_need_no_flanneld(path: Path, cluster: Cluster, facts: Facts) -> None:
    """What `ip` and `bridge` alone make carries them, while neither node has a flanneld. Source: S4."""
    nodes = path.source_node, path.target_node
    with without_flanneld(cluster, facts, nodes):
        running = [node.name for node in nodes if cluster.flanneld_pid(node.name) is not None]
        assert not running, f"flanneld runs on {running}"
        answer = http_get(path.source, path.address)
        assert not answer.error, f"{path.address} by what was made by hand: {answer.error}"
        assert answer.facts.get("node") == path.target_node.name, answer.facts
        assert answer.peer == path.source.address, f"{path.source.name} is seen as {answer.peer}"
        size = facts.mtu(path.source_node.name) - ICMP_HEADERS
        for source, target in (path.pods, path.pods[::-1]):
            full = ping(source, target.address, count=2, size=size, dont_fragment=True)
            assert (full.lost, full.ttls) == (0, (62, 62)), full.output
        flows = udp_flows(path.source, path.address, count=FLOWS, nonce=Nonce.new())
        assert all(flow.reply for flow in flows), f"{sum(not flow.reply for flow in flows)} of {FLOWS} had no answer"
