"""Keeps the rules by nftables, in tables of upstream's names; the rules mean what those of iptables mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from flannel import log
from flannel.process import run
from flannel.rules.keeper import Keeper, RulesError, RulesWanted, checked
from flannel.rules.masquerade import MULTICAST, Network

_FAMILY = {4: "ip", 6: "ip6"}
_TABLE = {4: "flannel-ipv4", 6: "flannel-ipv6"}
POSTROUTING, FORWARD = "postrtg", "forward"


class Chain(NamedTuple):
    """A base chain of ours and its rules in order, as nft reads them."""

    name: str
    head: str
    rules: tuple[str, ...]


class Seen(NamedTuple):
    """A chain as `nft list table` prints it."""

    head: str
    rules: tuple[str, ...]


def table_of(version: int) -> str:
    """The table's name for an IP version."""
    return _TABLE[version]


def masquerade(network: Network, subnet: Network, random_fully: bool) -> Chain:
    """The chain that masquerades. Where upstream's returns for all that enters the Network from elsewhere, this one
    does so for the node's own subnet, so that what goes on to another node comes back through this one."""
    ip, n, p = _FAMILY[network.version], network, subnet
    to = "masquerade fully-random" if random_fully else "masquerade"
    rules = (
        "meta mark & 0x4000 == 0x4000 return",
        f"{ip} saddr {p} {ip} daddr {n} return",
        f"{ip} saddr {n} {ip} daddr {p} return",
        f"{ip} saddr != {n} {ip} daddr {p} return",
        f"{ip} saddr {n} {ip} daddr != {MULTICAST[n.version]} {to}",
        f"{ip} saddr != {n} {ip} daddr {n} {to}",
    )
    head = (
        "type nat hook postrouting priority srcnat; policy accept; "
        'comment "chain to manage traffic masquerading by flannel";'
    )
    return Chain(POSTROUTING, head, rules)


def forward(network: Network) -> Chain:
    """The chain that accepts forwarded traffic of the network."""
    ip = _FAMILY[network.version]
    head = 'type filter hook forward priority filter; policy accept; comment "chain to accept flannel traffic";'
    return Chain(FORWARD, head, (f"{ip} saddr {network} accept", f"{ip} daddr {network} accept"))


def read_table(text: str) -> dict[str, Seen]:
    """The chains of what `nft list table` prints."""
    found: dict[str, Seen] = {}
    name, head, rules = "", "", list[str]()
    for line in map(str.strip, text.splitlines()):
        if line.startswith("chain ") and line.endswith("{"):
            name, head, rules = line[6:-1].strip(), "", []
        elif not name or line.startswith("comment "):
            continue
        elif line == "}":
            found[name] = Seen(head, tuple(rules))
            name = ""
        elif line.startswith("type ") and " hook " in line:
            head = line
        elif line:
            rules.append(line)
    return found


def read_echo(text: str, version: int, chain: str) -> tuple[str, ...]:
    """A chain's rules as nft prints them, out of what `nft --echo` says of the transaction that set them."""
    start = f"add rule {_FAMILY[version]} {_TABLE[version]} {chain} "
    found = []
    for line in text.splitlines():
        if line.startswith(start):
            rule = line[len(start) :].strip()
            if rule.startswith("handle "):
                rule = rule.removeprefix("handle ").partition(" ")[2]
            found.append(rule)
    return tuple(found)


def statements(version: int, chains: Sequence[Chain], *, anew: bool = False) -> str:
    """The transaction that sets these chains, whatever is in them; with `anew` they are made again."""
    where = f"{_FAMILY[version]} {_TABLE[version]}"
    lines = [f'add table {where} {{ comment "rules for {_TABLE[version]}" ; }}']
    for chain in chains:
        made = f"add chain {where} {chain.name} {{ {chain.head} }}"
        if anew:
            lines += [f"add chain {where} {chain.name}", f"delete chain {where} {chain.name}"]
        lines += [made, f"flush chain {where} {chain.name}"]
        lines += [f"add rule {where} {chain.name} {rule}" for rule in chain.rules]
    return "\n".join(lines) + "\n"


