"""Masquerade and forward rules as text: flannel-behaviour.md, section 5.1."""

from __future__ import annotations

from ipaddress import IPv4Network
from pathlib import Path

import pytest

from flannel.rules.iptables import ask_flavour
from flannel.rules.masquerade import Group, forward, masquerade, payload, read_tables, removal, repair

N, P = IPv4Network("10.244.0.0/16"), IPv4Network("10.244.1.0/24")
MASQ, FWD = masquerade(N, P, True), forward(N)


def saved(group: Group, rules: list[str], jumps: list[str]) -> str:
    lines = [f"*{group.table}", f":{group.parent} ACCEPT [0:0]", f":{group.chain} - [0:0]"]
    lines += [f"-A {group.parent} {jump}" for jump in jumps]
    return "\n".join([*lines, *(f"-A {group.chain} {rule}" for rule in rules), "COMMIT", ""])


def test_the_rules_are_upstreams() -> None:
    assert [f"-A FLANNEL-POSTRTG {rule}" for rule in MASQ.rules] == [
        '-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN',
        '-A FLANNEL-POSTRTG -s 10.244.1.0/24 -d 10.244.0.0/16 -m comment --comment "flanneld masq" -j RETURN',
        '-A FLANNEL-POSTRTG -s 10.244.0.0/16 -d 10.244.1.0/24 -m comment --comment "flanneld masq" -j RETURN',
        '-A FLANNEL-POSTRTG ! -s 10.244.0.0/16 -d 10.244.1.0/24 -m comment --comment "flanneld masq" -j RETURN',
        '-A FLANNEL-POSTRTG -s 10.244.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" '
        "-j MASQUERADE --random-fully",
        '-A FLANNEL-POSTRTG ! -s 10.244.0.0/16 -d 10.244.0.0/16 -m comment --comment "flanneld masq" '
        "-j MASQUERADE --random-fully",
    ]
    assert MASQ.jump == '-m comment --comment "flanneld masq" -j FLANNEL-POSTRTG'
    assert FWD.rules == (
        '-s 10.244.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT',
        '-d 10.244.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT',
    )
    assert not any("random" in rule for rule in masquerade(N, P, False).rules)


@pytest.mark.parametrize("group", [MASQ, FWD])
@pytest.mark.parametrize("keep_foreign", [True, False])
def test_what_is_right_is_left_alone(group: Group, keep_foreign: bool) -> None:
    tables = read_tables(saved(group, list(group.rules), [group.jump]))
    assert repair(tables, group, keep_foreign=keep_foreign) == []


@pytest.mark.parametrize("group", [MASQ, FWD])
def test_from_nothing_everything_is_set(group: Group) -> None:
    lines = repair({}, group, keep_foreign=True)
    assert lines == [
        f":{group.chain} - [0:0]",
        f"-A {group.parent} {group.jump}",
        *(f"-A {group.chain} {rule}" for rule in group.rules),
    ]


def test_a_missing_jump_leaves_the_chain_and_its_counters_alone() -> None:
    assert repair(read_tables(saved(MASQ, list(MASQ.rules), [])), MASQ, keep_foreign=True) == [
        f"-A POSTROUTING {MASQ.jump}"
    ]


def test_a_jump_that_stands_twice_is_set_once() -> None:
    lines = repair(read_tables(saved(MASQ, list(MASQ.rules), [MASQ.jump] * 2)), MASQ, keep_foreign=True)
    assert lines == [f"-D POSTROUTING {MASQ.jump}"] * 2 + [f"-A POSTROUTING {MASQ.jump}"]


@pytest.mark.parametrize(
    "rules",
    [
        list(MASQ.rules[:-1]),  # one is missing
        list(reversed(MASQ.rules)),  # out of order
        [*MASQ.rules, MASQ.rules[-1]],  # one stands twice
    ],
)
def test_a_wrong_chain_is_set_anew(rules: list[str]) -> None:
    lines = repair(read_tables(saved(MASQ, rules, [MASQ.jump])), MASQ, keep_foreign=True)
    assert lines == [":FLANNEL-POSTRTG - [0:0]", *(f"-A FLANNEL-POSTRTG {rule}" for rule in MASQ.rules)]


def test_two_daemons_that_share_a_chain_come_to_rest() -> None:
    other = masquerade(IPv4Network("10.12.0.0/16"), IPv4Network("10.12.7.0/24"), True)
    chain = list(other.rules)  # the other one has just started, and set the whole chain
    lines = repair(read_tables(saved(MASQ, chain, [MASQ.jump])), MASQ, keep_foreign=True)
    chain = [line.removeprefix("-A FLANNEL-POSTRTG ") for line in lines if line.startswith("-A FLANNEL-POSTRTG ")]
    tables = read_tables(saved(MASQ, chain, [MASQ.jump]))
    assert set(chain) == {*MASQ.rules, *other.rules}
    assert repair(tables, MASQ, keep_foreign=True) == []
    assert repair(tables, other, keep_foreign=True) == []


def test_at_start_an_earlier_networks_rules_go() -> None:
    old = masquerade(IPv4Network("10.9.0.0/16"), IPv4Network("10.9.1.0/24"), True)
    lines = repair(read_tables(saved(MASQ, [*old.rules, *MASQ.rules[1:]], [MASQ.jump])), MASQ, keep_foreign=False)
    assert lines == [":FLANNEL-POSTRTG - [0:0]", *(f"-A FLANNEL-POSTRTG {rule}" for rule in MASQ.rules)]


def test_removal_takes_chain_and_jump_unless_somebody_else_uses_them() -> None:
    tables = read_tables(saved(MASQ, list(MASQ.rules), [MASQ.jump]))
    assert removal(tables, MASQ, ()) == [
        f"-D POSTROUTING {MASQ.jump}", "-F FLANNEL-POSTRTG", "-X FLANNEL-POSTRTG",
    ]  # fmt: skip
    foreign = "-s 10.12.0.0/16 -j RETURN"
    tables = read_tables(saved(MASQ, [*MASQ.rules, foreign], [MASQ.jump]))
    assert removal(tables, MASQ, ()) == [f"-D FLANNEL-POSTRTG {rule}" for rule in MASQ.rules[1:]]
    assert removal({}, MASQ, ()) == []


@pytest.mark.parametrize(
    ("said", "nft", "random_fully"),
    [
        ("iptables v1.8.9 (nf_tables)", True, True),
        ("iptables v1.8.7 (legacy)", False, True),
        ("iptables v1.6.2", False, True),
        ("iptables v1.6.1", False, False),
        ("iptables v1.4.21", False, False),
        ("what?", False, True),
    ],
)
def test_an_old_iptables_has_no_random_ports(
    said: str, nft: bool, random_fully: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "iptables"
    program.write_text(f"#!/bin/sh\necho '{said}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert ask_flavour() == (nft, random_fully)


def test_a_transaction_a_table_and_none_where_nothing_changes() -> None:
    assert payload({"nat": [], "filter": ["-A X"]}) == "*filter\n-A X\nCOMMIT\n"
    assert payload({"nat": []}) == ""
