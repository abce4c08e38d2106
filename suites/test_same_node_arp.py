"""L2: how two pods of one node find each other, and what lets them through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from testbed.checks import check
from testbed.fixtures import Path
from testbed.flannelspec import NFTABLES
from testbed.labs.base import Node
from testbed.nodes.deploy import Cluster
from testbed.probes.capture import Window
from testbed.probes.flows import Nonce, ping
from testbed.probes.iproute import read_state
from testbed.probes.packets import BROADCAST, Arp
from testbed.probes.rules import read_table

SWITCH = "net.bridge.bridge-nf-call-iptables"


@check("L2-01")
def test_pods_find_each_other_by_arp(path: Path, window: Window) -> None:
    """Nothing is known first; then one question to all, one answer to one, and an entry. Source: S0, S1."""
    source, target = path.pods
    nonce = Nonce.new()
    for pod, other in ((source, target), (target, source)):
        pod.run(["ip", "neighbour", "flush", "to", str(other.address)])
        left = [one for one in read_state(pod, fdb=False).neighbours if one.address == other.address and one.mac]
        assert not left, f"{pod.name} knows {other.name} without asking: {left}"
    ping(source, target.address, nonce=nonce)
    place = f"{source.name}:eth0"
    window.packets(place, nonce, at_least=2)
    about = source.address.packed
    seen = [one for one in window.everything(place, about) if one.arp and one.ether]
    asked = [(one.ether.src, one.ether.dst, one.arp) for one in seen if one.arp and one.ether and one.arp.op == 1]
    wanted = Arp(1, source.mac, source.address, "00:00:00:00:00:00", target.address)
    assert (source.mac, BROADCAST, wanted) in asked, f"{place}: {asked}"
    answers = [(one.ether.src, one.ether.dst, one.arp) for one in seen if one.arp and one.ether and one.arp.op == 2]
    # The pod may ask its gateway again meanwhile, which is another matter.
    to_source = [one for one in answers if (one[2].sender, one[2].target) == (target.address, source.address)]
    answer = Arp(2, target.mac, target.address, source.mac, source.address)
    assert to_source == [(target.mac, source.mac, answer)], f"{place} is answered by {to_source}"
    found = [one for one in read_state(source, fdb=False).neighbours if one.address == target.address]
    assert [(one.mac, "REACHABLE" in one.state) for one in found] == [(target.mac, True)], f"{source.name}: {found}"


@check("L2-06")
def test_rules_let_a_bridged_packet_through(path: Path, cluster: Cluster) -> None:
    """With bridged packets in a FORWARD chain that drops, FLANNEL-FWD lets the pods' pass. Source: #872, #799."""
    flavour = cluster.flannel.rules
    if flavour == NFTABLES:
        pytest.skip("what nftables accepts another table may drop all the same: there is no such promise")
    node = path.source_node
    with dropping(node, flavour):
        before = accepted(node, flavour)
        answer = ping(path.source, path.address, count=3)
        assert answer.lost == 0, f"{node.name} drops between its own pods: {answer.output}"
        assert accepted(node, flavour) > before, f"{node.name}: bridged packets did not pass FLANNEL-FWD"


def accepted(node: Node, flavour: str) -> int:
    """How many packets FLANNEL-FWD has let pass."""
    rules = read_table(node, flavour, "filter").chain("FLANNEL-FWD")
    return sum(rule.packets for rule in rules)


@contextmanager
def dropping(node: Node, flavour: str) -> Iterator[None]:
    """A node whose FORWARD chain drops what no rule accepts, bridged packets too."""
    before = node.run(["sysctl", "-n", SWITCH]).stdout.strip()
    policy = read_table(node, flavour, "filter").policies.get("FORWARD", "ACCEPT")
    node.run(["sysctl", "-w", f"{SWITCH}=1"])
    node.run([flavour, "-P", "FORWARD", "DROP"])
    try:
        yield
    finally:
        node.run([flavour, "-P", "FORWARD", policy])
        node.run(["sysctl", "-w", f"{SWITCH}={before}"])
