"""Rules of iptables and nftables in the order the kernel tries them, those of iptables with their counters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from testbed.errors import LabError
from testbed.labs.base import Place

_RULE = re.compile(r"\[(\d+):(\d+)\] -A (\S+) ?(.*)")
_CHAIN = re.compile(r":(\S+) (\S+) \[\d+:\d+\]")


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule; `spec` is what `iptables -S` prints behind the chain's name."""

    chain: str
    spec: str
    packets: int
    bytes: int

    @property
    def target(self) -> str:
        """The target that the rule jumps to; "" where it only counts."""
        words = self.spec.split()
        return words[words.index("-j") + 1] if "-j" in words else ""


@dataclass(frozen=True, slots=True)
class Table:
    """One table. `policies` has "-" for a chain of the user's own, which has none."""

    name: str
    policies: dict[str, str]
    rules: tuple[Rule, ...]

    def chain(self, name: str) -> tuple[Rule, ...]:
        """The rules of a chain, in order; none where there is no such chain."""
        return tuple(rule for rule in self.rules if rule.chain == name)


def read_tables(place: Place, flavour: str) -> dict[str, Table]:
    """All tables that are in use on a node. `flavour` is iptables-nft or iptables-legacy. Raises LabError."""
    return parse_save(place.run([f"{flavour}-save", "-c"]).stdout, place.name)


def read_table(place: Place, flavour: str, table: str) -> Table:
    """One table; an empty one where the kernel has none yet."""
    text = place.run([f"{flavour}-save", "-c", "-t", table]).stdout
    return parse_save(text, place.name).get(table, Table(table, {}, ()))


def parse_save(text: str, where: str) -> dict[str, Table]:
    """Read what `iptables-save -c` prints. Raises LabError for a line that it never prints."""
    tables: dict[str, Table] = {}
    name, policies, rules = "", dict[str, str](), list[Rule]()
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        if line.startswith("*"):
            name, policies, rules = line[1:], {}, []
        elif line == "COMMIT":
            tables[name] = Table(name, policies, tuple(rules))
        elif (chain := _CHAIN.fullmatch(line)) and name:
            policies[chain[1]] = chain[2]
        elif (rule := _RULE.fullmatch(line)) and name:
            rules.append(Rule(rule[3], rule[4], int(rule[1]), int(rule[2])))
        else:
            raise LabError(f"iptables-save printed a line of another form: {line!r}", where=where)
    if name and name not in tables:
        raise LabError(f"iptables-save ended in the middle of table {name}", where=where)
    return tables


@dataclass(frozen=True, slots=True)
class NftChain:
    """A chain of an nftables table. `head` says type, hook, priority and policy; a plain chain has none ("")."""

    head: str
    rules: tuple[str, ...]

    def rules_in(self, name: str) -> tuple[str, ...]:
        """Its rules, each behind a name for the chain."""
        return tuple(f"{name} {rule}" for rule in self.rules)


def read_nft_table(place: Place, family: str, table: str) -> dict[str, NftChain]:
    """The chains of a table by name; none where there is no such table."""
    done = place.run(["nft", "list", "table", family, table], check=False)
    if not done.ok and "No such file or directory" not in done.stderr:
        raise LabError(f"nft cannot list the table {family} {table}: {done.stderr.strip()}", where=place.name)
    return parse_nft_table(done.stdout, place.name)


def parse_nft_table(text: str, where: str) -> dict[str, NftChain]:
    """Read what `nft list table` prints. Raises LabError where it ends in the middle."""
    chains: dict[str, NftChain] = {}
    name, head, rules = "", "", list[str]()
    for line in map(str.strip, text.splitlines()):
        if not name:
            name, head, rules = (line[6:-1].strip() if line.startswith("chain ") else ""), "", []
        elif line == "}":
            chains[name] = NftChain(head, tuple(rules))
            name = ""
        elif line.startswith("type ") and " hook " in line:
            head = line
        elif line and not line.startswith("comment "):
            rules.append(line)
    if name:
        raise LabError(f"nft list ended in the middle of chain {name}", where=where)
    return chains


def rules_of_flannel(place: Place, kept_by: str) -> tuple[str, ...]:
    """flannel's chains, their rules and the jumps to them on a node, a line each, without counters; of IPv4.

    `kept_by` is iptables-nft, iptables-legacy or nftables. Raises LabError.
    """
    if kept_by == "nftables":
        found = read_nft_table(place, "ip", "flannel-ipv4")
        return tuple(line for name, chain in sorted(found.items()) for line in (f"chain {name}", *chain.rules_in(name)))
    lines: list[str] = []
    for name, table in sorted(read_tables(place, kept_by).items()):
        lines += [f"{name} chain {chain}" for chain in table.policies if chain.startswith("FLANNEL-")]
        ours = (rule for rule in table.rules if rule.chain.startswith("FLANNEL-") or "FLANNEL-" in rule.target)
        lines += [f"{name} {rule.chain} {rule.spec}" for rule in ours]
    return tuple(lines)


@contextmanager
def rules_put_back(place: Place, flavour: str) -> Iterator[None]:
    """Behind the block every rule of iptables, of IPv6 too, is where it was: their order, too, counts. Raises LabError.

    Where flavour is nftables, so are flannel's tables, which not every flanneld looks after.
    """
    program = "iptables-nft" if flavour == "nftables" else flavour
    saved = {name: _saved(place, name) for name in (program, f"ip6{program.removeprefix('ip')}")}
    tables = _nft_tables(place) if flavour == "nftables" else {}
    try:
        yield
    finally:
        for name, rules in saved.items():
            _restore(place, name, rules)
        found = _nft_tables(place) if tables else {}
        for table, text in tables.items():
            if found[table] != text:
                anew = f"table {table}\ndelete table {table}\n{text}"
                place.run(["nft", "-f", "-"], stdin=anew if text else f"delete table {table}")


def _saved(place: Place, program: str) -> str | None:
    """What `program` keeps; None where it is one for IPv6 that this kernel has nothing for."""
    done = place.run([f"{program}-save"], check=program.startswith("iptables"))
    return done.stdout if done.ok else None


def _restore(place: Place, program: str, saved: str | None) -> None:
    if saved is None:
        return
    place.run([f"{program}-restore"], stdin=saved)
    known = {line[1:] for line in saved.splitlines() if line.startswith("*")}
    for table in sorted(read_tables(place, program).keys() - known):  # in no use then
        for what in ("-F", "-X"):
            place.run([program, "-t", table, what])


def _nft_tables(place: Place) -> dict[str, str]:
    """Each of flannel's tables as nft writes it; "" for one that is not there."""
    names = ("ip flannel-ipv4", "ip6 flannel-ipv6")
    return {name: place.run(["nft", "list", "table", *name.split()], check=False).stdout for name in names}
