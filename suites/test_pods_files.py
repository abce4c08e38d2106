"""POD: what CNI keeps on a node's disk, from the first pod to the last one's end."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Network
from typing import Any

import pytest

from testbed.checks import check
from testbed.fixtures import Facts
from testbed.labs.base import Node
from testbed.nodes import cni
from testbed.nodes.cni import CniError
from testbed.nodes.deploy import Cluster
from testbed.nodes.pods import Pod
from testbed.nodes.scratch import discard, scratch_pod
from testbed.probes.cnifiles import CniFiles, read_cni_files
from testbed.probes.iproute import read_state


def files_of(cluster: Cluster, node: Node) -> CniFiles:
    """CNI's files on a node."""
    return read_cni_files(node, str(cluster.flannel.cni_conf["name"]))


def expected_conf(cluster: Cluster, facts: Facts, node: str) -> dict[str, Any]:
    """What flannel has to hand to the bridge plugin on a node, without the addresses."""
    return {
        "name": cluster.flannel.cni_conf["name"],
        "type": "bridge",
        "mtu": facts.mtu(node),
        "isGateway": True,
        "ipMasq": not cluster.flannel.ip_masq,
    }


def subnets_in(conf: Mapping[str, Any]) -> list[IPv4Network]:
    """The IPv4 subnets of a delegate's configuration."""
    ranges = [one["subnet"] for group in conf.get("ipam", {}).get("ranges", ()) for one in group]
    return [IPv4Network(subnet) for subnet in ranges if ":" not in subnet]


@check("POD-13")
def test_each_pod_has_a_reservation_and_a_saved_configuration(cluster: Cluster, facts: Facts) -> None:
    """MTU, gateway, the podCIDR, and masquerading where flanneld does none, never by both. Source: S4, src."""
    with scratch_pod(cluster, cluster.members[-1].name):
        for pod in cluster.pods.values():
            found = files_of(cluster, pod.node)
            assert found.reserved.get(pod.address) == pod.container_id, f"{pod.name}: {pod.address} is not its own"
            conf = found.delegates.get(pod.container_id)
            assert conf is not None, f"{pod.name}: nothing is saved of {pod.container_id}"
            wanted = expected_conf(cluster, facts, pod.node.name)
            said = {key: conf.get(key) for key in wanted}
            assert said == wanted, f"{pod.name}: the delegate was told {said}"
            assert subnets_in(conf) == [cluster.pod_cidr(pod.node.name)], f"{pod.name}: {conf['ipam']}"


@check("POD-14")
def test_del_leaves_nothing_and_may_come_again(cluster: Cluster, facts: Facts) -> None:
    """Both files, veth and forwarding entry go; the next pod gets another address. Source: S4, CNI spec."""
    node, conflist = cluster.members[-1], cluster.flannel.cni_conf
    pod = cluster.add_pod(node.name, "scratch")
    try:
        facts.forget()
        veth = facts.host_veth(pod).name
        for turn in ("the first", "the second"):
            cni.delete(node, conflist, pod.attachment, pod.result)
            gone(cluster, pod, veth, turn)
    finally:
        discard(cluster, pod)
    with scratch_pod(cluster, node.name, "again") as another:
        assert another.address != pod.address, f"{pod.address} is given out again at once"


def gone(cluster: Cluster, pod: Pod, veth: str, turn: str) -> None:
    """Nothing of a pod is on its node after a DEL."""
    left = files_of(cluster, pod.node)
    assert not left.of(pod.container_id), f"{turn} DEL leaves the reservation of {left.of(pod.container_id)}"
    assert pod.container_id not in left.delegates, f"{turn} DEL leaves what was saved of the container"
    state = read_state(pod.node)
    assert not state.link(veth), f"{turn} DEL leaves {veth}"
    entries = [one for one in state.fdb if one.mac == pod.mac]
    assert not entries, f"{turn} DEL leaves {entries}"


@check("POD-15", disruptive=True)
def test_addresses_are_reserved_for_live_pods_alone(cluster: Cluster, facts: Facts) -> None:
    """As many files as pods, also after a reboot took the pods' networks away. Source: plugins#697, k8s#108121."""

    def look(when: str) -> None:
        for node in cluster.members:
            found = files_of(cluster, node)
            wanted = {pod.address: pod.container_id for pod in cluster.pods.values() if pod.node.name == node.name}
            v4 = {address: who for address, who in found.reserved.items() if address.version == 4}
            assert v4 == wanted, f"{node.name}, {when}: {v4}, of pods {wanted}"
            assert set(found.delegates) == set(wanted.values()), f"{node.name}, {when}: {sorted(found.delegates)}"

    look("at first")
    node = cluster.members[-1]
    lost = [pod for pod in cluster.pods.values() if pod.node.name == node.name]
    for pod in lost:
        lose_network(pod)
    node.run(["ip", "link", "delete", cluster.flannel.bridge])
    try:
        for pod in lost:
            cluster.delete_pod(pod)
        look("after a reboot")
    finally:
        facts.forget()
        for pod in lost:
            discard(cluster, pod)
        for pod in lost:
            cluster.add_pod(node.name, pod.pod_name)
    look("with pods made anew")


def lose_network(pod: Pod) -> None:
    """Take a pod's network away as a reboot does, with nobody told; an empty namespace is what a runtime makes then."""
    name = pod.netns.rpartition("/")[2]
    pod.node.run(["sh", "-c", 'kill "$(cat "$1")"', "stop", f"/run/pod-{pod.pod_name}.pid"])
    pod.node.run(["ip", "netns", "delete", name])
    pod.node.run(["ip", "netns", "add", name])


@check("POD-16", disruptive=True)
def test_without_subnet_env_no_pod_starts_and_the_error_names_it(cluster: Cluster) -> None:
    """Once the file is back pods start again, and nothing but flannel had to do anything. Source: S4, docs."""
    node, path = cluster.members[-1], cluster.flannel.subnet_file
    text = node.read(path)
    node.run(["rm", path])
    try:
        with pytest.raises(CniError) as refused, scratch_pod(cluster, node.name):
            pass
    finally:
        node.write(path, text)
    assert path in str(refused.value), f"ADD says only: {refused.value}"
    with scratch_pod(cluster, node.name) as pod:
        assert pod.address in cluster.pod_cidr(node.name)


@check("POD-11")
def test_bridge_is_the_tool_and_not_the_plugin(cluster: Cluster) -> None:
    """What the test-bed calls as `bridge` on a node is iproute2's, not the CNI plugin of that name. Source: S4."""
    for node in cluster.members:
        said = node.run(["bridge", "-V"], check=False)
        text = (said.stdout + said.stderr).strip()
        assert text.startswith("bridge utility"), f"{node.name}: `bridge` is another program: {text[:100]!r}"
