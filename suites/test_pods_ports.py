"""POD: what is between a pod and its node's bridge, and what the bridge knows of it."""

from __future__ import annotations

from collections import Counter
from ipaddress import IPv4Interface

from testbed.checks import check
from testbed.fixtures import Facts
from testbed.nodes.deploy import Cluster
from testbed.nodes.scratch import scratch_pod
from testbed.probes.flows import ping
from testbed.probes.iproute import read_state


def ports_of(facts: Facts, node: str) -> set[str]:
    """The names of the bridge's ports on a node, as they are now."""
    facts.forget()
    bridge = facts.cluster.flannel.bridge
    return {link.name for link in facts.node(node).links if link.master == bridge}


@check("POD-02")
def test_bridge_has_one_veth_for_each_pod(cluster: Cluster, facts: Facts) -> None:
    """As many ports as pods, one more for one pod more, and none for what is in the node's network. Source: S0-S2."""
    for node in cluster.members:
        facts.forget()
        pods = [pod for pod in cluster.pods.values() if pod.node.name == node.name]
        veths = sorted(facts.host_veth(pod).name for pod in pods)
        assert sorted(ports_of(facts, node.name)) == veths, f"{node.name} has other ports than {len(pods)} pods"
        known = {node.spec.underlay.name, *veths}
        others = [one.name for one in facts.node(node.name).links if one.kind == "veth" and one.name not in known]
        assert not others, f"{node.name} has the veths {others} of no pod"
    node = cluster.members[-1]
    before = ports_of(facts, node.name)
    with scratch_pod(cluster, node.name) as pod:
        assert ports_of(facts, node.name) == before | {facts.host_veth(pod).name}
    assert ports_of(facts, node.name) == before, "a pod that is gone leaves its veth"


@check("POD-03")
def test_both_ends_of_a_veth_name_each_other(cluster: Cluster, facts: Facts) -> None:
    """The index of the node's end is the pod's peer index and the other way round, and CNI named it. Source: S1, S0."""
    for pod in cluster.pods.values():
        facts.forget()
        inside, outside = facts.pod(pod).link("eth0"), facts.host_veth(pod)
        assert inside is not None
        assert (outside.kind, inside.kind) == ("veth", "veth"), pod.name
        assert outside.peer_index == inside.index, f"{pod.name}: {outside.name} leads to index {outside.peer_index}"
        assert outside.master == cluster.flannel.bridge, f"{pod.name}: {outside.name} is no port of the bridge"
        named = [one for one in pod.result["interfaces"] if not one.get("sandbox")]
        assert {"name": outside.name, "mac": outside.mac} in named, f"{pod.name}: {outside.name} is none of {named}"


@check("POD-04")
def test_pod_has_one_address_of_its_nodes_subnet(cluster: Cluster, facts: Facts) -> None:
    """With the podCIDR's mask, and no two pods have the same. Source: S1, S3, #1437."""
    facts.forget()
    for pod in cluster.pods.values():
        cidr = cluster.pod_cidr(pod.node.name)
        inside = facts.pod(pod).link("eth0")
        assert inside is not None, f"{pod.name} has no eth0"
        assert inside.addresses == (IPv4Interface((pod.address, cidr.prefixlen)),), f"{pod.name}: {inside.addresses}"
        assert pod.address in cidr, f"{pod.name}: {pod.address} is outside {cidr}"
    twice = [address for address, count in Counter(pod.address for pod in cluster.pods.values()).items() if count > 1]
    assert not twice, f"{twice} are the addresses of several pods"


@check("POD-10")
def test_bridge_has_learnt_where_each_pod_is(cluster: Cluster, facts: Facts) -> None:
    """A pod's MAC is behind its own veth alone, learnt and not for good. Source: S0, S1, S2."""
    bridge = cluster.flannel.bridge
    for pod in cluster.pods.values():
        ping(pod.node, pod.address)
        veth = facts.host_veth(pod)
        entries = [one for one in read_state(pod.node).fdb if one.mac == pod.mac and one.master == bridge]
        found = [(one.dev, one.state) for one in entries]
        assert [dev for dev, _ in found] == [veth.name], f"{pod.name}: {pod.mac} is behind {found}, not {veth.name}"
        assert found[0][1] not in ("permanent", "static", "noarp"), f"{pod.name}: {found} ages never"


@check("POD-12")
def test_ports_send_back_what_came_from_them(cluster: Cluster, facts: Facts) -> None:
    """Each pod's port has hairpin as the conflist says. Source: S0."""
    wanted = bool(cluster.flannel.delegate.get("hairpinMode"))
    facts.forget()
    for pod in cluster.pods.values():
        veth = facts.host_veth(pod)
        assert veth.port.get("hairpin") is wanted, f"{pod.name}: hairpin of {veth.name} is {veth.port.get('hairpin')}"
