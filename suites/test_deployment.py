"""DEP: what deploying flannel leaves on a node."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from testbed.checks import check
from testbed.fixtures import Facts
from testbed.labs.base import Node
from testbed.nodes.deploy import Cluster
from testbed.probes.iproute import read_state, udp_sockets

DEFAULT_VNI, DEFAULT_PORTS = 1, {"vxlan": 8472, "udp": 8285}


@check("DEP-12")
def test_keys_left_out_have_their_defaults(cluster: Cluster, facts: Facts) -> None:
    """VNI 1, Port 8472, GBP off and no direct routes, where net-conf.json does not say otherwise. Source: S0, S2."""
    keys = cluster.flannel.backend_keys
    left_out = {"VNI", "Port", "GBP", "DirectRouting"} - set(keys)
    if not left_out:
        pytest.skip("net-conf.json leaves no key of the backend out")
    for node in cluster.members:
        device = facts.link(node.name, f"flannel.{keys.get('VNI', DEFAULT_VNI)}")
        assert "VNI" in keys or device.data.get("id") == DEFAULT_VNI, f"{node.name}: VNI {device.data.get('id')}"
        port = device.data.get("port")
        assert "Port" in keys or port == DEFAULT_PORTS["vxlan"], f"{node.name}: port {port}"
        assert "GBP" in keys or not device.data.get("gbp"), f"{node.name}: GBP is on"
        if "DirectRouting" not in keys:
            facts.eventually(lambda node=node, name=device.name: all_by_device(facts, node, name))  # type: ignore[misc]


def all_by_device(facts: Facts, node: Node, device: str) -> None:
    """Every peer is reached through the device, those of the node's own subnet too."""
    for peer, cidr in facts.peers(node.name).items():
        devices = [route.dev for route in facts.node(node.name).routes_to(cidr)]
        assert devices == [device], f"{node.name}: {peer}'s {cidr} by {devices}"


@check("DEP-13")
def test_configured_keys_are_honoured(cluster: Cluster, facts: Facts) -> None:
    """A VNI or Port other than the default is the device's, and a socket listens on it. Source: S0, S4."""
    flannel = cluster.flannel
    default_port = DEFAULT_PORTS[flannel.backend.type]
    if flannel.port == default_port and flannel.vni in (None, DEFAULT_VNI):
        pytest.skip("net-conf.json has no VNI or Port other than the default")
    for node in cluster.members:
        device = facts.link(node.name, str(flannel.tunnel_device))
        if flannel.vni is not None:
            found = (device.name, device.data.get("id"), device.data.get("port"))
            assert found == (f"flannel.{flannel.vni}", flannel.vni, flannel.port), f"{node.name}: {found}"
        ports = {socket.port for socket in udp_sockets(node)}
        assert flannel.port in ports, f"{node.name}: nothing listens on UDP {flannel.port}"
        assert flannel.port == default_port or default_port not in ports, f"{node.name} listens on {default_port} too"


@check("DEP-24")
def test_tunnel_comes_with_flanneld_and_bridge_with_the_first_pod(cluster: Cluster, facts: Facts) -> None:
    """Without pods flanneld makes its tunnel, but neither bridge nor veths. Source: S0, S2, S4."""
    node = cluster.lab.node(cluster.lab.spec.control_plane)
    with bare_node(cluster, facts, node):
        state = read_state(node)
        tunnel, bridge = cluster.flannel.tunnel_device, cluster.flannel.bridge
        if tunnel is not None:
            assert state.link(tunnel), f"{node.name}: flanneld is ready, but there is no {tunnel}"
        assert not state.link(bridge), f"{node.name} has {bridge} before its first pod"
        pairs = [link.name for link in state.links if link.kind == "veth" and link.name != node.spec.underlay.name]
        assert not pairs, f"{node.name} has {pairs} before its first pod"
    assert facts.node(node.name).link(bridge), f"{node.name} has no {bridge} with a pod on it"


@contextmanager
def bare_node(cluster: Cluster, facts: Facts, node: Node) -> Iterator[None]:
    """A node without pods, its flanneld freshly started and ready; the pods are made again at the end."""
    pods = [pod for pod in cluster.pods.values() if pod.node.name == node.name]
    for pod in pods:
        cluster.delete_pod(pod)
    cluster.stop_flanneld(node.name)
    try:
        node.run(["ip", "link", "delete", cluster.flannel.bridge])
        node.run(["rm", cluster.flannel.subnet_file])  # that it is there again says that flanneld is ready
        cluster.start_flanneld(node.name)
        cluster.wait_ready([node.name])
        yield
    finally:
        for pod in pods:
            cluster.add_pod(node.name, pod.pod_name)
        facts.forget()
