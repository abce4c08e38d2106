"""POD: a node that comes back with another podCIDR."""

from __future__ import annotations

import pytest

from testbed.checks import check
from testbed.fixtures import Facts
from testbed.nodes.cni import CniError
from testbed.nodes.deploy import Cluster
from testbed.nodes.madeup import etcd_of
from testbed.nodes.pods import Pod
from testbed.nodes.rejoin import other_subnet
from testbed.nodes.scratch import discard
from testbed.probes.flows import http_get

BACK_SECONDS = 20.0


@check("POD-17", disruptive=True)
def test_bridge_s_address_follows_the_pod_cidr(cluster: Cluster, facts: Facts) -> None:
    """After a node has got another one; or the next pod is refused for the bridge's address. Source: #1850, cni#306."""
    etcd = etcd_of(cluster)
    if etcd is None:
        pytest.skip("the podCIDR of a node of Kubernetes cannot change")
    node, bridge = cluster.members[-1], cluster.flannel.bridge
    try:
        with other_subnet(cluster, etcd, node) as cidr:
            own = f"{cidr[1]}/{cidr.prefixlen}"
            pod, refused = tried(cluster, node.name)
            if pod is None:
                wanted = f'"{bridge}" already has an IP address different from {own}'
                assert wanted in refused, f"{node.name}'s pods are refused by: {refused}"
            else:
                facts.forget()
                has = [str(address) for address in facts.link(node.name, bridge).addresses]
                assert has == [own], f"{node.name}: {bridge} has {has}, its subnet is {cidr}"
                discard(cluster, pod)
    finally:
        facts.forget()
    facts.eventually(lambda: reached_again(cluster, node.name), seconds=BACK_SECONDS)


def tried(cluster: Cluster, node: str) -> tuple[Pod | None, str]:
    """A pod, or why there is none."""
    try:
        return cluster.add_pod(node, "scratch"), ""
    except CniError as error:
        return None, str(error)


def reached_again(cluster: Cluster, name: str) -> None:
    """The node's pods are reached by the others' again, as far as the backend reaches them at all."""
    spec = cluster.lab.spec
    for source in cluster.pods.values():
        for target in [pod for pod in cluster.pods.values() if pod.node.name == name]:
            if cluster.flannel.backend.tunnels or spec.same_subnet(source.node.name, name):
                answer = http_get(source, target.address)
                assert not answer.error, f"{source.name} to {target.name}: {answer.error}"
