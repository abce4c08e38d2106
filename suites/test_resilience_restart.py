"""RES: a node that starts anew."""

from __future__ import annotations

from collections.abc import Callable

from testbed.checks import check
from testbed.deadline import Deadline
from testbed.fixtures import Facts, Paths
from testbed.labs.base import Node
from testbed.nodes.deploy import Cluster
from testbed.nodes.restart import restart_node
from testbed.probes.flows import http_get

WELL_SECONDS = 60.0
"""RES-07's bound, which counts from flannel's being ready."""
FORGOTTEN_SECONDS = 10.0
"""How long peers may keep what is stale once they reach the node: they have its new lease then."""


def cabling(facts: Facts, node: Node) -> set[tuple[str, str, int, tuple[str, ...], bool]]:
    """The node's ports to the fabric: name, MAC, MTU, addresses, and whether it has its carrier."""
    links = [facts.link(node.name, iface.name) for iface in node.spec.ifaces]
    return {(link.name, link.mac, link.mtu, tuple(map(str, link.addresses)), link.up) for link in links}


def unreached(cluster: Cluster, facts: Facts, name: str) -> list[str]:
    """Which pods of other nodes and the node's own do not reach each other, with the reason."""
    faults = []
    for peer in {**facts.tunnelled_peers(name), **facts.direct_peers(name)}:
        there, here = (next(pod for pod in cluster.pods.values() if pod.node.name == node) for node in (peer, name))
        for source, target in ((there, here), (here, there)):
            answer = http_get(source, target.address)
            if answer.error or (answer.facts.get("node"), answer.peer) != (target.node.name, source.address):
                faults.append(f"{source.name} does not reach {target.name}: {answer.error or answer.facts}")
    return faults


def stale(cluster: Cluster, facts: Facts, node: Node) -> list[str]:
    """What other nodes' tunnels have of the node that is not so any more."""
    device = cluster.flannel.tunnel_device
    own = facts.node(node.name).link(device) if device else None
    return [
        f"{peer.name}: {entry.mac} dst {entry.dst}"
        for peer in cluster.members
        for entry in facts.node(peer.name).fdb
        if own and entry.dev == device and entry.dst == node.spec.ip and entry.mac != own.mac
    ]


@check("RES-15", disruptive=True)
def test_flannel_is_well_after_a_node_has_started_anew(paths: Paths, cluster: Cluster, facts: Facts) -> None:
    """Its ports, lease and podCIDR are as before, its pods reached and reaching. Source: #1474, #1828, #1946."""
    node = paths.remote().target_node
    ports, cidr = cabling(facts, node), cluster.pod_cidr(node.name)
    restart_node(cluster, node.name)

    def none_of(look: Callable[[], list[str]], seconds: float) -> list[str]:
        """What is wrong still, where it is not put right in time."""
        last: list[str] = []

        def attempt() -> bool:
            facts.forget()
            last[:] = look()
            return not last

        Deadline(seconds).poll(attempt, every=0.2)
        return last

    facts.forget()
    assert cabling(facts, cluster.lab.node(node.name)) == ports, f"{node.name} is not cabled as before"
    assert cluster.pod_cidr(node.name) == cidr, f"{node.name} has another subnet than {cidr}"
    lost = none_of(lambda: unreached(cluster, facts, node.name), WELL_SECONDS)
    assert not lost, "; ".join(lost)
    old = none_of(lambda: stale(cluster, facts, node), FORGOTTEN_SECONDS)
    assert not old, f"stale of {node.name}: {'; '.join(old)}"