def with_foreign(ours: Sequence[str], there: Sequence[str]) -> tuple[str, ...] | None:
    """The rules that a chain must have where `there` are in it; None where it is right.

    Rules that are not ours stay: another flanneld of the same host shares the chain. The first rule may be its first as
    well; before the foreign ones it serves both.
    """
    if [rule for rule in there if rule in ours] == list(ours):
        return None
    return (ours[0], *(rule for rule in there if rule not in ours), *ours[1:])


class NftablesKeeper(Keeper):
    """Sets and keeps the rules of one address family by nftables."""

    kind = "nftables"

    def __init__(self, wanted: RulesWanted, resync: int) -> None:
        super().__init__(resync)
        self._wanted = wanted
        self._version = wanted.network.version
        self._chains: list[Chain] = []
        # What nft makes of our text, by chain: it alone can be compared with what is listed.
        self._printed: dict[str, Seen] = {}

    def set_first(self) -> None:
        """Set our chains in one transaction, and take away those that are not wanted."""
        self.subscribe()
        self._chains = self._wanted_chains(self._wanted.random_fully)
        if not self._chains:
            self._remove_unwanted()
            return
        try:
            said = self._write(statements(self._version, self._chains))
        except RulesError:
            said = self._set_some_other_way()
        self._remove_unwanted()
        there = self._list()
        for chain in self._chains:
            printed = read_echo(said, self._version, chain.name)
            self._printed[chain.name] = Seen(there[chain.name].head if chain.name in there else "", printed)
        self.note_generation()
        log.info(f"bootstrap done: {' and '.join(chain.name for chain in self._chains)} hold their rules")

    def _wanted_chains(self, random_fully: bool) -> list[Chain]:
        wanted = self._wanted
        both = (
            (masquerade(wanted.network, wanted.subnet, random_fully), wanted.masquerade),
            (forward(wanted.network), wanted.forward),
        )
        return [chain for chain, on in both if on]

    def _set_some_other_way(self) -> str:
        """Make chains anew that are there with another hook; do without full randomness where nft has none."""
        try:
            return self._write(statements(self._version, self._chains, anew=True))
        except RulesError:
            if not self._wanted.random_fully:
                raise
            self._chains = self._wanted_chains(False)
            said = self._write(statements(self._version, self._chains, anew=True))
            log.warning("nftables masquerades without random port mapping here: fully-random is refused")
            return said

    def _remove_unwanted(self) -> None:
        where = f"{_FAMILY[self._version]} {_TABLE[self._version]}"
        wanted = {chain.name for chain in self._chains}
        there = read_table(run(["nft", "list", "table", *where.split()]).output)
        gone = [name for name in (POSTROUTING, FORWARD) if name in there and name not in wanted]
        if gone:
            checked(["nft", "-f", "-"], "".join(f"delete chain {where} {name}\n" for name in gone))

    def _write(self, text: str) -> str:
        return checked(["nft", "--echo", "-f", "-"], text).output

    def _list(self) -> dict[str, Seen]:
        return read_table(run(["nft", "list", "table", _FAMILY[self._version], _TABLE[self._version]]).output)

    def chains(self) -> list[tuple[str, str]]:
        """Our chains."""
        return [(_TABLE[self._version], chain.name) for chain in self._chains]

    def repair(self) -> bool:
        """Set again the chains that are not as they must be, each with whatever else is in it."""
        if not self._printed:
            self.set_first()
            return True
        there, wrong, anew = self._list(), list[Chain](), False
        for chain in self._chains:
            seen, printed = there.get(chain.name), self._printed[chain.name]
            rules = with_foreign(printed.rules, seen.rules if seen else ())
            other_head = seen is not None and seen.head != printed.head
            anew |= other_head
            if rules is not None:
                wrong.append(chain._replace(rules=rules))
            elif other_head and seen is not None:
                wrong.append(chain._replace(rules=seen.rules))
        if wrong:
            self._write(statements(self._version, wrong, anew=anew))
            self.wrote(1)
        return bool(wrong)
