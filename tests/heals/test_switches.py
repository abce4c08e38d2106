"""Another backend, or another way of making rules, on nodes with pods: nothing of the old one is left."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, permutations
from typing import Any

import pytest

from testbed.doctor import probe_features
from testbed.flannelspec import BACKENDS, IPTABLES_LEGACY, IPTABLES_NFT, NFTABLES
from tests.heals.heallab import ONE_ROUTE, RESTARTS_WITHIN, HealLab

#: By run: net-conf's Backend, and the tunnel device.
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "vxlan": ({"Type": "vxlan"}, "flannel.1"),
    "vxlan_direct": ({"Type": "vxlan", "DirectRouting": True}, "flannel.1"),
    "host_gw": ({"Type": "host-gw"}, ""),
    "udp": ({"Type": "udp"}, "flannel0"),
    "ipip": ({"Type": "ipip"}, "flannel.ipip"),
    "wireguard": ({"Type": "wireguard"}, "flannel-wg"),
}


@pytest.fixture(scope="module")
def lab(make_lab: Callable[..., HealLab]) -> HealLab:
    """A cluster that begins with vxlan."""
    return make_lab("vxlan")


def possible() -> list[str]:
    """The runs that this kernel can do."""
    found = probe_features()
    return [run for run in KINDS if all(found[one]["ok"] for one in BACKENDS[run].kernel_features)]


def tour(stops: list[str]) -> list[str]:
    """A way that goes from every stop to every other one."""
    left = set(permutations(stops, 2))
    way = [stops[0]]
    while left:
        ahead = [pair for pair in left if pair[0] == way[-1]] or [(way[-1], min(left)[0])]
        pair = min(ahead, key=lambda pair: -sum(other[0] == pair[1] for other in left))
        left.discard(pair)
        way.append(pair[1])
    return way


def test_a_tour_has_every_pair() -> None:
    way = tour(["a", "b", "c", "d"])
    assert {*pairwise(way)} == {*permutations("abcd", 2)}


def test_every_switch_of_backends_leaves_nothing_of_the_old_one(lab: HealLab) -> None:
    runs = possible()
    assert len(runs) >= 2
    before = "vxlan"
    for run in tour(runs)[1:]:
        backend, device = KINDS[run]
        lab.configure({**lab.flannel.net_conf, "Backend": backend})
        lab.restart()
        lab.eventually(f"switch: {before} to {run}, after the restart", lambda: lab.answers(), RESTARTS_WITHIN)
        for name in lab.names:
            links = lab.ip("-br link", name)
            left = [one for _, one in KINDS.values() if one and one != device and f"{one} " in links.replace("@", " ")]
            assert not left, f"{name}, {before} to {run}: {left} is left"
            routes = lab.peers_routes(name)
            assert len(routes) == (1 if run in ONE_ROUTE else len(lab.names) - 1), (
                f"{name}, {before} to {run}: {routes}"
            )
            over = device if run not in ("host_gw", "vxlan_direct") else "eth0"
            assert all(f"dev {over}" in route for route in routes), f"{name}, {before} to {run}: {routes}"
            types = {lease["value"].get("BackendType") for lease in lab.cluster.leases().values()}
            assert types <= {backend["Type"], "" if run == "udp" else backend["Type"], None}, types
        before = run
    lab.configure(lab.flannel.net_conf)
    lab.restart()


def flavour(lab: HealLab, kind: str) -> None:
    """Make `iptables` this flavour on every node."""
    to, other = ("legacy", "nft") if kind == IPTABLES_LEGACY else ("nft", "legacy")
    script = (
        "for link in /etc/alternatives/iptables* /etc/alternatives/ip6tables*; do case $link in *.gz) continue;; esac; "
        f'target=$(readlink "$link" | sed s/-{other}/-{to}/); ln -sfn "$target" "$link"; done'
    )
    for name in lab.names:
        lab.sh(script, node=name)


LOOKS = {
    IPTABLES_NFT: "(iptables-nft-save; ip6tables-nft-save) 2>/dev/null | grep FLANNEL",
    IPTABLES_LEGACY: "(iptables-legacy-save; ip6tables-legacy-save) 2>/dev/null | grep FLANNEL",
    NFTABLES: "nft list tables | grep flannel-",
}


def kept_by(lab: HealLab) -> set[str]:
    """The ways in which there are rules of flannel on any node."""
    return {look for look, script in LOOKS.items() for one in lab.names if lab.sh(script, node=one, check=False)}


def test_every_switch_of_rules_leaves_nothing_of_the_old_ones(lab: HealLab) -> None:
    before = IPTABLES_NFT
    for kind in tour([IPTABLES_NFT, IPTABLES_LEGACY, NFTABLES])[1:]:
        flavour(lab, kind)
        lab.configure({**lab.flannel.net_conf, "EnableNFTables": kind == NFTABLES})
        lab.restart()
        what = f"switch: {before} to {kind}, after the restart"
        lab.eventually(what, lambda kind=kind: kept_by(lab) == {kind}, RESTARTS_WITHIN)  # type: ignore[misc]
        for name in lab.names:
            assert lab.sh(LOOKS[kind], node=name), f"{name} has no rules"
        assert lab.answers()
        before = kind
    flavour(lab, IPTABLES_NFT)
    lab.configure(lab.flannel.net_conf)
    lab.restart()
    lab.settled(rules=True)
