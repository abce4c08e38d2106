"""NAT: flannel's masquerade rules, by their text and by what they do to packets."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest

from testbed.checks import check
from testbed.fixtures import Facts, Path, Paths
from testbed.labs.base import Node
from testbed.nodes.deploy import Cluster
from testbed.probes.capture import Window
from testbed.probes.conntrack import Connection, read_connections
from testbed.probes.detour import detour
from testbed.probes.flows import Nonce, http_get, ping
from testbed.probes.rules import Rule, read_table

CHAIN = "FLANNEL-POSTRTG"
COMMENT = ' -m comment --comment "flanneld masq"'


def need_masquerading(cluster: Cluster) -> None:
    """Skip where flanneld was told not to masquerade."""
    if not cluster.flannel.ip_masq:
        pytest.skip("flanneld runs without --ip-masq")


def chain(cluster: Cluster, node: Node, name: str) -> tuple[Rule, ...]:
    """The rules of a chain of table nat."""
    return read_table(node, cluster.flannel.rules, "nat").chain(name)


@check("NAT-01")
def test_rules_are_flannel_s_in_flannel_s_order(cluster: Cluster) -> None:
    """One jump, and the six rules in the order that they depend on. Source: S4, #1702, k3s#7096."""
    need_masquerading(cluster)
    network = cluster.flannel.network
    random = "" if cluster.flannel.flags.boolean("ip-masq-fully-random-disable", default=False) else " --random-fully"
    for node in cluster.members:
        cidr = cluster.pod_cidr(node.name)
        wanted = [
            "-m mark --mark 0x4000/0x4000 -j RETURN",
            f"-s {cidr} -d {network} -j RETURN",
            f"-s {network} -d {cidr} -j RETURN",
            f"! -s {network} -d {cidr} -j RETURN",
            f"-s {network} ! -d 224.0.0.0/4 -j MASQUERADE{random}",
            f"! -s {network} -d {network} -j MASQUERADE{random}",
        ]
        found = [rule.spec.replace(COMMENT, "") for rule in chain(cluster, node, CHAIN)]
        assert found == wanted, f"{node.name}: {found}"
        jumps = [rule for rule in chain(cluster, node, "POSTROUTING") if rule.target == CHAIN]
        assert len(jumps) == 1, f"{node.name}: {len(jumps)} jumps to {CHAIN}"


def connections(node: Node, protocol: str, source: IPv4Address, target: IPv4Address) -> list[Connection]:
    """What a node tracks from one address to another."""
    found = read_connections(node)
    return [c for c in found if (c.protocol, c.original.src, c.original.dst) == (protocol, source, target)]


@check("NAT-03")
def test_pods_see_each_other_s_addresses(path: Path) -> None:
    """Pod to remote pod keeps its source: both directions tracked are mirrors. Source: S0, S4."""
    source, target = path.pods
    answer = http_get(source, target.address)
    assert not answer.error, answer.error
    assert (answer.pod, answer.peer) == (target.pod_name, source.address), f"{answer.facts}"
    tracked = connections(path.source_node, "tcp", source.address, target.address)
    mine = [c for c in tracked if c.original.sport == answer.sport]
    assert len(mine) == 1, f"{len(mine)} connections tracked on {path.source_node.name}"
    assert not mine[0].translated, f"{mine[0]}"


def masquerade_rule(cluster: Cluster, node: Node) -> Rule:
    """The rule for what leaves the Network."""
    start = f"-s {cluster.flannel.network} ! -d "
    found = [rule for rule in chain(cluster, node, CHAIN) if rule.spec.startswith(start)]
    assert len(found) == 1, f"{node.name}: {len(found)} rules masquerade what leaves the Network"
    return found[0]


@check("NAT-06")
def test_packets_to_the_outside_have_the_node_s_address(path: Path, cluster: Cluster, window: Window) -> None:
    """The answer goes to the node, and the rule counts flows, not packets. Source: S0, S4."""
    need_masquerading(cluster)
    node, nonce = path.source_node, Nonce.new()
    before = masquerade_rule(cluster, node).packets
    for flow, count in enumerate((3, 1), 1):
        answer = ping(path.source, path.address, nonce=nonce, count=count)
        assert answer.lost == 0, answer.output
        added = masquerade_rule(cluster, node).packets - before
        assert added == flow, f"the rule counted {added} packets for {flow} flows"
    ids = {p.icmp.id for p in window.packets(f"{path.source.name}:eth0", nonce, at_least=8) if p.icmp}
    tracked = [c for c in connections(node, "icmp", path.source.address, path.address) if c.original.id in ids]
    assert len(tracked) == len(ids) == 2, f"{len(tracked)} connections tracked for {len(ids)} flows"
    assert {c.reply.dst for c in tracked} == {node.spec.ip}, f"{tracked}"
    seen = window.packets(path.source_nic, nonce, at_least=8)
    assert {frozenset({p.ip.src, p.ip.dst}) for p in seen if p.ip} == {frozenset({node.spec.ip, path.address})}


@check("NAT-07")
def test_packets_to_another_node_have_the_node_s_address(path: Path, cluster: Cluster, window: Window) -> None:
    """A node sees another node's pods by that node's address. Source: S4."""
    need_masquerading(cluster)
    nonce = Nonce.new()
    answer = ping(path.source, path.address, nonce=nonce, count=2)
    assert answer.lost == 0, answer.output
    seen = window.packets(path.target_nic, nonce, at_least=4)
    requests = [p for p in seen if p.icmp and p.icmp.type == 8]
    assert [p.ip.src for p in requests if p.ip] == [path.source_node.spec.ip] * 2


@check("NAT-10")
def test_outside_packets_for_another_node_s_pod_are_masqueraded(
    paths: Paths, cluster: Cluster, facts: Facts, window: Window
) -> None:
    """The pod answers by the node that they came through, not past it. Source: S4."""
    need_masquerading(cluster)
    path, nonce = paths.remote(), Nonce.new()
    entry, (_, pod) = path.source_node, path.pods
    outside = cluster.lab.node(cluster.lab.spec.outside.name)
    with detour(cluster.lab, cluster.pod_cidr(pod.node.name), entry.name):
        answer = ping(outside, pod.address, nonce=nonce, count=2)
        assert answer.lost == 0, answer.output
        reply = http_get(outside, pod.address)
    wanted = facts.node_source(entry.name, pod.node.name)
    assert not reply.error, reply.error
    assert (reply.pod, reply.peer) == (pod.pod_name, wanted), f"{reply.facts}, not from {wanted}"
    seen = window.select(f"{pod.name}:eth0", nonce, lambda p: bool(p.icmp and p.icmp.type == 8), at_least=2)
    assert [p.ip.src for p in seen if p.ip] == [wanted] * 2
