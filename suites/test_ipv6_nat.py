"""V6: flannel's masquerade rules for IPv6, by their text and by what they do to packets."""

from __future__ import annotations

import pytest

from testbed.checks import check
from testbed.fixtures import Path, Paths
from testbed.fixtures6 import Facts6, address6, ends6
from testbed.flannelspec import NFTABLES
from testbed.labs.base import Node
from testbed.nodes.deploy import Cluster
from testbed.probes.capture import Window
from testbed.probes.conntrack import connections_between
from testbed.probes.detour import detour
from testbed.probes.flows import Nonce, http_get, ping
from testbed.probes.rules import read_nft_table, read_table

CHAIN = "FLANNEL-POSTRTG"
COMMENT = ' -m comment --comment "flanneld masq"'
ECHO_REQUEST = 128


def need_masquerading(cluster: Cluster) -> None:
    """Skip where flanneld was told not to masquerade."""
    if not cluster.flannel.ip_masq:
        pytest.skip("flanneld runs without --ip-masq")


def randomly(cluster: Cluster) -> bool:
    """Whether ports are to be mapped at random."""
    return not cluster.flannel.flags.boolean("ip-masq-fully-random-disable", default=False)


@check("V6-03")
def test_rules_mirror_those_of_ipv4(cluster: Cluster, facts6: Facts6) -> None:
    """One jump, or one hook, and the six rules in their order with the IPv6 Network and podCIDR. Source: src."""
    need_masquerading(cluster)
    for node in cluster.members:
        if cluster.flannel.rules == NFTABLES:
            table = read_nft_table(node, "ip6", "flannel-ipv6")
            found = list(table["postrtg"].rules) if "postrtg" in table else []
            assert found == nft_rules(cluster, facts6, node), f"{node.name}: {found}"
            assert table["postrtg"].head == "type nat hook postrouting priority srcnat; policy accept;", node.name
            continue
        nat = read_table(node, cluster.flannel.rules.replace("iptables", "ip6tables"), "nat")
        found = [rule.spec.replace(COMMENT, "") for rule in nat.chain(CHAIN)]
        assert found == iptables_rules(cluster, facts6, node), f"{node.name}: {found}"
        jumps = [rule for rule in nat.chain("POSTROUTING") if rule.target == CHAIN]
        assert len(jumps) == 1, f"{node.name}: {len(jumps)} jumps to {CHAIN}"


def iptables_rules(cluster: Cluster, facts6: Facts6, node: Node) -> list[str]:
    """The rules as `ip6tables -S` prints them, without chain and comment."""
    network, cidr = facts6.network, cluster.pod_cidr6(node.name)
    random = " --random-fully" if randomly(cluster) else ""
    return [
        "-m mark --mark 0x4000/0x4000 -j RETURN",
        f"-s {cidr} -d {network} -j RETURN",
        f"-s {network} -d {cidr} -j RETURN",
        f"! -s {network} -d {cidr} -j RETURN",
        f"-s {network} ! -d ff00::/8 -j MASQUERADE{random}",
        f"! -s {network} -d {network} -j MASQUERADE{random}",
    ]


def nft_rules(cluster: Cluster, facts6: Facts6, node: Node) -> list[str]:
    """The same rules as `nft list` prints them."""
    network, cidr = facts6.network, cluster.pod_cidr6(node.name)
    random = " fully-random" if randomly(cluster) else ""
    return [
        "meta mark & 0x00004000 == 0x00004000 return",
        f"ip6 saddr {cidr} ip6 daddr {network} return",
        f"ip6 saddr {network} ip6 daddr {cidr} return",
        f"ip6 saddr != {network} ip6 daddr {cidr} return",
        f"ip6 saddr {network} ip6 daddr != ff00::/8 masquerade{random}",
        f"ip6 saddr != {network} ip6 daddr {network} masquerade{random}",
    ]


@check("V6-13")
def test_pods_keep_their_addresses(path: Path) -> None:
    """Pod to remote pod is not translated: both directions tracked are mirrors. Source: src."""
    source, target = ends6(path)
    answer = http_get(path.source, target)
    assert not answer.error, answer.error
    assert answer.peer == source, f"{answer.facts}"
    mine = [c for c in connections_between(path.source_node, "tcp", source, target) if c.original.sport == answer.sport]
    assert len(mine) == 1, f"{len(mine)} connections tracked on {path.source_node.name}"
    assert not mine[0].translated, f"{mine[0]}"


@check("V6-14")
def test_packets_to_the_outside_and_to_nodes_have_the_node_s_address(
    path: Path, cluster: Cluster, facts6: Facts6, window: Window
) -> None:
    """Whoever is no pod sees the node's IPv6 address and answers to it. Source: src."""
    need_masquerading(cluster)
    nonce, node = Nonce.new(), path.source_node
    source, target = ends6(path)
    answer = ping(path.source, target, nonce=nonce, count=2)
    assert answer.lost == 0, answer.output
    tracked = connections_between(node, "icmpv6", source, target)
    ids = {p.icmp.id for p in window.packets(f"{path.source.name}:eth0", nonce, at_least=4) if p.icmp}
    assert {c.reply.dst for c in tracked if c.original.id in ids} == {facts6.ip(node.name)}, f"{tracked}"
    seen = window.packets(path.source_nic, nonce, at_least=4)
    found = [(p.ip6.src, p.ip6.dst) for p in seen if p.ip6]
    assert found == [(facts6.ip(node.name), target), (target, facts6.ip(node.name))] * 2, f"{found}"


@check("V6-15")
def test_outside_packets_for_another_node_s_pod_are_masqueraded(
    paths: Paths, cluster: Cluster, facts6: Facts6, window: Window
) -> None:
    """The pod answers by the node that they came through, not past it. Source: S4."""
    need_masquerading(cluster)
    path, nonce = paths.remote(), Nonce.new()
    entry, (_, pod) = path.source_node, path.pods
    outside = cluster.lab.node(cluster.lab.spec.outside.name)
    with detour(cluster.lab, cluster.pod_cidr6(pod.node.name), entry.name):
        answer = ping(outside, address6(pod), nonce=nonce, count=2)
        assert answer.lost == 0, answer.output
        reply = http_get(outside, address6(pod))
    wanted = facts6.node_source(entry.name, pod.node.name)
    assert not reply.error, reply.error
    assert (reply.pod, reply.peer) == (pod.pod_name, wanted), f"{reply.facts}, not from {wanted}"
    seen = window.select(f"{pod.name}:eth0", nonce, lambda p: bool(p.icmp and p.icmp.type == ECHO_REQUEST), at_least=2)
    assert [p.ip6.src for p in seen if p.ip6] == [wanted] * 2


@check("V6-16")
def test_nodes_reach_pods_by_ipv6(paths: Paths, cluster: Cluster, facts6: Facts6) -> None:
    """Their own from the bridge's address, others' from the tunnel's, or the node's without one. Source: S3, S4."""
    node = paths.remote().source_node
    reachable = {**facts6.tunnelled_peers(node.name), **facts6.direct_peers(node.name)}
    for pod in cluster.pods.values():
        if pod.node.name == node.name:
            wanted = cluster.pod_cidr6(node.name)[1]
        elif pod.node.name in reachable:
            wanted = facts6.node_source(node.name, pod.node.name)
        else:
            continue
        answer = http_get(node, address6(pod))
        assert not answer.error, f"{pod.name}: {answer.error}"
        found = (answer.pod, answer.facts.get("node"), answer.peer)
        assert found == (pod.pod_name, pod.node.name, wanted), f"{pod.name} says {answer.facts}, not from {wanted}"
