"""NAT: that the rules are kept, are where they belong, and go when they are not wanted."""

from __future__ import annotations

from itertools import takewhile

import pytest

from testbed.checks import check
from testbed.deadline import Deadline
from testbed.fixtures import Facts, Figures, Path, Paths
from testbed.flannelspec import IPTABLES_LEGACY, IPTABLES_NFT, NFTABLES
from testbed.labs.base import Node, Place
from testbed.nodes.deploy import Cluster
from testbed.nodes.otherwise import flanneld_as
from testbed.probes.capture import Window
from testbed.probes.flows import Nonce, ping
from testbed.probes.rules import read_nft_table, read_table, read_tables, rules_of_flannel, rules_put_back

CHAIN, FORWARD = "FLANNEL-POSTRTG", "FLANNEL-FWD"
TABLES = (("nat", "POSTROUTING", CHAIN), ("filter", "FORWARD", FORWARD))
ENDING = frozenset({"ACCEPT", "DROP", "REJECT", "RETURN", "MASQUERADE", "SNAT"})
"""Targets behind which a packet comes to no further rule of the chain."""
HEALED_SECONDS = 8.0
"""flanneld looks every 5 s where nothing tells it of a change; the rest is a busy machine's."""
SETTLED_SECONDS = 20.0
"""How long rules may take that flanneld makes anew behind a start."""


def need_masquerading(cluster: Cluster) -> None:
    """Skip where flanneld was told not to masquerade."""
    if not cluster.flannel.ip_masq:
        pytest.skip("flanneld runs without --ip-masq")


def ours(cluster: Cluster, node: Place, rules: str = "") -> tuple[str, ...]:
    """flannel's chains, rules and jumps on a node, by what it keeps them with, or by another tool."""
    return rules_of_flannel(node, rules or cluster.flannel.rules)


@check("NAT-12", disruptive=True)
def test_without_masquerading_pods_keep_their_addresses(
    path: Path, cluster: Cluster, facts: Facts, window: Window
) -> None:
    """By --ip-masq=false no rule of flannel's translates, and the pod's own address leaves the node. Source: src."""
    node = path.source_node
    before, nonce = ours(cluster, node), Nonce.new()
    with (
        rules_put_back(node, cluster.flannel.rules),
        flanneld_as(cluster, node.name, "--ip-masq=false", meanwhile=lambda machine: clear(cluster, machine)),
    ):
        left = [rule for rule in ours(cluster, node) if CHAIN in rule or "postrtg" in rule]
        assert not left, f"{node.name}: {left}"
        ping(path.source, path.address, nonce=nonce, count=2, wait=1)
        seen = window.packets(path.source_nic, nonce, at_least=2)
        assert [p.ip.src for p in seen if p.ip] == [path.source.address] * 2, f"{path.source_nic}: {seen}"
    facts.eventually(lambda: restored(cluster, node, before), seconds=SETTLED_SECONDS)


def clear(cluster: Cluster, node: Place) -> None:
    """Take all rules of flannel's away, as on a node where it has never run."""
    rules = cluster.flannel.rules
    if rules == NFTABLES:
        node.run(["nft", "delete", "table", "ip", "flannel-ipv4"])
        return
    for table, parent, chain in TABLES:
        for rule in read_table(node, rules, table).chain(parent):
            if rule.target == chain:
                comment = ["-m", "comment", "--comment", f"flanneld {'masq' if table == 'nat' else 'forward'}"]
                node.run([rules, "-t", table, "-D", parent, *comment, "-j", chain])
        node.run([rules, "-t", table, "-F", chain])
        node.run([rules, "-t", table, "-X", chain])


def restored(cluster: Cluster, node: Place, before: tuple[str, ...]) -> None:
    """Assert that flannel's rules are as they were."""
    found = ours(cluster, node)
    assert found == before, f"{node.name}: {found}"


@check("NAT-13")
def test_nothing_keeps_packets_from_flannel_s_rules(cluster: Cluster) -> None:
    """The built-in chain accepts what no rule is about, and no rule before flannel's jump ends it. Source: src."""
    need_masquerading(cluster)
    for node in cluster.members:
        if cluster.flannel.rules == NFTABLES:
            head = read_nft_table(node, "ip", "flannel-ipv4")["postrtg"].head
            assert head.endswith("policy accept;"), f"{node.name}: {head}"
        flavour = cluster.flannel.rules if cluster.flannel.rules != NFTABLES else IPTABLES_NFT
        table = read_table(node, flavour, "nat")
        policy = table.policies.get("POSTROUTING", "ACCEPT")
        assert policy == "ACCEPT", f"{node.name}: the policy of nat's POSTROUTING is {policy}"
        before = takewhile(lambda rule: rule.target != CHAIN, table.chain("POSTROUTING"))
        foreign = [rule.spec for rule in before if rule.target in ENDING]
        assert not foreign, f"{node.name}: these come before flannel's: {foreign}"


