"""NAT: flannel's masquerade rules, by their text and by what they do to packets."""

from __future__ import annotations

import pytest

from testbed.checks import check
from testbed.fixtures import Facts, Path, Paths
from testbed.flannelspec import NFTABLES
from testbed.labs.base import Node
from testbed.nodes.deploy import Cluster
from testbed.probes.capture import Window
from testbed.probes.conntrack import connections_between
from testbed.probes.detour import detour
from testbed.probes.flows import Nonce, http_get, ping
from testbed.probes.rules import Rule, read_nft_table, read_table

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
    """One jump, or one hook, and the six rules in the order that they depend on. Source: S4, #1702, k3s#7096."""
    need_masquerading(cluster)
    for node in cluster.members:
        if cluster.flannel.rules == NFTABLES:
            table = read_nft_table(node, "ip", "flannel-ipv4")
            found = list(table["postrtg"].rules) if "postrtg" in table else []
            assert found == nft_rules(cluster, node), f"{node.name}: {found}"
            assert table["postrtg"].head == "type nat hook postrouting priority srcnat; policy accept;", node.name
            continue
        found = [rule.spec.replace(COMMENT, "") for rule in chain(cluster, node, CHAIN)]
        assert found == iptables_rules(cluster, node), f"{node.name}: {found}"
        jumps = [rule for rule in chain(cluster, node, "POSTROUTING") if rule.target == CHAIN]
        assert len(jumps) == 1, f"{node.name}: {len(jumps)} jumps to {CHAIN}"


def iptables_rules(cluster: Cluster, node: Node) -> list[str]:
    """The rules as `iptables -S` prints them, without chain and comment."""
    network, cidr = cluster.flannel.network, cluster.pod_cidr(node.name)
    random = " --random-fully" if randomly(cluster) else ""
    return [
        "-m mark --mark 0x4000/0x4000 -j RETURN",
        f"-s {cidr} -d {network} -j RETURN",
        f"-s {network} -d {cidr} -j RETURN",
        f"! -s {network} -d {cidr} -j RETURN",
        f"-s {network} ! -d 224.0.0.0/4 -j MASQUERADE{random}",
        f"! -s {network} -d {network} -j MASQUERADE{random}",
    ]


def nft_rules(cluster: Cluster, node: Node) -> list[str]:
    """The same rules as `nft list` prints them."""
    network, cidr = cluster.flannel.network, cluster.pod_cidr(node.name)
    random = " fully-random" if randomly(cluster) else ""
    return [
        "meta mark & 0x00004000 == 0x00004000 return",
        f"ip saddr {cidr} ip daddr {network} return",
        f"ip saddr {network} ip daddr {cidr} return",
        f"ip saddr != {network} ip daddr {cidr} return",
        f"ip saddr {network} ip daddr != 224.0.0.0/4 masquerade{random}",
        f"ip saddr != {network} ip daddr {network} masquerade{random}",
    ]


def randomly(cluster: Cluster) -> bool:
    """Whether ports are to be mapped at random."""
    return not cluster.flannel.flags.boolean("ip-masq-fully-random-disable", default=False)


@check("NAT-18", rules=NFTABLES)
def test_nftables_has_flannel_s_tables_and_nothing_else_does(cluster: Cluster) -> None:
    """The table by its name with its two chains, and no rule of flannel's in iptables. Source: src."""
    network = cluster.flannel.network
    for node in cluster.members:
        table = read_nft_table(node, "ip", "flannel-ipv4")
        wanted = {"forward", *(["postrtg"] if cluster.flannel.ip_masq else [])}
        assert set(table) == wanted, f"{node.name}: {sorted(table)}"
        assert table["forward"].rules == (f"ip saddr {network} accept", f"ip daddr {network} accept"), node.name
        for flavour in ("iptables-nft", "iptables-legacy"):
            ours = [rule for rule in read_table(node, flavour, "nat").rules if "flanneld" in rule.spec]
            assert not ours, f"{node.name}: {flavour} has {ours}"


@check("NAT-03")
def test_pods_see_each_other_s_addresses(path: Path) -> None:
    """Pod to remote pod keeps its source: both directions tracked are mirrors. Source: S0, S4."""
    source, target = path.pods
    answer = http_get(source, target.address)
    assert not answer.error, answer.error
    assert (answer.pod, answer.peer) == (target.pod_name, source.address), f"{answer.facts}"
    tracked = connections_between(path.source_node, "tcp", source.address, target.address)
    mine = [c for c in tracked if c.original.sport == answer.sport]
    assert len(mine) == 1, f"{len(mine)} connections tracked on {path.source_node.name}"
    assert not mine[0].translated, f"{mine[0]}"


def masqueraded(cluster: Cluster, node: Node) -> int | None:
    """How many packets the rule for what leaves the Network has counted; None where rules have no counters."""
    if cluster.flannel.rules == NFTABLES:
        return None
    start = f"-s {cluster.flannel.network} ! -d "
    found = [rule for rule in chain(cluster, node, CHAIN) if rule.spec.startswith(start)]
    assert len(found) == 1, f"{node.name}: {len(found)} rules masquerade what leaves the Network"
    return found[0].packets


@check("NAT-06")
def test_packets_to_the_outside_have_the_node_s_address(path: Path, cluster: Cluster, window: Window) -> None:
    """The answer goes to the node, and the rule counts flows, not packets. Source: S0, S4."""
    need_masquerading(cluster)
    node, nonce = path.source_node, Nonce.new()
    before = masqueraded(cluster, node)
    for flow, count in enumerate((3, 1), 1):
        answer = ping(path.source, path.address, nonce=nonce, count=count)
        assert answer.lost == 0, answer.output
        after = masqueraded(cluster, node)
        if before is not None and after is not None:
            assert after - before == flow, f"the rule counted {after - before} packets for {flow} flows"
    ids = {p.icmp.id for p in window.packets(f"{path.source.name}:eth0", nonce, at_least=8) if p.icmp}
    tracked = [c for c in connections_between(node, "icmp", path.source.address, path.address) if c.original.id in ids]
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
