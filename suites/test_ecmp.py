"""ECMP: how flows spread over the fabric."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from testbed.checks import check
from testbed.fixtures import Path
from testbed.model import LabSpec, Role
from testbed.nodes.deploy import Cluster
from testbed.probes.capture import Window
from testbed.probes.flows import Nonce, ping, udp_flows
from testbed.probes.iproute import read_state

FLOWS = 256
DISTINCT = 200
MARGIN = 15.0
"""Percentage points that a link's share may differ from an equal one, for so many flows."""


def many_flows(path: Path) -> Nonce:
    """Send one datagram in each of many flows; every one has to be answered."""
    nonce = Nonce.new()
    flows = udp_flows(path.source, path.address, count=FLOWS, nonce=nonce)
    lost = sum(not flow.reply for flow in flows)
    assert lost == 0, f"{lost} of {FLOWS} flows had no answer"
    return nonce


@check("ECMP-01")
def test_flows_have_entropy(path: Path, window: Window) -> None:
    """256 inner flows have at least 200 outer source ports. Source: S0."""
    nonce, source = many_flows(path), path.source_node.spec.ip
    seen = window.select(path.source_nic, nonce, lambda p: bool(p.ip and p.ip.src == source), at_least=FLOWS)
    assert len(seen) == FLOWS, f"{len(seen)} packets left {path.source_nic}, {FLOWS} were sent"
    ports = {p.udp.sport for p in seen if p.udp}
    assert len(ports) >= DISTINCT, f"{len(ports)} outer source ports for {FLOWS} flows"


def uplinks(lab: LabSpec, node: str) -> list[str]:
    """The interfaces of a node's leaf that lead to spines."""
    leaf, spines = lab.node(node).rack, {spine.name for spine in lab.of_role(Role.SPINE)}
    ends = [(link.a, link.b) for link in lab.links] + [(link.b, link.a) for link in lab.links]
    return sorted(near.iface for near, far in ends if near.node == leaf and far.node in spines)


@check("ECMP-02")
def test_flows_load_every_spine(path: Path, cluster: Cluster) -> None:
    """Each uplink of the leaf carries its share, within 15 points. Source: S0, sonic tests/ecmp."""
    lab = cluster.lab.spec
    names = uplinks(lab, path.source_node.name)
    if len(names) < 2:
        pytest.skip(f"{lab.topology} has no two ways between its leaves")
    counts = sent_by(cluster, path, names, lambda: many_flows(path))
    total = sum(counts.values())
    assert total >= FLOWS, f"{total} packets went up for {FLOWS} flows"
    shares = {name: 100 * count / total for name, count in counts.items()}
    fair = 100 / len(names)
    assert all(abs(share - fair) <= MARGIN for share in shares.values()), f"the uplinks carried {counts}"


def sent_by(cluster: Cluster, path: Path, names: list[str], send: Callable[[], object]) -> dict[str, int]:
    """How many packets the leaf of the path's source sent up by each of these interfaces while it sent something."""
    leaf = cluster.lab.node(str(cluster.lab.spec.node(path.source_node.name).rack))

    def sent() -> dict[str, int]:
        state = read_state(leaf, fdb=False)
        return {link.name: link.tx_packets for link in state.links if link.name in names}

    before = sent()
    send()
    after = sent()
    return {name: after[name] - before[name] for name in names}


HASHES_INSIDE = (2, 3)
"""Values of fib_multipath_hash_policy by which a router looks into a tunnel."""
PINGS, EACH = 12, 16
"""Flows without ports, and packets of each: far more than the routing protocol's own."""


def many_pings(path: Path) -> None:
    """Send pings with ids of their own.

    Not UDP: the sender's kernel hashes the ports of what it encapsulates, and in a lab of one kernel that hash goes
    along with the packet to the switches, which would then spread what they could not tell apart.
    """
    for _ in range(PINGS):
        answer = ping(path.source, path.address, count=EACH, interval=0.01)
        assert answer.lost == 0, answer.output


@check("ECMP-03", encapsulated=True)
def test_the_leaf_s_hash_decides_whether_ipip_spreads(path: Path, cluster: Cluster) -> None:
    """By the outer header alone all flows of two nodes take one uplink; by the inner one they spread. Source: S0."""
    names = uplinks(cluster.lab.spec, path.source_node.name)
    if len(names) < 2:
        pytest.skip(f"{cluster.lab.spec.topology} has no two ways between its leaves")
    leaf = cluster.lab.node(str(cluster.lab.spec.node(path.source_node.name).rack))
    policy = int(leaf.run(["sysctl", "-n", "net.ipv4.fib_multipath_hash_policy"]).stdout)
    inside = policy in HASHES_INSIDE
    counts = sent_by(cluster, path, names, lambda: many_flows(path) if inside else many_pings(path))
    most, total = max(counts.values()), sum(counts.values())
    if inside:
        assert most < 0.75 * total, f"hash policy {policy}, but the uplinks carried {counts}"
    else:
        assert most >= PINGS * EACH, f"hash policy {policy}, but the uplinks carried {counts}"
        assert total - most < PINGS * EACH / 2, f"hash policy {policy}, but the uplinks carried {counts}"
