"""ECMP: how flows spread over the fabric."""

from __future__ import annotations

import re
from collections.abc import Callable
from statistics import median

import pytest

from testbed.checks import check
from testbed.fixtures import Facts, Figures, Path
from testbed.model import LabSpec, LinkEnd, LinkSpec, Role
from testbed.nodes.deploy import Cluster
from testbed.nodes.pods import Pod
from testbed.parallel import each
from testbed.probes.capture import Window
from testbed.probes.flows import Nonce, parse_ping, ping, udp_flows
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
    for answer in each(lambda _: ping(path.source, path.address, count=EACH), range(PINGS)):
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


@check("ECMP-04", encapsulated=True)
def test_one_pair_of_ports_takes_one_link(path: Path, cluster: Cluster, window: Window) -> None:
    """All packets of two nodes have one pair of ports outside, so one uplink carries them. Source: src, S0."""
    names = uplinks(cluster.lab.spec, path.source_node.name)
    if len(names) < 2:
        pytest.skip(f"{cluster.lab.spec.topology} has no two ways between its leaves")
    port, source, control = int(cluster.flannel.port or 0), path.source_node.spec.ip, Nonce.new()
    counts = sent_by(cluster, path, names, lambda: many_pings(path))
    ping(path.source_node, path.target_node.spec.ip, nonce=control)
    window.packets(path.source_nic, control, at_least=2)
    sent = [p for p in window.everything(path.source_nic, source.packed) if p.ip and p.ip.src == source and p.udp]
    ports = {(p.udp.sport, p.udp.dport) for p in sent if p.udp and p.udp.dport == port}
    assert ports == {(port, port)}, f"outer ports {ports}"
    most, total = max(counts.values()), sum(counts.values())
    assert most >= PINGS * EACH, f"the uplinks carried {counts}"
    assert total - most < PINGS * EACH / 2, f"the uplinks carried {counts}"


def link_at(lab: LabSpec, node: str, iface: str) -> LinkSpec:
    """The link that ends at an interface."""
    return next(link for link in lab.links if LinkEnd(node, iface) in (link.a, link.b))


def uplink_taken(cluster: Cluster, path: Path, names: list[str]) -> str:
    """The uplink by which the leaf of the path's source sends the pings of its pods."""
    counts = sent_by(cluster, path, names, lambda: ping(path.source, path.address, count=EACH, interval=0.01))
    taken = max(counts, key=lambda name: counts[name])
    assert counts[taken] >= EACH, f"the pings of one pair of pods took several uplinks: {counts}"
    return taken


DELAY = 150.0
"""Milliseconds that one uplink is slower than the others: what goes by it is overtaken by pings sent later."""
ANSWER = re.compile(r"icmp_seq=(\d+) .*\btime=([\d.]+)")


@check("ECMP-05", encapsulated=True)
def test_pings_of_a_pair_of_pods_stay_on_one_link(path: Path, cluster: Cluster) -> None:
    """Where one uplink is slow all pings of a pair are or none is, and none overtakes another. Source: S0."""
    lab, leaf = cluster.lab.spec, str(cluster.lab.spec.node(path.source_node.name).rack)
    names = uplinks(lab, path.source_node.name)
    if len(names) < 2:
        pytest.skip(f"{lab.topology} has no two ways between its leaves")
    taken = uplink_taken(cluster, path, names)
    for name in names:
        link = link_at(lab, leaf, name)
        far = link.b.node if link.a.node == leaf else link.a.node
        with cluster.lab.fault(link.name, delay=DELAY, towards=far):
            output = ping(path.source, path.address, count=EACH).output
        answers = [(int(number), float(time)) for number, time in ANSWER.findall(output)]
        assert [number for number, _ in answers] == list(range(1, EACH + 1)), output
        times = sorted(time for _, time in answers)
        if name == taken:
            assert times[0] >= DELAY, f"{name} is slow, by which the pings go, and not all are\n{output}"
        else:  # a busy machine may keep some of them for as long
            assert median(times) < DELAY, f"{name} is slow, and the pings go by {taken}\n{output}"


LOSS_WINDOW = 3000
"""Milliseconds without answers that are agreed on when a link goes down; BGP's hold time alone would be 9000."""
STEADY, MORE, EVERY = 60, 50, 0.01
AGREED = round(LOSS_WINDOW / 1000 / EVERY)


@check("ECMP-06", encapsulated=True, disruptive=True)
def test_flows_move_when_their_uplink_goes_down(path: Path, cluster: Cluster, facts: Facts, figures: Figures) -> None:
    """The flow's own uplink goes down: a short loss, the other way from then on, no change in the pods. Derived."""
    lab, leaf = cluster.lab.spec, str(cluster.lab.spec.node(path.source_node.name).rack)
    names = uplinks(lab, path.source_node.name)
    if len(names) < 2:
        pytest.skip(f"{lab.topology} has no two ways between its leaves")
    taken = uplink_taken(cluster, path, names)
    pods = {pod.name: settled(facts, pod) for pod in path.pods}
    argv = ["ping", "-n", "-i", f"{EVERY:g}", "-c", str(STEADY + AGREED + MORE), "-W", "2", str(path.address)]
    flow = path.source.spawn(argv)
    assert flow.stdout is not None
    said = b"".join(flow.stdout.readline() for _ in range(STEADY))
    with cluster.lab.fault(link_at(lab, leaf, taken).name, down=True):
        said += flow.stdout.read()
        flow.wait(10)
        counts = sent_by(cluster, path, names, lambda: many_flows(path))
        facts.forget()
        assert {pod.name: settled(facts, pod) for pod in path.pods} == pods, "the pods' own state has changed"
    facts.forget()
    answer = parse_ping(said.decode(), path.source.name)
    window = answer.lost * EVERY * 1000
    figures.add("without an answer when an uplink goes down", window, "ms", LOSS_WINDOW)
    assert 0 < window <= LOSS_WINDOW, f"{window:.0f} ms without an answer, {LOSS_WINDOW} are agreed on"
    assert answer.sent == STEADY + AGREED + MORE, answer.output
    assert counts[taken] == 0, f"the uplink that is down carried {counts}"
    assert sum(counts.values()) >= FLOWS, f"the uplinks carried {counts} for {FLOWS} flows"


def settled(facts: Facts, pod: Pod) -> object:
    """A pod's addresses and routes, which are to outlast any trouble of the fabric."""
    state = facts.pod(pod)
    return [(link.name, link.mac, link.mtu, link.addresses) for link in state.links], state.routes
