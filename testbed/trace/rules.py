"""Rules that drop or translate, with what they have counted, from both programs that list them."""

from __future__ import annotations

import re
from dataclasses import dataclass

ACTIONS = {
    "DROP": "drop",
    "REJECT": "drop",
    "MASQUERADE": "nat",
    "SNAT": "nat",
    "DNAT": "nat",
    "REDIRECT": "nat",
    "drop": "drop",
    "reject": "drop",
    "masquerade": "nat",
    "snat": "nat",
    "dnat": "nat",
    "redirect": "nat",
}

_CHAIN = re.compile(r":(\S+) (ACCEPT|DROP) \[(\d+):\d+\]")
_RULE = re.compile(r"\[(\d+):\d+\] (-A (\S+) .*)")
_NFT_TABLE = re.compile(r"table (\S+ \S+) \{")
_NFT_CHAIN = re.compile(r"\s*chain (\S+) \{")
_NFT_HOOK = re.compile(r"\s*type (\S+) hook (\S+) .*policy (\w+);")
_NFT_COUNTER = re.compile(r"counter packets (\d+) bytes \d+ ?")


@dataclass(frozen=True, slots=True)
class Counted:
    """A rule, or with an empty text in it a chain's policy. `packets` is None where nothing counts.

    `action` is `drop` or `nat`.  `chain` names the hook of an nftables chain behind a slash: `mine/forward`.
    """

    table: str
    chain: str
    text: str
    action: str
    packets: int | None

    @property
    def hook(self) -> str:
        """Where in the stack it is, in capitals: INPUT, FORWARD, …; "" for a chain that others jump to."""
        return self.chain.rpartition("/")[2].upper()

    @property
    def policy(self) -> bool:
        """Whether this is a chain's policy."""
        return self.text.startswith("policy ")


def counted_rules(iptables: str, nft: str) -> list[Counted]:
    """The rules and policies that drop or translate. `iptables` is what `iptables-save -c` prints, `nft` a ruleset.

    What iptables-nft has made stands in both, and is taken from the former.
    """
    found = _of_iptables(iptables)
    own = {rule.table for rule in found} | {"filter", "nat", "mangle", "raw", "security"} if iptables else set()
    return found + [rule for rule in _of_nft(nft) if rule.table.partition(" ")[2] not in own]


def _of_iptables(text: str) -> list[Counted]:
    found, table = [], ""
    for line in text.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif chain := _CHAIN.fullmatch(line):
            if chain[2] == "DROP":
                found.append(Counted(table, chain[1], "policy DROP", "drop", int(chain[3])))
        elif rule := _RULE.fullmatch(line):
            words = rule[2].split()
            target = words[words.index("-j") + 1] if "-j" in words else ""
            if target in ACTIONS:
                found.append(Counted(table, rule[3], rule[2], ACTIONS[target], int(rule[1])))
    return found


def _of_nft(text: str) -> list[Counted]:
    found = []
    table = chain = ""
    for line in text.splitlines():
        if match := _NFT_TABLE.fullmatch(line):
            table = match[1]
        elif match := _NFT_CHAIN.fullmatch(line):
            chain = match[1]
        elif match := _NFT_HOOK.fullmatch(line):
            chain = f"{chain}/{match[2]}"
            if match[3] == "drop":
                found.append(Counted(table, chain, "policy drop", "drop", None))
        elif chain and not line.strip().startswith(("comment", "}")):
            action = next((ACTIONS[word] for word in line.replace(",", " ").split() if word in ACTIONS), "")
            counter = _NFT_COUNTER.search(line)
            if action:
                rule = _NFT_COUNTER.sub("", line).strip()
                found.append(Counted(table, chain, rule, action, int(counter[1]) if counter else None))
    return found
