"""VXC: peers that come, change and go, and what of them is left."""

from __future__ import annotations

from dataclasses import replace

import pytest

from testbed.checks import check
from testbed.fixtures import CONVERGED_SECONDS, Facts, Path
from testbed.labs.base import Node
from testbed.nodes.deploy import Cluster
from testbed.nodes.etcd import Etcd
from testbed.nodes.madeup import Stranger, etcd_of, made_up_leases, random_mac
from testbed.probes.changes import recorded_changes
from testbed.probes.flows import ping
from testbed.probes.wireguard import read_wireguard
from testbed.probes.xfrm import read_policies

RESTART_SECONDS = 20.0
"""How long a flanneld that was started may take to have cleaned up."""


def needs_etcd(cluster: Cluster) -> Etcd:
    """The lab's etcd; skips without it."""
    etcd = etcd_of(cluster)
    if etcd is None:
        pytest.skip("leases of nodes that there are not need etcd")
    return etcd


def tunnelled(cluster: Cluster, node: Node, stranger: Stranger) -> bool:
    """Whether a node's packets for the stranger's pods have to be encapsulated."""
    address = node.spec.underlay.address
    near = address is not None and stranger.address in address.network
    return cluster.flannel.backend.tunnels and not (cluster.flannel.direct and near)


def traces(cluster: Cluster, facts: Facts, node: str, stranger: Stranger) -> dict[str, list[str]]:
    """What of a peer is in a node's kernel."""
    state, device = facts.node(node), cluster.flannel.tunnel_device
    near = [n for n in state.neighbours if n.dev == device and n.address == stranger.subnet[0]]
    found = {
        "routes": [f"{r.gateway} {r.dev}{' onlink' * ('onlink' in r.flags)}" for r in state.routes_to(stranger.subnet)],
        "neighbours": [f"{n.mac} {' '.join(sorted(n.state))}" for n in near],
        "entries": [e.mac for e in state.fdb if e.dev == device and e.dst == stranger.address],
    }
    if cluster.flannel.backend.type == "wireguard" and state.link(str(device)):
        _, peers = read_wireguard(cluster.lab.node(node), str(device))
        found["peers"] = [peer.key for peer in peers if str(stranger.subnet) in peer.allowed]
    if cluster.flannel.backend.type == "ipsec":
        policies = read_policies(cluster.lab.node(node))
        found["policies"] = [one.direction for one in policies if stranger.subnet in (one.source, one.target)]
    return {kind: lines for kind, lines in found.items() if lines}


def in_tunnel(cluster: Cluster, stranger: Stranger) -> dict[str, list[str]]:
    """What a peer that is reached through the tunnel leaves in the kernel."""
    route = f"{stranger.subnet[0]} {cluster.flannel.tunnel_device} onlink"
    return {"routes": [route], "neighbours": [f"{stranger.mac} PERMANENT"], "entries": [stranger.mac]}


def on_link(node: Node, stranger: Stranger) -> dict[str, list[str]]:
    """What a peer that is reached directly leaves there."""
    return {"routes": [f"{stranger.address} {node.spec.underlay.name}"]}


def followed(cluster: Cluster, facts: Facts, stranger: Stranger) -> None:
    """Wait until every member has what leads to the stranger, and no more."""

    def look() -> None:
        for node in cluster.members:
            tunnel = tunnelled(cluster, node, stranger)
            wanted = in_tunnel(cluster, stranger) if tunnel else on_link(node, stranger)
            found = traces(cluster, facts, node.name, stranger)
            assert found == wanted, f"{node.name}: {found}, not {wanted}"

    facts.forget()
    facts.eventually(look)


def gone(cluster: Cluster, facts: Facts, stranger: Stranger) -> None:
    """Wait until no member has anything of the stranger's."""

    def look() -> None:
        for node in cluster.members:
            found = traces(cluster, facts, node.name, stranger)
            assert not found, f"{node.name} still has {found}"

    facts.forget()
    facts.eventually(look)


@check("VXC-07")
def test_a_node_that_joins_is_known_everywhere(cluster: Cluster, facts: Facts) -> None:
    """Within 5 s, and on each node the neighbour first, then the forwarding entry, then the route. Source: S2, src."""
    etcd, stranger = needs_etcd(cluster), Stranger.new(cluster)
    node = next((node for node in cluster.members if tunnelled(cluster, node, stranger)), None)
    if node is None:
        pytest.skip("no member of this lab reaches that peer through the tunnel")
    with recorded_changes(node) as changes, made_up_leases(etcd, {stranger.subnet: stranger.lease(cluster)}):
        followed(cluster, facts, stranger)
        told = [line for line in changes() if not line.startswith("Deleted")]
    places = {
        "neighbour": [at for at, line in enumerate(told) if line.startswith(f"{stranger.subnet[0]} ")],
        "entry": [at for at, line in enumerate(told) if line.startswith(f"{stranger.address} ")],
        "route": [at for at, line in enumerate(told) if line.startswith(f"{stranger.subnet} ")],
    }
    assert all(places.values()), f"{node.name}: the kernel told of {told}"
    order = sorted(places, key=lambda kind: places[kind][0])
    assert order == ["neighbour", "entry", "route"], f"{node.name}: in the order {order}"
    gone(cluster, facts, stranger)


