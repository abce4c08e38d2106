"""Rules by nftables: flannel-behaviour.md, section 5.2, with the meaning that section 5.1 gives them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import pytest

from flannel.rules.nftables import Seen, masquerade, read_echo, read_table, with_foreign
from tests.flannel.corelab import HEALS_WITHIN, Node, until

N, P = IPv4Network("10.244.0.0/16"), IPv4Network("10.244.1.0/24")
NFT = ("nft", "list", "ruleset")
POSTROUTING = """\
table ip flannel-ipv4 {
	comment "rules for flannel-ipv4"
	chain postrtg {
		comment "chain to manage traffic masquerading by flannel"
		type nat hook postrouting priority srcnat; policy accept;
		meta mark & 0x00004000 == 0x00004000 return
		ip saddr 10.244.1.0/24 ip daddr 10.244.0.0/16 return
		ip saddr 10.244.0.0/16 ip daddr 10.244.1.0/24 return
		ip saddr != 10.244.0.0/16 ip daddr 10.244.1.0/24 return
		ip saddr 10.244.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random
		ip saddr != 10.244.0.0/16 ip daddr 10.244.0.0/16 masquerade fully-random
	}
"""
FORWARD = """
	chain forward {
		comment "chain to accept flannel traffic"
		type filter hook forward priority filter; policy accept;
		ip saddr 10.244.0.0/16 accept
		ip daddr 10.244.0.0/16 accept
	}
"""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.close()


# -- text --------------------------------------------------------------------------------------------------------------


def test_a_listing_is_read_by_chain() -> None:
    text = POSTROUTING + FORWARD + "}\n"
    found = read_table(text)
    assert list(found) == ["postrtg", "forward"]
    accept = ("ip saddr 10.244.0.0/16 accept", "ip daddr 10.244.0.0/16 accept")
    assert found["forward"] == Seen("type filter hook forward priority filter; policy accept;", accept)
    assert len(found["postrtg"].rules) == 6
    assert read_table("") == {}


def test_what_nft_echoes_is_told_from_other_lines() -> None:
    text = (
        "add table ip flannel-ipv4\n"
        "add rule ip flannel-ipv4 postrtg meta mark & 0x00004000 == 0x00004000 return\n"
        "add rule ip flannel-ipv4 postrtg handle 3 ip saddr 10.244.1.0/24 return\n"
        "add rule ip flannel-ipv4 forward ip saddr 10.244.0.0/16 accept\n"
        "# new generation 2 by process 21889 (nft)\n"
    )
    assert read_echo(text, 4, "postrtg") == (
        "meta mark & 0x00004000 == 0x00004000 return",
        "ip saddr 10.244.1.0/24 return",
    )


def test_the_other_family_has_its_own_words() -> None:
    rules = masquerade(IPv6Network("fd00:10:244::/56"), IPv6Network("fd00:10:244:1::/64"), True).rules
    assert "ip6 saddr fd00:10:244::/56 ip6 daddr != ff00::/8 masquerade fully-random" in rules
    assert not any(" ip saddr" in f" {rule}" for rule in rules)


def test_foreign_rules_stay_behind_the_first() -> None:
    ours, other = masquerade(N, P, True).rules, "ip saddr 10.12.0.0/16 return"
    assert with_foreign(ours, ours) is None
    assert with_foreign(ours, (ours[0], other, *ours[1:])) is None
    assert with_foreign(ours, (other, *ours[:-1])) == (ours[0], other, *ours[1:])
    assert with_foreign(ours, tuple(reversed(ours))) == ours
    assert with_foreign(ours, (*ours, ours[2])) == ours
    assert with_foreign(ours, ()) == ours


# -- the kernel --------------------------------------------------------------------------------------------------------


def test_the_rules_are_the_kernel_s_and_come_back(node: Node) -> None:
    daemon = node.start("--ip-masq", nftables=True)
    whole = POSTROUTING + FORWARD + "}\n"
    assert node.run(*NFT) == whole
    for damage in (
        "flush ruleset",
        "delete table ip flannel-ipv4",
        "flush chain ip flannel-ipv4 postrtg",
        "add rule ip flannel-ipv4 forward ip saddr 10.244.0.0/16 accept",
        "chain ip flannel-ipv4 forward { policy drop; }",
        "delete chain ip flannel-ipv4 postrtg",
        "delete chain ip flannel-ipv4 forward ; "
        "add chain ip flannel-ipv4 forward { type filter hook output priority filter; }",
    ):
        node.run("nft", damage)
        until(lambda: node.run(*NFT) in (whole, swapped()), f"rules after {damage}\n{daemon.log}", HEALS_WITHIN)
    assert node.run("nft", "--version")
    assert daemon.stop() == 0
    assert node.run(*NFT) in (whole, swapped())


def swapped() -> str:
    """The table where the first chain was made again."""
    head, body = POSTROUTING.split("\tchain", 1)
    return head + FORWARD.lstrip("\n") + "\n\tchain" + body + "}\n"


def test_another_table_s_change_costs_no_look(node: Node) -> None:
    daemon = node.start("--ip-masq", nftables=True)
    node.run("nft", "add table ip other")
    node.run("nft", "add chain ip other one")
    node.run("nft", "add rule ip other one accept")
    node.run("nft", "flush chain ip flannel-ipv4 forward")
    until(lambda: "ip daddr 10.244.0.0/16 accept" in node.run(*NFT), "the rules", HEALS_WITHIN)
    until(lambda: "setting them again" in daemon.log, "its word of that")
    assert daemon.log.count("setting them again") == 1


def test_flags_decide_on_chains_and_randomness(node: Node) -> None:
    node.start("--ip-masq", nftables=True).stop()
    node.start("--ip-masq", "--ip-masq-fully-random-disable", nftables=True).stop()
    shown = node.run(*NFT)
    assert shown.count("masquerade\n") == 2
    assert "fully-random" not in shown
    node.start("--iptables-forward-rules=false", nftables=True).stop()
    assert "chain" not in node.run(*NFT)


def test_two_daemons_that_share_the_tables_come_to_rest(node: Node) -> None:
    first = node.start("--ip-masq", "--subnet-file=/run/a/subnet.env", nftables=True)
    second = node.start(
        "--ip-masq", "--subnet-file=/run/b/subnet.env", nftables=True, backend={"Type": "host-gw"},
        network="10.12.0.0/16", subnet="10.12.7.0/24",
    )  # fmt: skip
    until(lambda: node.run(*NFT).count("ip saddr") == 5 * 2 + 2 and node.run(*NFT).count("accept\n") == 4, "both", 3)
    generation = node.run("nft", "-j", "list", "ruleset")
    until(lambda: "setting them again" in first.log, "the first puts its own back")
    with pytest.raises(pytest.fail.Exception):
        until(lambda: node.run("nft", "-j", "list", "ruleset") != generation, "a quarrel", 1.0)
    assert second.process.poll() is None


FLAVOURS = ("iptables-nft", "iptables-legacy")


def choose(node: Node, flavour: str) -> dict[str, str]:
    """Make `iptables` mean one flavour inside the node."""
    node.run("mkdir", "-p", "/run/bin")
    for name in ("iptables", "iptables-save", "iptables-restore"):
        tool = name.replace("iptables", flavour)
        node.run("ln", "-sf", f"/usr/sbin/{tool}", f"/run/bin/{name}")
    return {"PATH": f"/run/bin:{os.environ['PATH']}", "XTABLES_LOCKFILE": "/run/xtables.lock"}


def left_of(node: Node, kind: str) -> str:
    """What there is of ours in one kind of rules."""
    if kind == "nftables":
        return node.run("nft", "list", "tables").replace("table ip nat\n", "").replace("table ip filter\n", "")
    return "".join(
        line for line in node.run(f"{kind}-save").splitlines(keepends=True) if "FLANNEL" in line or "flanneld" in line
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [(a, b) for a in (*FLAVOURS, "nftables") for b in (*FLAVOURS, "nftables") if a != b],
)
def test_a_change_of_rules_leaves_nothing_of_the_old(node: Node, before: str, after: str) -> None:
    for kind in (before, after):
        flavour = kind if kind in FLAVOURS else before if before in FLAVOURS else after
        daemon = node.start("--ip-masq", nftables=kind == "nftables", environment=choose(node, flavour))
        assert left_of(node, kind), f"{kind} has no rules\n{daemon.log}"
        daemon.stop()
    assert left_of(node, before) == ""


def test_no_bridge_module_is_needed(node: Node) -> None:
    node.run("mount", "-t", "tmpfs", "tmpfs", "/proc/sys/net/bridge")
    node.start("--ip-masq", nftables=True)
    refused = node.start("--ip-masq", ready=False)
    refused.said("Failed to check br_netfilter")
