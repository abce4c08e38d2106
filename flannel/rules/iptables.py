"""Keeps the rules by iptables of either flavour: looks when something changed, and writes only what is wrong."""

from __future__ import annotations

from flannel import log
from flannel.process import run
from flannel.rules.keeper import Keeper, RulesWanted, checked
from flannel.rules.masquerade import Group, Tables, forward, masquerade, payload, read_tables, removal, repair
from flannel.subnetenv import Previous

#: Who holds the lock of iptables may keep us waiting so many seconds.
_LOCK_WAIT = "10"
_RANDOM_FULLY_SINCE = (1, 6, 2)


def program_of(version: int) -> str:
    """iptables, or its sister for IPv6."""
    return "iptables" if version == 4 else "ip6tables"


def ask_flavour(program: str = "iptables") -> tuple[bool, bool]:
    """Whether an iptables is the nftables one, and whether it knows --random-fully."""
    return flavour_of(run([program, "--version"]).output)


def flavour_of(text: str) -> tuple[bool, bool]:
    """The same of what `--version` says."""
    said = text.split()
    try:
        version = tuple(int(part) for part in said[1].lstrip("v").split("."))
    except (IndexError, ValueError):
        return False, True
    return "(nf_tables)" in said, version >= _RANDOM_FULLY_SINCE


def groups_of(wanted: RulesWanted, random_fully: bool) -> tuple[list[Group], list[Group]]:
    """The groups of rules that are wanted, and those that are not."""
    both = (
        (masquerade(wanted.network, wanted.subnet, random_fully), wanted.masquerade),
        (forward(wanted.network), wanted.forward),
    )
    return [group for group, on in both if on], [group for group, on in both if not on]


def earlier_rules(table: str, wanted: RulesWanted, previous: Previous) -> list[str]:
    """What rules an earlier run may have put into a table's chain of ours."""
    found: list[str] = []
    old_network, old_subnet = previous.of(wanted.network.version)
    for network in (old_network, wanted.network):
        for subnet in (old_subnet, wanted.subnet):
            if network is None or subnet is None:
                continue
            for random_fully in (True, False):
                one = masquerade(network, subnet, random_fully) if table == "nat" else forward(network)
                found += one.rules
    return found


def read(program: str, tables: list[str]) -> Tables:
    """The rules of some tables, by `iptables`, `ip6tables` or one of their flavours. Raises RulesError."""
    found: Tables = {}
    for table in tables:
        found |= read_tables(checked([f"{program}-save", "-t", table]).output)
    return found


def write(program: str, changes: dict[str, list[str]]) -> int:
    """Make changes by `iptables-restore`, and return in how many transactions. Raises RulesError."""
    text = payload(changes)
    if text:
        checked([f"{program}-restore", "--noflush", "-w", _LOCK_WAIT], text)
    return text.count("COMMIT")


class IptablesKeeper(Keeper):
    """Sets and keeps the rules of one address family by iptables or ip6tables."""

    kind = "iptables"

    def __init__(self, wanted: RulesWanted, previous: Previous, resync: int, flavour: tuple[bool, bool]) -> None:
        """`flavour` is what `ask_flavour` said."""
        super().__init__(resync)
        self._flavour = flavour
        self._wanted = wanted
        self._previous = previous
        self._groups: list[Group] = []
        self._program = program_of(wanted.network.version)
        if self._program != "iptables":
            self.kind = self._program

    def set_first(self) -> None:
        """At start the whole chain is set: nothing tells an old network's rules from another flanneld's, and that one
        puts its own back."""
        nft, random_fully = self._flavour
        if nft:
            self.subscribe()
        self._groups, unwanted = groups_of(self._wanted, random_fully and self._wanted.random_fully)
        if not nft and self._resync <= 0:
            log.warning("--iptables-resync is 0: rules that somebody removes stay away")
        self.note_generation()
        tables = read(self._program, ["nat", "filter"])
        changes = {group.table: repair(tables, group, keep_foreign=False) for group in self._groups}
        for group in unwanted:
            changes[group.table] = removal(
                tables, group, earlier_rules(group.table, self._wanted, self._previous)
            )  # fmt: skip
        self.wrote(write(self._program, changes))
        if self._groups:
            log.info(f"bootstrap done: {' and '.join(group.chain for group in self._groups)} hold their rules")

    def chains(self) -> list[tuple[str, str]]:
        """Our chains, and the built-in ones with the jumps."""
        return [(group.table, chain) for group in self._groups for chain in (group.parent, group.chain)]

    def repair(self) -> bool:
        """Write what is missing or out of order."""
        tables = read(self._program, [group.table for group in self._groups])
        changes = {group.table: repair(tables, group, keep_foreign=True) for group in self._groups}
        if any(changes.values()):
            self.wrote(write(self._program, changes))
            return True
        return False
