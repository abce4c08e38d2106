"""NP: nodes and pods."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from testbed.checks import check
from testbed.fixtures import Facts, Path, Paths
from testbed.nodes.deploy import Cluster
from testbed.nodes.hostpods import NAME, host_pod
from testbed.parallel import each
from testbed.probes.capture import Window
from testbed.probes.flows import Nonce, http_get, ping
from testbed.probes.iproute import counters

STRICT = "net.ipv4.conf.all.rp_filter"
DROPPED = "TcpExtIPReversePathFilter"


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


@check("NP-03")
def test_the_pod_that_was_asked_answers(path: Path) -> None:
    """Name, node and address in the body are the remote pod's, and it sees who asked. Source: S3, S1."""
    source, target = path.pods
    answer = http_get(source, target.address)
    assert not answer.error, f"{target.name}: {answer.error}"
    found = (answer.pod, answer.facts.get("node"), answer.facts.get("address"), answer.peer)
    wanted = (target.pod_name, target.node.name, str(target.address), source.address)
    assert found == wanted, f"{target.address} says {answer.facts}"


@check("NP-04")
def test_pods_in_their_node_s_network(paths: Paths, cluster: Cluster, window: Window) -> None:
    """They and ordinary pods reach each other both ways; two of them speak in clear. Source: #827, k8s conformance."""
    path, nonce = paths.remote(), Nonce.new()
    here, there = path.source_node, path.target_node
    with host_pod(here, there):
        for node in (here, there):
            answer = http_get(path.source, node.spec.ip)
            assert (answer.error, answer.pod, answer.facts.get("node")) == ("", NAME, node.name), f"{answer}"
        answer = http_get(here, there.spec.ip)
        assert (answer.error, answer.pod, answer.facts.get("node")) == ("", NAME, there.name), f"{answer}"
        assert answer.peer == here.spec.ip, f"{there.name} saw {answer.peer}, not {here.name}'s address"
        plain = ping(here, there.spec.ip, nonce=nonce, count=2)
    assert plain.lost == 0, plain.output
    seen = window.packets(path.source_nic, nonce, at_least=4)
    ends = [(p.ip.src, p.ip.dst, p.encapsulated) for p in seen if p.ip and p.icmp]
    assert ends == [(here.spec.ip, there.spec.ip, False), (there.spec.ip, here.spec.ip, False)] * 2, f"{seen}"
    # To remote pods ipsec's nodes have no way of their own: its policies are about pods' addresses.
    pods = [path.source] if cluster.flannel.backend.type == "ipsec" else list(path.pods)
    for pod in pods:
        answer = http_get(here, pod.address)
        assert (answer.error, answer.pod) == ("", pod.pod_name), f"{here.name} to {pod.name}: {answer}"


@contextmanager
def strict_filters(cluster: Cluster) -> Iterator[None]:
    """Every node drops what comes in by another way than the answer would go out."""
    before = {node.name: node.run(["sysctl", "-n", STRICT]).stdout.strip() for node in cluster.members}
    try:
        each(lambda node: node.run(["sysctl", "-qw", f"{STRICT}=1"]), cluster.members)
        yield
    finally:
        each(lambda node: node.run(["sysctl", "-qw", f"{STRICT}={before[node.name]}"]), cluster.members)


@check("NP-05")
def test_strict_reverse_paths_drop_nothing_of_flannel_s(paths: Paths, cluster: Cluster) -> None:
    """Pods and nodes reach pods with rp_filter=1 everywhere, and the kernel counts a drop. Source: raven#30, #895."""
    path, stranger = paths.remote(), str(cluster.lab.spec.outside.ip)

    def dropped() -> dict[str, int]:
        return {node.name: counters(node, DROPPED)[DROPPED] for node in cluster.members}

    with strict_filters(cluster):
        before = dropped()
        answers = [ping(path.source, path.address, count=3)]
        if cluster.flannel.backend.type != "ipsec":
            answers.append(ping(path.source_node, path.address, count=3))
        after = dropped()
        more = {node: count - before[node] for node, count in after.items() if count != before[node]}
        assert not more, f"{DROPPED} counted {more}"
        assert [answer.lost for answer in answers] == [0] * len(answers), [answer.output for answer in answers]
        # A packet that cannot have come from there shows that the filter is on, and that drops are counted.
        argv = ["ping", "-n", "-c", "3", "-i", "0.01", "-W", "1", "-I", stranger, str(path.address)]
        path.source.run(["ip", "address", "add", f"{stranger}/32", "dev", "eth0"])
        try:
            path.source.run(argv, check=False)
        finally:
            path.source.run(["ip", "address", "delete", f"{stranger}/32", "dev", "eth0"])
        counted = dropped()[path.source_node.name] - after[path.source_node.name]
    assert counted >= 3, f"{counted} of 3 packets with a stranger's address were dropped on {path.source_node.name}"
