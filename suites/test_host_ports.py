"""SVC: ports of the node that are a pod's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from testbed.checks import check
from testbed.fixtures import Paths
from testbed.flannelspec import IPTABLES_NFT, NFTABLES
from testbed.labs.base import Node
from testbed.nodes import cni
from testbed.nodes.deploy import Cluster
from testbed.nodes.pods import HTTP_PORT, Pod, make_pod
from testbed.nodes.scratch import discard
from testbed.probes.flows import http_get
from testbed.probes.rules import Rule, Table, read_table, rules_put_back

HOST_PORT = 31080


@contextmanager
def pod_with_port(cluster: Cluster, node: Node) -> Iterator[Pod]:
    """A pod whose server is reached by a port of its node, as a runtime asks CNI for it."""
    runtime = {"portMappings": [{"hostPort": HOST_PORT, "containerPort": HTTP_PORT, "protocol": "tcp"}]}
    conf = cluster.flannel.cni_conf
    with rules_put_back(node, cluster.flannel.rules):  # portmap leaves the chains that all its ports share
        pod = make_pod(node, "published", conf, cluster.lab.spec.id, runtime)
        cluster.pods[pod.name] = pod
        try:
            yield pod
            cni.delete(node, conf, pod.attachment, pod.result, runtime)
            left = [rule.spec for rule in published(cluster, node)]
            assert not left, f"{node.name}: {left} is left of a pod that is gone"
        finally:
            discard(cluster, pod)


def published(cluster: Cluster, node: Node) -> list[Rule]:
    """The rules that translate the port to a pod's."""
    return [rule for rule in nat(cluster, node).rules if f"--dport {HOST_PORT}" in rule.spec and rule.target == "DNAT"]


def nat(cluster: Cluster, node: Node) -> Table:
    """The node's table nat, where portmap has its rules."""
    rules = cluster.flannel.rules
    return read_table(node, IPTABLES_NFT if rules == NFTABLES else rules, "nat")


@check("SVC-13")
def test_a_port_of_the_node_is_the_pod_s(paths: Paths, cluster: Cluster) -> None:
    """By portmap's rules, from outside, another node's pod and the node itself, sources kept. Source: #1528."""
    path = paths.remote()
    node = path.target_node
    outside = cluster.lab.node(cluster.lab.spec.outside.name)
    with pod_with_port(cluster, node) as pod:
        assert published(cluster, node), f"{node.name}: no rule of portmap's for port {HOST_PORT}"
        assert nat(cluster, node).chain("CNI-HOSTPORT-DNAT"), f"{node.name}: nothing leads to portmap's rules"
        for client, seen_as in ((outside, outside.spec.ip), (path.source, path.source_node.spec.ip), (node, None)):
            answer = http_get(client, node.spec.ip, port=HOST_PORT)
            assert not answer.error, f"from {client.name}: {answer.error}"
            assert answer.pod == pod.pod_name, f"from {client.name}: {answer.facts}"
            assert seen_as in (None, answer.peer), f"from {client.name}: seen as {answer.peer}, not {seen_as}"