@check("NAT-14", disruptive=True)
def test_removed_rules_come_back(paths: Paths, cluster: Cluster, facts: Facts, figures: Figures) -> None:
    """A flushed chain and a deleted jump within 6 s, and repairs elsewhere reset no counters. Source: src, S4."""
    need_masquerading(cluster)
    path, rules = paths.take("OUT"), cluster.flannel.rules
    node = path.source_node
    before = ours(cluster, node)
    flush = ["nft", "flush", "chain", "ip", "flannel-ipv4", "postrtg"]
    damages = {"a flushed chain": flush if rules == NFTABLES else [rules, "-t", "nat", "-F", CHAIN]}
    if rules != NFTABLES:
        damages["a deleted jump"] = [rules, "-t", "nat", "-D", "POSTROUTING", *comment("masq"), "-j", CHAIN]
    with rules_put_back(node, rules):
        for damage, argv in damages.items():
            node.run(argv)
            deadline = Deadline(HEALED_SECONDS)
            facts.eventually(lambda: restored(cluster, node, before), seconds=HEALED_SECONDS)
            figures.add(f"{damage} is as it was", deadline.elapsed, "s", HEALED_SECONDS)
        answer = ping(path.source, path.address)
        assert answer.lost == 0, answer.output
        if rules != NFTABLES:  # whose rules have no counters
            counters_stay(cluster, node, facts, before)


def counters_stay(cluster: Cluster, node: Node, facts: Facts, before: tuple[str, ...]) -> None:
    """Damage another table, and see that the repair leaves this one's counters."""
    counted = masqueraded(cluster, node)
    assert counted, f"{node.name}: the rule for what leaves the Network counted nothing"
    node.run([cluster.flannel.rules, "-D", "FORWARD", *comment("forward"), "-j", FORWARD])
    facts.eventually(lambda: restored(cluster, node, before), seconds=HEALED_SECONDS)
    now = masqueraded(cluster, node)
    assert now >= counted, f"{node.name}: the counter went from {counted} to {now}"


def comment(what: str) -> list[str]:
    """The comment of flannel's rules, as words of iptables."""
    return ["-m", "comment", "--comment", f"flanneld {what}"]


def masqueraded(cluster: Cluster, node: Node) -> int:
    """How many packets the rule for what leaves the Network has counted."""
    start, rules = f"-s {cluster.flannel.network} ! -d ", read_table(node, cluster.flannel.rules, "nat").chain(CHAIN)
    return sum(rule.packets for rule in rules if rule.spec.startswith(start))


@check("NAT-15", disruptive=True)
def test_pods_are_reached_where_forwarding_is_forbidden_otherwise(paths: Paths, cluster: Cluster) -> None:
    """Under a FORWARD policy of DROP flannel's own rules let pods' packets through, both ways. Source: #799, src."""
    rules = cluster.flannel.rules
    if rules == NFTABLES:
        pytest.skip("what one table of nftables accepts another table's policy can still drop")
    if not cluster.flannel.flags.boolean("iptables-forward-rules", default=True):
        pytest.skip("flanneld runs with --iptables-forward-rules=false")
    taken = [paths.take(kind) for kind in ("SN", "SS", "XS", "OUT") if not paths.specs[kind].reason]
    try:
        for node in cluster.members:
            node.run([rules, "-P", "FORWARD", "DROP"])
        for path in taken:
            answer = ping(path.source, path.address, count=2)
            assert answer.lost == 0, f"{path.kind}: {answer.output}"
    finally:
        for node in cluster.members:
            node.run([rules, "-P", "FORWARD", "ACCEPT"])


@check("NAT-16")
def test_one_tool_has_all_rules(cluster: Cluster) -> None:
    """Neither flannel nor a policy is in the rules of a tool that is not the node's. Source: #1306, #1317, #1159."""
    for node in cluster.members:
        assert ours(cluster, node), f"{node.name} has no rule of flannel's in {cluster.flannel.rules}"
        for rules in (IPTABLES_NFT, IPTABLES_LEGACY, NFTABLES):
            if rules == cluster.flannel.rules:
                continue
            found = ours(cluster, node, rules)
            assert not found, f"{node.name}: {rules} has {found}"
            if rules != NFTABLES and cluster.flannel.rules != NFTABLES:
                tables = read_tables(node, rules).values()
                policies = {(t.name, c, p) for t in tables for c, p in t.policies.items() if p not in ("ACCEPT", "-")}
                assert not policies, f"{node.name}: {rules} has policies {policies}"


@check("NAT-19", disruptive=True)
def test_another_way_to_keep_rules_leaves_nothing_of_this_one(paths: Paths, cluster: Cluster, facts: Facts) -> None:
    """A change between iptables and nftables: not a chain, rule or jump of the former is left. Source: src."""
    node, rules = paths.remote().source_node, cluster.flannel.rules
    before = ours(cluster, node)
    nft = rules == NFTABLES
    other = IPTABLES_NFT if nft else NFTABLES
    with (
        rules_put_back(node, IPTABLES_NFT if nft else rules),
        flanneld_as(cluster, node.name, net_conf={**cluster.flannel.net_conf, "EnableNFTables": not nft}),
    ):
        there = ours(cluster, node, other)
        assert there, f"{node.name}: nothing in {other}"
        left = ours(cluster, node)
        assert not left, f"{node.name}: this is left in {rules}: {left}"
    facts.eventually(lambda: restored(cluster, node, before), seconds=SETTLED_SECONDS)
    left = ours(cluster, node, other)
    assert not left, f"{node.name}: this is left in {other}: {left}"
