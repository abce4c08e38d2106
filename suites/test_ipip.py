"""IPIP: the ipip device, its routes, and its packets on the wire."""

from __future__ import annotations

from ipaddress import IPv4Interface

from testbed.checks import check
from testbed.fixtures import Facts, Path
from testbed.nodes.deploy import Cluster
from testbed.probes.capture import Window
from testbed.probes.flows import Nonce, ping

IPIP_PROTOCOL = 4


@check("IPIP-01")
def test_device_is_one_tunnel_to_all(cluster: Cluster, facts: Facts) -> None:
    """Any remote, the node's address as local, TTL and DF from inside; no ARP, up. Source: S0, S4."""
    for node in cluster.members:
        device = facts.link(node.name, str(cluster.flannel.tunnel_device))
        assert device.kind == "ipip", f"{node.name}: {device.name} is a {device.kind or 'plain device'}"
        found = {key: device.data.get(key) for key in ("remote", "local", "ttl", "pmtudisc")}
        wanted = {"remote": "any", "local": str(node.spec.ip), "ttl": 0, "pmtudisc": False}
        assert found == wanted, f"{node.name}: {found}"
        assert {"NOARP", "UP"} <= device.flags, f"{node.name}: {sorted(device.flags)}"


@check("IPIP-02")
def test_one_mtu_from_the_device_to_the_pod(cluster: Cluster, facts: Facts) -> None:
    """The underlay's MTU less 20 on the device, the bridge, the veths and in the pods. Source: S0, S3, S4."""
    for pod in cluster.pods.values():
        node = pod.node.name
        wanted = cluster.lab.spec.node(node).underlay.mtu - cluster.flannel.backend.overhead
        device = facts.link(node, str(cluster.flannel.tunnel_device)).mtu
        assert (device, *facts.mtus(pod)) == (wanted,) * 4, f"{pod.name}: {device}, {facts.mtus(pod)}"


@check("IPIP-03")
def test_device_has_the_subnet_s_base_address(cluster: Cluster, facts: Facts) -> None:
    """The podCIDR's base address as /32. Source: S4."""
    for node, cidr in facts.pod_cidrs().items():
        device = facts.link(node, str(cluster.flannel.tunnel_device))
        assert device.addresses == (IPv4Interface((cidr[0], 32)),), f"{node}: {device.addresses}"


@check("IPIP-05")
def test_one_onlink_route_a_tunnelled_peer(cluster: Cluster, facts: Facts) -> None:
    """Each such peer by its node's own address through the device, onlink; nothing else there. Source: S0, S4."""
    device = str(cluster.flannel.tunnel_device)

    def look() -> None:
        for node in cluster.members:
            routes = [r for r in facts.node(node.name).routes if r.dev == device]
            found = {(r.dst, r.gateway, "onlink" in r.flags) for r in routes}
            peers = facts.tunnelled_peers(node.name).items()
            wanted = {(cidr, cluster.lab.spec.node(peer).ip, True) for peer, cidr in peers}
            assert found == wanted, f"{node.name}: {found}"
            assert len(routes) == len(wanted), f"{node.name}: {routes}"

    facts.eventually(look)


@check("IPIP-06", encapsulated=True)
def test_outer_header_is_node_to_node(path: Path, window: Window) -> None:
    """Protocol 4 between the nodes' addresses, the pods' packet inside and nothing in between. Source: S0, S4."""
    source, target = path.pods
    nonce = Nonce.new()
    answer = ping(source, target.address, nonce=nonce, count=2)
    assert answer.lost == 0, answer.output
    here, there = path.source_node.spec.ip, path.target_node.spec.ip
    seen = window.packets(path.source_nic, nonce, at_least=4)
    outer = [(p.ip.src, p.ip.dst, p.ip.proto) for p in seen if p.ip]
    assert outer == [(here, there, IPIP_PROTOCOL), (there, here, IPIP_PROTOCOL)] * 2
    inner = [(p.inner.ip.src, p.inner.ip.dst) for p in seen if p.inner and p.inner.ip]
    assert inner == [(source.address, target.address), (target.address, source.address)] * 2
