"""L2: two pods of one node."""

from __future__ import annotations

from testbed.checks import check
from testbed.fixtures import Facts, Path, Paths
from testbed.nodes.deploy import Cluster
from testbed.probes.capture import Window
from testbed.probes.flows import Nonce, ping


@check("L2-02")
def test_frames_cross_the_bridge_unchanged(path: Path, facts: Facts, window: Window) -> None:
    """The same MACs and addresses at both pods and both veths: bridged, not routed. Source: S0, S1."""
    source, target = path.pods
    nonce = Nonce.new()
    ping(source, target.address, nonce=nonce, count=2)
    node = path.source_node.name
    places = [f"{pod.name}:eth0" for pod in path.pods] + [f"{node}:{facts.host_veth(pod).name}" for pod in path.pods]
    there = (source.mac, target.mac, source.address, target.address)
    back = (target.mac, source.mac, target.address, source.address)
    for place in places:
        seen = window.packets(place, nonce, at_least=4)
        found = [(p.ether.src, p.ether.dst, p.ip.src, p.ip.dst) for p in seen if p.ether and p.ip]
        assert found == [there, back] * 2, f"{place}: {found}"


@check("L2-03")
def test_reply_of_the_same_node_is_not_routed(path: Path) -> None:
    """A reply from the same node has the TTL it was sent with. Source: S1."""
    answer = ping(path.source, path.address, count=2)
    assert answer.ttls == (64, 64), answer.output


@check("L2-04")
def test_unicast_does_not_reach_the_bridge_itself(path: Path, cluster: Cluster, facts: Facts, window: Window) -> None:
    """The bridge's own interface sees nothing of what two pods say to each other. Source: S1."""
    ping(path.source, path.address)  # both MACs are learnt
    nonce, control = Nonce.new(), Nonce.new()
    answer = ping(path.source, path.address, nonce=nonce, count=3)
    assert answer.lost == 0, answer.output
    node = path.source_node.name
    gateway = facts.address(node, cluster.flannel.bridge)
    ping(path.source, gateway, nonce=control)
    window.absent(f"{node}:{cluster.flannel.bridge}", nonce, control=control)


@check("L2-05")
def test_nothing_of_a_node_s_own_pods_leaves_it(path: Path, paths: Paths, cluster: Cluster, window: Window) -> None:
    """Neither the underlay nor the tunnel sees same-node traffic. Source: S2."""
    nonce, control = Nonce.new(), Nonce.new()
    answer = ping(path.source, path.address, nonce=nonce, count=3)
    assert answer.lost == 0, answer.output
    remote = paths.remote()
    ping(path.source, remote.address, nonce=control)
    ping(path.source_node, remote.target_node.spec.ip, nonce=control)  # plain where the other is encrypted
    device = cluster.flannel.tunnel_device
    for name in (path.source_nic, *([f"{path.source_node.name}:{device}"] if device else [])):
        window.absent(name, nonce, control=control)
