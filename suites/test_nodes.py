"""NP: nodes and pods."""

from __future__ import annotations

from testbed.checks import check
from testbed.fixtures import Facts, Paths
from testbed.nodes.deploy import Cluster
from testbed.probes.flows import http_get


@check("NP-01")
def test_node_reaches_its_own_pods(cluster: Cluster) -> None:
    """From the bridge's address, and the right pod answers. Source: S3."""
    for pod in cluster.pods.values():
        answer = http_get(pod.node, pod.address)
        assert not answer.error, f"{pod.name}: {answer.error}"
        found = (answer.pod, answer.facts.get("node"), answer.peer)
        gateway = cluster.pod_cidr(pod.node.name)[1]
        assert found == (pod.pod_name, pod.node.name, gateway), f"{pod.name} says {answer.facts}"


@check("NP-02")
def test_node_reaches_remote_pods(paths: Paths, cluster: Cluster, facts: Facts) -> None:
    """From the tunnel's address, or the node's own where there is no tunnel. Source: S3, S4."""
    node = paths.remote().source_node
    reachable = {**facts.tunnelled_peers(node.name), **facts.direct_peers(node.name)}
    for peer in reachable:
        for pod in (pod for pod in cluster.pods.values() if pod.node.name == peer):
            answer = http_get(node, pod.address)
            assert not answer.error, f"{pod.name}: {answer.error}"
            found = (answer.pod, answer.facts.get("node"), answer.peer)
            wanted = (pod.pod_name, peer, facts.node_source(node.name, peer))
            assert found == wanted, f"{pod.name} says {answer.facts}, not from {wanted[2]}"
