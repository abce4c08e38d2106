"""RES: what happens to a node beneath flannel, and that all is as before once it is over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from testbed.checks import check, inconclusive
from testbed.deadline import Deadline
from testbed.fixtures import Facts, Figures, Path, Paths
from testbed.flannelspec import NFTABLES
from testbed.labs.base import Node
from testbed.nodes.deploy import Cluster
from testbed.nodes.madeuppeer import sweep_entries
from testbed.nodes.otherwise import restart_flanneld
from testbed.probes.flows import ping, pinged
from testbed.probes.iproute6 import read_state6
from testbed.probes.rules import rules_of_flannel, rules_put_back
from testbed.probes.stream import streaming

HEAL_SECONDS = 35.0
"""What the catalogue gives flanneld for a device that somebody deleted."""
FLAP_SECONDS = 15.0
HEALED_SECONDS = 8.0
"""flanneld looks at rules every 5 s where nothing tells it of a change; the rest is a busy machine's."""
SETTLED_SECONDS = 20.0


def programmed(cluster: Cluster, facts: Facts, node: str) -> dict[str, frozenset[object]]:
    """What leads a node's packets to its peers: routes, neighbours, forwarding entries, the device itself."""
    state, flannel = facts.node(node), cluster.flannel
    devices = [name for name in (flannel.tunnel_device, flannel.tunnel_device6) if name]
    links = (link for link in state.links if link.name in devices)
    found: dict[str, frozenset[object]] = {
        "devices": frozenset((x.name, x.mac, x.mtu, x.up, x.addresses) for x in links),
        "routes": frozenset(
            (r.dst, r.hops, r.flags - {"linkdown"}) for r in state.routes if r.dst.subnet_of(flannel.network)
        ),
        "neighbours": frozenset(
            (n.address, n.mac, n.dev) for n in state.neighbours if n.dev in devices and "PERMANENT" in n.state
        ),
        "entries": frozenset((e.mac, e.dst, e.dev) for e in state.fdb if e.dev in devices and e.dst),
    }
    if flannel.network6 is not None:
        network6, six = flannel.network6, read_state6(cluster.lab.node(node))
        found["routes6"] = frozenset((r.dst, r.gateway, r.dev) for r in six.routes if r.dst.subnet_of(network6))
        near = (n for n in six.neighbours if n.dev in devices and "PERMANENT" in n.state)
        found["neighbours6"] = frozenset((n.address, n.mac, n.dev) for n in near)
    return found


def as_before(cluster: Cluster, facts: Facts, node: str, before: dict[str, frozenset[object]]) -> None:
    """Assert that all that leads to peers is as it was."""
    now = programmed(cluster, facts, node)
    for kind, wanted in before.items():
        found = now[kind]
        assert found == wanted, f"{node}: {kind} missing: {set(wanted - found)}, too many: {set(found - wanted)}"


@check("RES-01", disruptive=True)
def test_flows_go_on_while_flanneld_restarts(path: Path, cluster: Cluster) -> None:
    """Ended by SIGTERM and SIGKILL at both ends: no datagram is lost, and a connection goes on. Source: S4, #2538."""
    with streaming(path.source, path.address) as flow:
        for signal in ("TERM", "KILL"):
            for node in (path.source_node, path.target_node):
                restart_flanneld(cluster, node.name, signal=signal)
        flow.end()
    assert not flow.error, flow.error
    assert flow.lost == 0, f"{flow.lost} of {flow.sent} datagrams were not answered"
    assert flow.received == flow.total, f"{flow.received} of {flow.total} bytes arrived by the connection"


@check("RES-02", disruptive=True)
def test_a_deleted_device_comes_back_with_all_that_was_on_it(paths: Paths, cluster: Cluster, facts: Facts) -> None:
    """Its MAC, address, routes, neighbours and forwarding entries, and pods answer. Source: #877, #1348, src."""
    path, device = paths.remote(), str(cluster.flannel.tunnel_device)
    node = path.source_node
    before = programmed(cluster, facts, node.name)
    node.run(["ip", "link", "delete", device])
    facts.forget()
    try:
        facts.eventually(lambda: as_before(cluster, facts, node.name, before), seconds=HEAL_SECONDS)
        answer = ping(path.source, path.address, count=2)
        assert answer.lost == 0, answer.output
    finally:
        mend(cluster, facts, node, before)


def mend(cluster: Cluster, facts: Facts, node: Node, before: dict[str, frozenset[object]]) -> None:
    """For the rows behind this one: start flanneld anew, with a device of its own, where it has not mended it."""
    facts.forget()
    if programmed(cluster, facts, node.name) != before:
        for member in cluster.members:
            restart_flanneld(cluster, member.name)
        sweep_entries(cluster)
        facts.forget()


@contextmanager
def flapped(node: Node) -> Iterator[None]:
    """The node's underlay interface is down inside; behind it up, with what the node's own configuration gives it."""
    spec = node.spec
    iface = spec.underlay
    node.run(["ip", "link", "set", "dev", iface.name, "down"])
    try:
        yield
    finally:
        node.run(["ip", "link", "set", "dev", iface.name, "up"])
        node.run(["ip", "route", "replace", "default", "via", str(spec.gateway)])
        if iface.address6 is not None:
            node.run(["ip", "-6", "address", "replace", str(iface.address6), "dev", iface.name, "nodad"])
            node.run(["ip", "-6", "route", "replace", "default", "via", str(spec.gateway6)])


@check("RES-04", disruptive=True)
def test_a_flapped_underlay_leaves_nothing_missing(paths: Paths, cluster: Cluster, facts: Facts) -> None:
    """The interface goes down, with the routes by it, and up: all is back, and pods answer. Source: #1070, #1348."""
    path = paths.remote()
    node = path.source_node
    before = programmed(cluster, facts, node.name)
    with flapped(node):
        if not ping(path.source, path.address, wait=1).lost:
            inconclusive(f"{node.name}'s packets pass while its interface is down: a flap that takes nothing away")
    facts.forget()
    try:
        facts.eventually(lambda: as_before(cluster, facts, node.name, before), seconds=FLAP_SECONDS)
        facts.eventually(lambda: pinged(path.source, path.address, wait=1), seconds=FLAP_SECONDS)
    finally:
        mend(cluster, facts, node, before)


@check("RES-10", disruptive=True)
def test_flushed_tables_heal(paths: Paths, cluster: Cluster, facts: Facts, figures: Figures) -> None:
    """An operator empties every table: flannel's rules are back in 6 s, and pods reach all as before. Source: src."""
    if not cluster.flannel.ip_masq:
        pytest.skip("flanneld runs without --ip-masq")
    out, near, rules = paths.take("OUT"), paths.take("SN"), cluster.flannel.rules
    node = out.source_node
    before = rules_of_flannel(node, rules)
    tables = [[rules, "-t", table, "-F"] for table in ("filter", "nat")]

    def healed() -> None:
        found = rules_of_flannel(node, rules)
        assert found == before, f"{node.name}: {found}"

    with rules_put_back(node, rules):  # those of others than flannel
        for argv in [["nft", "flush", "ruleset"]] if rules == NFTABLES else tables:
            node.run(argv)
        deadline = Deadline(HEALED_SECONDS)
        facts.eventually(healed, seconds=HEALED_SECONDS)
        figures.add("flushed rules are back", deadline.elapsed, "s", HEALED_SECONDS)
        for path in (out, near):
            answer = ping(path.source, path.address, count=2)
            assert answer.lost == 0, f"{path.kind}: {answer.output}"
    facts.eventually(healed, seconds=SETTLED_SECONDS)