@check("VXC-08")
def test_nothing_is_left_of_a_node_that_leaves(cluster: Cluster, facts: Facts) -> None:
    """Route, neighbour and forwarding entry are gone everywhere within 5 s. Source: S2."""
    etcd, stranger = needs_etcd(cluster), Stranger.new(cluster)
    with made_up_leases(etcd, {stranger.subnet: stranger.lease(cluster)}):
        followed(cluster, facts, stranger)
    gone(cluster, facts, stranger)


@check("VXC-09")
def test_a_peer_s_new_mac_takes_the_old_one_s_place(cluster: Cluster, facts: Facts) -> None:
    """The neighbour and the forwarding entry are the new one's, and the old entry is gone. Source: #533, #1788."""
    etcd, stranger = needs_etcd(cluster), Stranger.new(cluster)
    with made_up_leases(etcd, {stranger.subnet: stranger.lease(cluster)}):
        followed(cluster, facts, stranger)
        changed = replace(stranger, mac=random_mac())
        try:
            with made_up_leases(etcd, {changed.subnet: changed.lease(cluster)}):
                followed(cluster, facts, changed)
        finally:
            for node in cluster.members:
                clear_entries(cluster, facts, node.name, changed, stranger.mac)
    gone(cluster, facts, stranger)


def clear_entries(cluster: Cluster, facts: Facts, node: str, stranger: Stranger, *macs: str) -> None:
    """Take away by hand the forwarding entries that flanneld has left, so that the rows behind this one hold."""
    device = str(cluster.flannel.tunnel_device)
    facts.forget()
    left = [mac for mac in traces(cluster, facts, node, stranger).get("entries", ()) if mac in macs]
    for mac in left:
        entry = ["bridge", "fdb", "delete", mac, "dev", device, "dst", str(stranger.address)]
        cluster.lab.node(node).run(entry, check=False)


@check("VXC-10", disruptive=True)
def test_what_left_while_flanneld_was_away_is_cleaned_up(cluster: Cluster, facts: Facts) -> None:
    """A peer whose lease ended meanwhile has nothing in the kernel once flanneld runs again. Source: #2554."""
    if cluster.flannel.backend.type == "udp":
        pytest.skip("udp keeps nothing of a peer in the kernel")
    etcd, stranger, node = needs_etcd(cluster), Stranger.new(cluster), cluster.members[0].name

    def programmed() -> None:
        assert traces(cluster, facts, node, stranger), f"{node} has nothing of a new peer's"

    def cleaned() -> None:
        found = traces(cluster, facts, node, stranger)
        assert not found, f"{node} still has {found}"

    facts.forget()
    try:
        with made_up_leases(etcd, {stranger.subnet: stranger.lease(cluster)}):
            facts.eventually(programmed)
            cluster.stop_flanneld(node)
        cluster.start_flanneld(node)
        facts.forget()
        facts.eventually(cleaned, seconds=RESTART_SECONDS)
        facts.eventually(lambda: peers_are_back(cluster, facts, node), seconds=RESTART_SECONDS)
    finally:
        if cluster.flanneld_pid(node) is None:
            cluster.start_flanneld(node)
        clear(cluster, facts, node, stranger)


def peers_are_back(cluster: Cluster, facts: Facts, node: str) -> None:
    """Every peer that can be reached has its route, also where that was taken away with a device."""
    if cluster.flannel.backend.type in ("wireguard", "ipsec"):
        return
    state = facts.node(node)
    missing = [
        peer
        for peer, cidr in {**facts.tunnelled_peers(node), **facts.direct_peers(node)}.items()
        if not state.routes_to(cidr)
    ]
    assert not missing, f"{node} has no route to {missing}"


def clear(cluster: Cluster, facts: Facts, node: str, stranger: Stranger) -> None:
    """Take away by hand what flanneld has left, so that the rows behind this one can say their own."""
    place, device = cluster.lab.node(node), str(cluster.flannel.tunnel_device)
    left = traces(cluster, facts, node, stranger)
    if "routes" in left:
        place.run(["ip", "route", "delete", str(stranger.subnet)], check=False)
    if "neighbours" in left:
        place.run(["ip", "neighbour", "delete", str(stranger.subnet[0]), "dev", device], check=False)
    clear_entries(cluster, facts, node, stranger, stranger.mac)
    facts.forget()


@check("VXC-11")
def test_peers_beyond_a_router_need_no_mac_of_a_host(path: Path, cluster: Cluster, facts: Facts) -> None:
    """All that leads to one comes from its lease: an end in another subnet, and no neighbour there. Source: S4."""
    source, target = path.source_node, path.target_node
    mac = facts.link(target.name, str(cluster.flannel.tunnel_device)).mac

    def look() -> None:
        ends = [e.dst for e in facts.node(source.name).fdb if e.mac == mac and e.dst]
        assert ends == [target.spec.ip], f"{source.name}: {mac} goes to {ends}"

    facts.eventually(look, seconds=CONVERGED_SECONDS)
    address = source.spec.underlay.address
    assert address is not None
    assert target.spec.ip not in address.network, f"{target.name} is in {source.name}'s own subnet"
    assert mac not in {node.spec.underlay.mac for node in cluster.members}, f"{mac} is the MAC of a node's own card"
    answer = ping(path.source, path.address)
    assert answer.lost == 0, answer.output
    facts.forget()
    known = [n for n in facts.node(source.name).neighbours if n.address == target.spec.ip]
    assert not known, f"{source.name} has the neighbour {known}"
