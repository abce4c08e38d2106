"""DR: DirectRouting, where peers of the node's own subnet are reached without a tunnel."""

from __future__ import annotations

from testbed.checks import check
from testbed.fixtures import Facts, Path, Paths
from testbed.nodes.deploy import Cluster
from testbed.probes.capture import Window
from testbed.probes.flows import Nonce, ping


@check("DR-01")
def test_peers_of_the_subnet_have_plain_routes(cluster: Cluster, facts: Facts) -> None:
    """Same-subnet peers by their own address and the underlay, others through the tunnel. Source: S0, S4."""

    def look() -> None:
        for node in cluster.members:
            state = facts.node(node.name)
            for peer, cidr in facts.peers(node.name).items():
                routes = state.routes_to(cidr)
                assert len(routes) == 1, f"{node.name} has {len(routes)} routes to {peer}'s {cidr}"
                found = (routes[0].gateway, routes[0].dev)
                wanted = (cluster.lab.spec.node(peer).ip, node.spec.underlay.name)
                if facts.tunnelled(node.name, peer):
                    by = cidr[0] if cluster.flannel.backend.type == "vxlan" else wanted[0]
                    wanted = (by, str(cluster.flannel.tunnel_device))
                assert found == wanted, f"{node.name}: {peer}'s {cidr} by {found}"

    facts.eventually(look)


@check("DR-02", direct=True)
def test_direct_packets_are_plain(path: Path, window: Window) -> None:
    """Between nodes of one subnet the pods' packets go as they are, from NIC to NIC. Source: S0."""
    nonce = Nonce.new()
    answer = ping(path.source, path.address, nonce=nonce, count=2)
    assert answer.lost == 0, answer.output
    seen = window.packets(path.source_nic, nonce, at_least=4)
    here, there = path.source_node.spec.underlay.mac, path.target_node.spec.underlay.mac
    pods = (path.source.address, path.address)
    found = [(p.ether.src, p.ether.dst, p.ip.src, p.ip.dst, bool(p.icmp)) for p in seen if p.ether and p.ip]
    assert found == [(here, there, *pods, True), (there, here, *reversed(pods), True)] * 2


@check("DR-05")
def test_one_pod_reaches_peers_of_both_sorts(paths: Paths, window: Window) -> None:
    """In one run, plain to the same subnet and encapsulated to another. Source: S0, S4."""
    for kind, encapsulated in (("SS", False), ("XS", True)):
        path, nonce = paths.take(kind), Nonce.new()
        answer = ping(path.source, path.address, nonce=nonce, count=2)
        assert answer.lost == 0, answer.output
        seen = window.packets(path.source_nic, nonce, at_least=4)
        assert [p.encapsulated for p in seen] == [encapsulated] * 4, f"{kind}: {seen}"
