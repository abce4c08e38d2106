"""Takes away the rules of an earlier run that had them kept in another way: switching leaves nothing of the old one."""

from __future__ import annotations

from collections.abc import Mapping

from flannel import log
from flannel.kernel import nftables as kernel
from flannel.kernel.netlink import NETLINK_NETFILTER, Netlink
from flannel.process import find, run
from flannel.rules import iptables
from flannel.rules.keeper import RulesError, RulesWanted
from flannel.rules.masquerade import Group, forward, masquerade, removal
from flannel.rules.nftables import table_of
from flannel.subnetenv import Previous

NFTABLES, IPTABLES_NFT, IPTABLES_LEGACY = "nftables", "iptables-nft", "iptables-legacy"
_CHAINS = (("nat", "FLANNEL-POSTRTG"), ("filter", "FLANNEL-FWD"))
#: Which tables legacy iptables has in use; asking iptables-legacy itself would make them.
_LEGACY_NAMES = {4: "/proc/net/ip_tables_names", 6: "/proc/net/ip6_tables_names"}


def remove_others(keep: Mapping[int, str], wanted: Mapping[int, RulesWanted], previous: Previous) -> None:
    """Remove what other keepers made. `keep` names the one in use by IP version; a version without any keeps nothing.

    A failure is logged: what is left is no reason not to start.
    """
    try:
        netlink = Netlink(NETLINK_NETFILTER)
    except OSError:
        netlink = None  # this kernel has no nftables, so nothing of it is left
    for version in (4, 6):
        in_use = keep.get(version, "")
        if netlink is not None and in_use != NFTABLES:
            _remove_table(netlink, version)
        for flavour in (IPTABLES_NFT, IPTABLES_LEGACY):
            if in_use != flavour and _has_ours(netlink, version, flavour):
                _remove_chains(version, flavour, wanted.get(version), previous)
    if netlink is not None:
        netlink.close()


def _remove_table(netlink: Netlink, version: int) -> None:
    name = table_of(version)
    if not kernel.exists(netlink, version, name):
        return
    outcome = run(["nft", "delete", "table", "ip" if version == 4 else "ip6", name])
    if outcome.code:
        log.error(f"cannot remove the nftables table {name} of an earlier run: {outcome.errors.strip()[:300]}")
    else:
        log.info(f"removed the nftables table {name} of an earlier run")


def _has_ours(netlink: Netlink | None, version: int, flavour: str) -> bool:
    if flavour == IPTABLES_NFT:
        return netlink is not None and any(kernel.exists(netlink, version, table, chain) for table, chain in _CHAINS)
    try:
        with open(_LEGACY_NAMES[version]) as file:
            used = file.read().split()
    except OSError:
        return False
    return any(table in used for table, _ in _CHAINS)


def _remove_chains(version: int, flavour: str, wanted: RulesWanted | None, previous: Previous) -> None:
    program = flavour.replace("iptables", iptables.program_of(version))
    if not find(f"{program}-save"):
        program = iptables.program_of(version)
        if iptables.ask_flavour(program)[0] != (flavour == IPTABLES_NFT):
            log.error(f"rules of an earlier run are left: there is no {flavour} to remove them with")
            return
    try:
        tables = iptables.read(program, [table for table, chain in _CHAINS])
        changes = {}
        for group in _groups(version, wanted, previous):
            ours = iptables.earlier_rules(group.table, wanted, previous) if wanted else group.rules
            changes[group.table] = removal(tables, group, ours)
        iptables.write(program, changes)
    except RulesError as error:
        log.error(f"cannot remove the rules of an earlier run: {error}")
        return
    if any(changes.values()):
        log.info(f"removed the rules that an earlier run had made by {program}")


def _groups(version: int, wanted: RulesWanted | None, previous: Previous) -> list[Group]:
    network, subnet = (wanted.network, wanted.subnet) if wanted else previous.of(version)
    if network is None or subnet is None:
        return []
    return [masquerade(network, subnet, True), forward(network)]
