"""NAT: what flannel's rules do to flows of other directions than those of `test_nat.py`."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest

from testbed.checks import check, inconclusive
from testbed.fixtures import Path, Paths
from testbed.nodes.deploy import Cluster
from testbed.probes.capture import Window
from testbed.probes.conntrack import connections_between, read_counters
from testbed.probes.detour import detour
from testbed.probes.flows import Nonce, http_get, ping, udp_flows
from testbed.probes.translated import translated

GROUP = IPv4Address("239.77.1.9")
"""A multicast group that nobody is in."""
FLOWS = 500
UNCHANGED = FLOWS // 10
"""So many flows may keep their port by chance, which is far more than a random choice among 64512 leaves."""


def need_masquerading(cluster: Cluster) -> None:
    """Skip where flanneld was told not to masquerade."""
    if not cluster.flannel.ip_masq:
        pytest.skip("flanneld runs without --ip-masq")


@check("NAT-04")
def test_a_remote_pod_s_address_reaches_the_local_pod(path: Path) -> None:
    """The other way round: a remote pod asks, and its own address is seen, untranslated. Source: #964."""
    here, there = path.pods
    answer = http_get(there, here.address)
    assert not answer.error, answer.error
    assert (answer.pod, answer.peer) == (here.pod_name, there.address), f"{answer.facts}"
    tracked = connections_between(here.node, "tcp", there.address, here.address)
    mine = [c for c in tracked if c.original.sport == answer.sport]
    assert len(mine) == 1, f"{len(mine)} connections tracked on {here.node.name}"
    assert not mine[0].translated, f"{mine[0]}"


@check("NAT-05")
def test_an_outside_address_reaches_the_pods_of_the_node_it_came_to(paths: Paths, cluster: Cluster) -> None:
    """A host with a route to the node's podCIDR is seen by the pod as it is. Source: S4."""
    need_masquerading(cluster)
    pod = paths.remote().source
    outside = cluster.lab.node(cluster.lab.spec.outside.name)
    with detour(cluster.lab, cluster.pod_cidr(pod.node.name), pod.node.name):
        answer = http_get(outside, pod.address)
    assert not answer.error, answer.error
    seen = (answer.pod, answer.peer)
    assert seen == (pod.pod_name, outside.spec.ip), f"{answer.facts}, not from {outside.spec.ip}"


@check("NAT-08")
def test_a_pod_s_packets_to_its_own_node_are_not_translated(paths: Paths, cluster: Cluster, window: Window) -> None:
    """They end at the node and meet no masquerading; the bridge sees both ends' own addresses. Source: S4."""
    need_masquerading(cluster)
    pod, nonce = paths.remote().source, Nonce.new()
    node = pod.node
    answer = ping(pod, node.spec.ip, nonce=nonce, count=2)
    assert answer.lost == 0, answer.output
    seen = window.packets(f"{node.name}:{cluster.flannel.bridge}", nonce, at_least=4)
    ends = [(p.ip.src, p.ip.dst) for p in seen if p.ip]
    there = (pod.address, node.spec.ip)
    assert ends == [there, there[::-1]] * 2, f"{ends}"
    ids = {p.icmp.id for p in seen if p.icmp}
    tracked = [c for c in connections_between(node, "icmp", *there) if c.original.id in ids]
    assert len(tracked) == 1, f"{len(tracked)} connections tracked on {node.name}"
    assert not tracked[0].translated, f"{tracked[0]}"


@check("NAT-09")
def test_multicast_is_not_masqueraded(path: Path, cluster: Cluster, window: Window) -> None:
    """A pod's does not leave its node at all; what the node sends by the bridge's address keeps it. Source: S4."""
    need_masquerading(cluster)
    node, nonce, control = path.source_node, Nonce.new(), Nonce.new()
    gateway = cluster.subnet(node.name).ip
    ping(path.source, GROUP, nonce=nonce, count=2, wait=1)
    out = ["-I", node.spec.underlay.name, "-I", str(gateway)]
    node.run(["ping", "-n", "-c", "2", "-i", "0.05", "-W", "1", "-p", control.hex, *out, str(GROUP)], check=False)
    if not window.packets(f"{node.name}:{cluster.flannel.bridge}", nonce):
        inconclusive(f"the pod's multicast never came to {node.name}")
    window.absent(path.source_nic, nonce, control=control)
    seen = window.packets(path.source_nic, control, at_least=2)
    assert [p.ip.src for p in seen if p.ip] == [gateway] * 2, f"{path.source_nic}: {seen}"


@check("NAT-11")
def test_ports_of_masqueraded_flows_are_chosen_at_random(path: Path, cluster: Cluster) -> None:
    """500 flows at once: all answered, none keeps its port, and no two of them fought for one. Source: #1033, src."""
    need_masquerading(cluster)
    if cluster.flannel.flags.boolean("ip-masq-fully-random-disable", default=False):
        pytest.skip("flanneld runs with --ip-masq-fully-random-disable")
    node = path.source_node
    before = read_counters(node)["insert_failed"]
    flows = udp_flows(path.source, path.address, count=FLOWS, nonce=Nonce.new())
    lost = sum(flow.reply is None for flow in flows)
    assert lost == 0, f"{lost} of {FLOWS} flows had no answer"
    ports = {flow.sport for flow in flows}
    tracked = [
        c for c in connections_between(node, "udp", path.source.address, path.address) if c.original.sport in ports
    ]
    assert len(tracked) >= FLOWS, f"{len(tracked)} connections tracked for {FLOWS} flows"
    kept = sum(c.reply.dport == c.original.sport for c in tracked)
    assert kept < UNCHANGED, f"{kept} of {FLOWS} flows left by the port that they came with"
    failed = read_counters(node)["insert_failed"] - before
    assert failed == 0, f"{failed} connections could not be tracked, for want of a port of their own"


@check("NAT-17")
def test_translated_flows_of_one_node_come_back_by_the_bridge(paths: Paths, cluster: Cluster) -> None:
    """Forwarding is on, and rules see what is bridged: an address translated to a near pod answers. Source: #849."""
    for member in cluster.members:
        assert member.run(["sysctl", "-n", "net.ipv4.ip_forward"]).stdout.strip() == "1", f"{member.name} forwards none"
    path = paths.take("SN")
    source, target = path.pods
    with translated(path.source_node, target.address) as virtual:
        answer = http_get(source, virtual)
    assert not answer.error, f"{virtual} is {target.name}, of the same node: {answer.error}"
    assert (answer.pod, answer.peer) == (target.pod_name, source.address), f"{answer.facts}"
    for member in cluster.members:
        seen = member.run(["sysctl", "-n", "net.bridge.bridge-nf-call-iptables"]).stdout.strip()
        assert seen == "1", f"{member.name}: net.bridge.bridge-nf-call-iptables is {seen}"
