"""The kernel state that flanneld makes for a peer, made by `ip` and `bridge` alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from testbed.deadline import Deadline
from testbed.labs.base import Node
from testbed.nodes.madeuppeer import sweep_entries
from testbed.nodes.otherwise import restart_flanneld
from testbed.probes.iproute import read_state

if TYPE_CHECKING:
    from testbed.fixtures import Facts
    from testbed.nodes.deploy import Cluster

BACK_SECONDS = 20.0


@contextmanager
def without_flanneld(cluster: Cluster, facts: Facts, nodes: tuple[Node, Node]) -> Iterator[None]:
    """Two nodes without a flanneld and without anything of one, but with what they need to reach each other.

    Their flannelds run again at the end, and have made their own again.  Only for vxlan and host-gw over IPv4.
    """
    facts.forget()
    macs = {node.name: _mac(cluster, facts, node) for node in nodes}
    try:
        for node in nodes:
            cluster.stop_flanneld(node.name)
            _take_away(cluster, facts, node)
        for node, peer in (nodes, nodes[::-1]):
            for argv in _commands(cluster, facts, node, peer, macs):
                node.run(argv)
        facts.forget()
        yield
    finally:
        for node in nodes:
            facts.forget()
            _take_away(cluster, facts, node)
            restart_flanneld(cluster, node.name)
        facts.forget()
        _wait(cluster, facts, nodes)
        sweep_entries(cluster)


def _mac(cluster: Cluster, facts: Facts, node: Node) -> str:
    device = cluster.flannel.tunnel_device
    return facts.link(node.name, device).mac if device else ""


def _take_away(cluster: Cluster, facts: Facts, node: Node) -> None:
    """Remove the tunnel, and every route to a peer."""
    device = cluster.flannel.tunnel_device
    state = read_state(node)
    if device and state.link(device):
        node.run(["ip", "link", "delete", device])
    for route in read_state(node).routes:
        if route.dst in facts.peers(node.name).values():
            node.run(["ip", "route", "delete", str(route.dst)])


def _commands(cluster: Cluster, facts: Facts, node: Node, peer: Node, macs: dict[str, str]) -> Iterator[list[str]]:
    flannel, device, nic = cluster.flannel, str(cluster.flannel.tunnel_device), node.spec.underlay.name
    own, other = cluster.pod_cidr(node.name)[0], cluster.pod_cidr(peer.name)
    if flannel.vni is not None:
        tunnel = f"link add {device} address {macs[node.name]} mtu {facts.mtu(node.name)} type vxlan id {flannel.vni}"
        tunnel += f" local {node.spec.ip} dev {nic} dstport {flannel.port} nolearning"
        yield ["ip", *tunnel.split(), *(["gbp"] if flannel.backend_keys.get("GBP") else [])]
        yield ["ip", "address", "add", f"{own}/32", "dev", device]
        yield ["ip", "link", "set", "dev", device, "up"]
    if not facts.tunnelled(node.name, peer.name):
        yield ["ip", "route", "add", str(other), "via", str(peer.spec.ip), "dev", nic]
        return
    entry = [str(other[0]), "lladdr", macs[peer.name], "dev", device, "nud", "permanent"]
    yield ["ip", "neighbour", "add", *entry]
    yield ["bridge", "fdb", "add", macs[peer.name], "dev", device, "dst", str(peer.spec.ip), "self", "permanent"]
    yield ["ip", "route", "add", str(other), "via", str(other[0]), "dev", device, "onlink"]


def _wait(cluster: Cluster, facts: Facts, nodes: tuple[Node, ...]) -> None:
    """Wait until each has every route again, and every member that peers speak of has its tunnel's MAC."""

    def back() -> bool:
        facts.forget()
        for node in nodes:
            reached = {*facts.tunnelled_peers(node.name).values(), *facts.direct_peers(node.name).values()}
            if not reached <= {route.dst for route in facts.node(node.name).routes}:
                return False
            mac = _mac(cluster, facts, node)
            peers = [one for one in cluster.members if facts.tunnelled(one.name, node.name) and one.name != node.name]
            if mac and any(mac not in {entry.mac for entry in facts.node(one.name).fdb} for one in peers):
                return False
        return True

    Deadline(BACK_SECONDS).poll(back, every=0.2)
