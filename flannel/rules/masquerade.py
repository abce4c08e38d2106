"""Masquerade and forward rules as data, and what it takes to get from the rules that are there to them; no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network, IPv6Network
from typing import NamedTuple, TypeAlias

_MASQ, _FORWARD = '-m comment --comment "flanneld masq"', '-m comment --comment "flanneld forward"'

Network: TypeAlias = IPv4Network | IPv6Network

#: What no masquerading is done for, by IP version.
MULTICAST = {4: "224.0.0.0/4", 6: "ff00::/8"}

#: Of each table the chains with their rules, as `iptables-save` prints them.
Tables = dict[str, dict[str, list[str]]]


class Group(NamedTuple):
    """A chain of ours with its rules in order, and the jump to it that stands in a built-in chain. Rules are written as
    `iptables -S` prints them, `-A CHAIN` left out."""

    table: str
    parent: str
    jump: str
    chain: str
    rules: tuple[str, ...]

    @property
    def target(self) -> str:
        """How a rule that jumps to our chain ends."""
        return f"-j {self.chain}"


def masquerade(network: Network, subnet: Network, random_fully: bool) -> Group:
    """The rules that masquerade what leaves the network, and what enters it from elsewhere for another node."""
    n, p = network, subnet
    to = "-j MASQUERADE --random-fully" if random_fully else "-j MASQUERADE"
    rules = (
        f"-m mark --mark 0x4000/0x4000 {_MASQ} -j RETURN",
        f"-s {p} -d {n} {_MASQ} -j RETURN",
        f"-s {n} -d {p} {_MASQ} -j RETURN",
        f"! -s {n} -d {p} {_MASQ} -j RETURN",
        f"-s {n} ! -d {MULTICAST[n.version]} {_MASQ} {to}",
        f"! -s {n} -d {n} {_MASQ} {to}",
    )
    return Group("nat", "POSTROUTING", f"{_MASQ} -j FLANNEL-POSTRTG", "FLANNEL-POSTRTG", rules)


def forward(network: Network) -> Group:
    """The rules that accept forwarded traffic of the network."""
    rules = (f"-s {network} {_FORWARD} -j ACCEPT", f"-d {network} {_FORWARD} -j ACCEPT")
    return Group("filter", "FORWARD", f"{_FORWARD} -j FLANNEL-FWD", "FLANNEL-FWD", rules)


def read_tables(text: str) -> Tables:
    """Read what `iptables-save` prints."""
    tables: Tables = {}
    chains: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("*"):
            chains = tables.setdefault(line[1:], {})
        elif line.startswith(":"):
            chains.setdefault(line[1:].partition(" ")[0], [])
        elif line.startswith("-A "):
            chain, _, rule = line[3:].partition(" ")
            chains.setdefault(chain, []).append(rule)
    return tables


def repair(tables: Tables, group: Group, *, keep_foreign: bool) -> list[str]:
    """The lines for `iptables-restore --noflush` that set a group right; none where it is right, so counters stay.

    With `keep_foreign` rules in our chain that are not of this group are left where they are found: another flanneld
    of the same host shares the chain.
    """
    chains = tables.get(group.table, {})
    lines = _repair_jump(chains.get(group.parent, []), group)
    there = chains.get(group.chain)
    foreign = [rule for rule in there or () if rule not in group.rules] if keep_foreign else []
    if there is None or not _in_order(group.rules, there, exactly=not keep_foreign):
        # The first rule may be another flanneld's first as well; before the foreign ones it serves both.
        body = [group.rules[0], *foreign, *group.rules[1:]]
        lines = [f":{group.chain} - [0:0]", *lines, *(f"-A {group.chain} {rule}" for rule in body)]
    return lines


def _repair_jump(parent: Sequence[str], group: Group) -> list[str]:
    jumps = [rule for rule in parent if rule.endswith(group.target)]
    if jumps == [group.jump]:
        return []
    return [*(f"-D {group.parent} {rule}" for rule in jumps), f"-A {group.parent} {group.jump}"]


def _in_order(wanted: Sequence[str], there: Sequence[str], *, exactly: bool) -> bool:
    if exactly:
        return list(there) == list(wanted)
    return [rule for rule in there if rule in wanted] == list(wanted)


def removal(tables: Tables, group: Group, ours: Iterable[str]) -> list[str]:
    """The lines that take a group away: the rules `ours`, and chain and jump where nothing else is in the chain."""
    chains = tables.get(group.table, {})
    there = chains.get(group.chain)
    if there is None:
        return []
    mine = {*ours, *group.rules}
    others = [rule for rule in there if rule not in mine]
    if others:
        # The first rule has no network in it: another flanneld needs it too.
        return [f"-D {group.chain} {rule}" for rule in there if rule in mine and rule != group.rules[0]]
    jumps = [rule for rule in chains.get(group.parent, []) if rule.endswith(group.target)]
    return [*(f"-D {group.parent} {rule}" for rule in jumps), f"-F {group.chain}", f"-X {group.chain}"]


def payload(by_table: dict[str, list[str]]) -> str:
    """The text for `iptables-restore`: one transaction for each table that needs one."""
    return "".join(f"*{table}\n" + "\n".join(lines) + "\nCOMMIT\n" for table, lines in by_table.items() if lines)
