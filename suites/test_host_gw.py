"""HGW: host-gw, which routes by the peers' own addresses and has no device."""

from __future__ import annotations

from ipaddress import IPv4Network

import pytest

from testbed.checks import check
from testbed.fixtures import Facts, Path, Paths
from testbed.labs.base import Node
from testbed.nodes.deploy import Cluster
from testbed.probes.capture import Window
from testbed.probes.flows import Nonce, ping
from testbed.probes.iproute import route_get

STARTED = "CLI flags config"
"""What every flanneld logs first."""


@check("HGW-01")
def test_there_is_no_tunnel(paths: Paths, cluster: Cluster, facts: Facts, window: Window) -> None:
    """No device of flannel's, and nothing but the pods' own packets on the wire. Source: S2."""
    for node in cluster.members:
        devices = [link.name for link in facts.node(node.name).links if link.name.startswith("flannel")]
        assert not devices, f"{node.name} has {devices}"
    path, nonce = paths.take("SS"), Nonce.new()
    ping(path.source, path.address, nonce=nonce, count=2)
    seen = window.packets(path.source_nic, nonce, at_least=4)
    assert len(seen) == 4, f"{len(seen)} packets on the wire for 2 pings"
    assert all(p.icmp for p in seen), f"something else than ICMP carries the ping: {seen}"


@check("HGW-02")
def test_one_route_by_each_peer_s_address(cluster: Cluster, facts: Facts) -> None:
    """Each peer of the subnet by its address and the underlay, and no others. Source: S2."""

    def look() -> None:
        for node in cluster.members:
            subnets = {r.dst: r for r in facts.node(node.name).routes if r.dst.subnet_of(cluster.flannel.network)}
            subnets.pop(cluster.pod_cidr(node.name), None)
            found = {dst: (r.gateway, r.dev) for dst, r in subnets.items() if r.type == "unicast"}
            peers = facts.direct_peers(node.name).items()
            wanted = {cidr: (cluster.lab.spec.node(peer).ip, node.spec.underlay.name) for peer, cidr in peers}
            assert found == wanted, f"{node.name}: {found}"

    facts.eventually(look)


@check("HGW-03")
def test_packets_go_in_clear(path: Path, facts: Facts, window: Window) -> None:
    """Pod addresses between the NICs, two hops to the receiver, the underlay's whole MTU. Source: S0, S2."""
    source, target = path.pods
    nonce = Nonce.new()
    answer = ping(source, target.address, nonce=nonce, count=2)
    assert answer.lost == 0, answer.output
    here, there = path.source_node.spec.underlay, path.target_node.spec.underlay
    seen = window.packets(path.source_nic, nonce, at_least=4)
    found = [(p.ether.src, p.ether.dst, p.ip.src, p.ip.dst) for p in seen if p.ether and p.ip]
    there_and_back = [(here.mac, there.mac, source.address, target.address)]
    there_and_back += [(there.mac, here.mac, target.address, source.address)]
    assert found == there_and_back * 2
    got = window.packets(f"{target.name}:eth0", nonce, at_least=4)
    assert {p.ip.ttl for p in got if p.ip and p.ip.src == source.address} == {62}
    assert facts.mtu(path.source_node.name) == here.mtu
    assert facts.cluster.subnet_env(path.source_node.name)["FLANNEL_MTU"] == str(here.mtu)


@check("HGW-04")
def test_a_peer_beyond_a_router_is_refused_loudly(cluster: Cluster, facts: Facts) -> None:
    """No route to a peer that is on no link of the node, and a line in the log that says so. Source: S0, S2, S4."""
    spec = cluster.lab.spec
    pairs = [
        (node, peer, cidr)
        for node in cluster.members
        for peer, cidr in facts.peers(node.name).items()
        if not spec.same_subnet(node.name, peer)
    ]
    if not pairs:
        pytest.skip(f"{spec.topology} has no two nodes in different subnets")
    for node, peer, cidr in pairs:
        assert not facts.node(node.name).routes_to(cidr), f"{node.name} has a route to {peer}'s {cidr}"
        (winner,) = route_get(node, cidr[1])
        assert winner is None or not winner.dst.subnet_of(cluster.flannel.network), f"{node.name}: {winner}"
        facts.eventually(lambda node=node, peer=peer, cidr=cidr: tells(cluster, node, peer, cidr))  # type: ignore[misc]


def tells(cluster: Cluster, node: Node, peer: str, cidr: IPv4Network) -> None:
    """The flanneld that runs has to have logged a line about that peer."""
    log = cluster.flanneld_log(node.name, 1000).rpartition(STARTED)[2]
    address = str(cluster.lab.spec.node(peer).ip)
    told = [line for line in log.splitlines() if str(cidr[0]) in line or address in line]
    assert told, f"{node.name}: the log has no word about {peer}'s {cidr}"
