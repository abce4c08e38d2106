"""Routes, neighbours, FDB entries, rules and chains: deleted one at a time, and all at once."""

from __future__ import annotations

import shlex
from collections.abc import Callable

import pytest

from testbed.flannelspec import IPTABLES_LEGACY, IPTABLES_NFT, NFTABLES
from tests.heals.heallab import FULL, HEALS_WITHIN, ONE_ROUTE, RESYNC, HealLab


@pytest.fixture(scope="module", params=["vxlan", "vxlan_direct", "host_gw", "udp", "ipip", "wireguard", "dual_stack"])
def lab(request: pytest.FixtureRequest, make_lab: Callable[..., HealLab]) -> HealLab:
    """A cluster of each backend; with both ways of vxlan_direct in it."""
    run: str = request.param
    return make_lab(run, **({"topology": "racks"} if run == "vxlan_direct" else {}))


def entries(lab: HealLab) -> list[tuple[str, str]]:
    """Every route, neighbour and FDB entry of flannel on the victim, and the script that deletes it."""
    found = [(f"route {line}", f"ip route del {line}") for line in lab.peers_routes()]
    if lab.flannel.backend.dual:
        lines = lab.ip("-6 route show table main root fd00::/8").splitlines()
        # What stands there for the device's own address is the kernel's.
        theirs = [line for line in lines if "flannel-v6" in line and "proto kernel" not in line]
        found += [(f"route {line.strip()}", f"ip -6 route del {line}") for line in theirs]
    for device in lab.devices:
        for line in lab.sh(f"ip neigh show dev {device} nud permanent; ip -6 neigh show dev {device} nud permanent "
                           "| grep -v ^ff; true").splitlines():  # fmt: skip
            found.append((f"neighbour {line}", f"ip neigh del {line.split()[0]} dev {device}"))
        for line in lab.sh(f"bridge fdb show dev {device}", check=False).splitlines():
            words = line.split()
            if "dst" in words:
                dst = words[words.index("dst") + 1]
                found.append((f"FDB entry {line}", f"bridge fdb del {words[0]} dev {device} dst {dst} self"))
    return sorted(set(found))


def test_every_entry_deleted_one_at_a_time_heals(lab: HealLab) -> None:
    lab.settled()
    found = entries(lab)
    assert len(found) >= (1 if lab.flannel.backend.type in ONE_ROUTE else len(lab.names) - 1)
    for what, script in found:
        lab.heals(f"deleted: {what}", lambda script=script: lab.sh(script))  # type: ignore[misc]
    assert lab.answers()


def test_all_entries_deleted_at_once_heal(lab: HealLab) -> None:
    lab.settled()
    script = "\n".join(script for _, script in entries(lab))
    lab.heals("deleted: every route, neighbour and FDB entry", lambda: lab.sh(script))
    assert lab.answers()


def test_every_route_changed_heals(lab: HealLab) -> None:
    """What is added to a route of flannel's is not seen by its destination and gateway, and packets fare by it."""
    lab.settled()
    routes = [line for line in lab.peers_routes() if " via " in line or lab.flannel.backend.type in ONE_ROUTE]
    assert routes
    own = str(lab.cluster.lab.spec.node(lab.victim).ip)
    for line in routes:
        for more in ("mtu 1300", f"src {own}"):
            changed = f"{line.partition(' src ')[0]} {more}"
            lab.heals(f"changed: route {changed}", lambda changed=changed: lab.ip(f"route replace {changed}"))  # type: ignore[misc]
    assert lab.answers()


def test_everything_deleted_at_once_heals(lab: HealLab) -> None:
    """Entries, device and rules in one go."""
    lab.settled(rules=True)
    script = "\n".join(script for _, script in entries(lab))
    script += "\n" + "\n".join(f"ip link del {device}" for device in lab.devices)
    script += "\niptables -F; iptables -X; iptables -t nat -F; iptables -t nat -X"
    lab.heals("deleted: everything at once", lambda: lab.sh(script), rules=True)
    assert lab.answers()


def iptables_lines(lab: HealLab) -> list[tuple[str, str, str]]:
    """Every rule of flannel on the victim: table, chain, and the rest."""
    found = []
    for table in ("nat", "filter"):
        for line in lab.sh(f"iptables-save -t {table}").splitlines():
            if line.startswith("-A") and "FLANNEL" in line:
                _, chain, rule = line.split(" ", 2)
                found.append((table, chain, rule))
    return found


@pytest.fixture(scope="module", params=[IPTABLES_NFT, IPTABLES_LEGACY, NFTABLES])
def ruled(request: pytest.FixtureRequest, make_lab: Callable[..., HealLab]) -> HealLab:
    """A cluster for each way of making rules."""
    return make_lab("host_gw", rules=request.param)


def within(lab: HealLab) -> float:
    """Seconds for rules to heal."""
    return HEALS_WITHIN + (RESYNC if lab.flannel.rules == IPTABLES_LEGACY else 0)


def rule_damages(lab: HealLab) -> list[tuple[str, str]]:
    """Every rule and chain of flannel by itself, and all at once, with the script that takes it away."""
    if lab.flannel.rules == NFTABLES:
        table = "ip flannel-ipv4"
        listed = lab.sh(f"nft -a list table {table}").splitlines()
        found, chain = [], ""
        for line in map(str.strip, listed):
            if line.startswith("chain "):
                chain = line.split()[1]
                found.append((f"chain {chain}", f"nft delete chain {table} {chain}"))
                found.append((f"rules of chain {chain}", f"nft flush chain {table} {chain}"))
            elif " # handle " in line and not line.startswith("table"):
                rule, _, handle = line.rpartition(" # handle ")
                found.append((f"rule {chain}: {rule}", f"nft delete rule {table} {chain} handle {handle}"))
        return [*found, ("table flannel-ipv4", f"nft delete table {table}"), ("all tables", "nft flush ruleset")]
    found = []
    for number, (table, chain, rule) in enumerate(iptables_lines(lab)):
        words = " ".join(shlex.quote(word) for word in shlex.split(rule))
        found.append((f"rule {number + 1}: -A {chain} {rule}", f"iptables -t {table} -D {chain} {words}"))
    for table, parent, chain in (("nat", "POSTROUTING", "FLANNEL-POSTRTG"), ("filter", "FORWARD", "FLANNEL-FWD")):
        found.append((f"rules of chain {chain}", f"iptables -t {table} -F {chain}"))
        found.append((f"chain {chain}", f"iptables -t {table} -F {parent}; iptables -t {table} -F {chain}; "
                                        f"iptables -t {table} -X {chain}"))  # fmt: skip
    found.append(("all rules", "iptables -F; iptables -X; iptables -t nat -F; iptables -t nat -X"))
    return found


def test_every_rule_and_chain_deleted_heals(ruled: HealLab) -> None:
    ruled.settled(rules=True)
    damages = rule_damages(ruled)
    assert len(damages) >= 10, damages
    if ruled.flannel.rules == IPTABLES_LEGACY and not FULL:
        damages = damages[::4] + damages[-1:]
    for what, _ in damages:
        # Handles are new after each repair.
        script = dict(rule_damages(ruled))[what]
        ruled.heals(f"deleted: {what}", lambda script=script: ruled.sh(script), rules=True, within=within(ruled))  # type: ignore[misc]
    assert ruled.answers()
