"""Setting the rules at the start, by the tool that the network configuration asks for; the others' ones go."""

from __future__ import annotations

from typing import Protocol

from flannel.lease import Lease
from flannel.netconf import NetConf
from flannel.rules import cleanup
from flannel.rules.keeper import Keeper, RulesWanted
from flannel.subnetenv import Previous


class Flags(Protocol):
    """Those of flanneld's flags that concern rules."""

    ip_masq: bool
    ip_masq_fully_random_disable: bool
    iptables_forward_rules: bool
    iptables_resync: int


def start_rules(flags: Flags, conf: NetConf, lease: Lease, previous: Previous) -> list[Keeper]:
    """Set the rules of the IP versions in use, and return who keeps them. Raises RulesError."""
    wanted: dict[int, RulesWanted] = {
        network.version: RulesWanted(
            network, subnet, flags.ip_masq, flags.iptables_forward_rules, not flags.ip_masq_fully_random_disable
        )
        for network, subnet in ((conf.network, lease.subnet), (conf.ipv6_network, lease.subnet6))
        if network is not None and subnet is not None
    }
    keepers: list[Keeper]
    if conf.enable_nftables:
        from flannel.rules.nftables import NftablesKeeper

        kinds = dict.fromkeys(wanted, cleanup.NFTABLES)
        keepers = [NftablesKeeper(one, flags.iptables_resync) for one in wanted.values()]
    else:
        from flannel.rules.iptables import IptablesKeeper, ask_flavour

        flavour = ask_flavour()
        kinds = dict.fromkeys(wanted, cleanup.IPTABLES_NFT if flavour[0] else cleanup.IPTABLES_LEGACY)
        keepers = [IptablesKeeper(one, previous, flags.iptables_resync, flavour) for one in wanted.values()]
    cleanup.remove_others(kinds, wanted, previous)
    for keeper in keepers:
        keeper.start()
    return keepers
