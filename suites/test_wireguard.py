"""WG: the wireguard device, its peers, what leaves the node, and its key."""

from __future__ import annotations

from ipaddress import IPv4Interface

import pytest

from testbed.checks import check
from testbed.errors import LabError
from testbed.fixtures import Facts, Path, Paths
from testbed.labs.base import Node
from testbed.nodes.deploy import Cluster
from testbed.probes.capture import Window
from testbed.probes.encrypted import encrypted
from testbed.probes.flows import Nonce, ping
from testbed.probes.wireguard import read_wireguard

KEY_FILE = "/run/flannel/wgkey"
HANDSHAKE_SECONDS = 180


@check("WG-01")
def test_device_carries_the_network(cluster: Cluster, facts: Facts) -> None:
    """Its kind, port, MTU and address, and the whole Network by it in one route. Source: src."""
    device = str(cluster.flannel.tunnel_device)
    for node, cidr in facts.pod_cidrs().items():
        link = facts.link(node, device)
        assert link.kind == "wireguard", f"{node}: {device} is a {link.kind or 'plain device'}"
        assert link.mtu == facts.mtu(node), f"{node}: MTU {link.mtu}"
        assert link.addresses == (IPv4Interface((cidr[0], 32)),), f"{node}: {link.addresses}"
        own, _ = read_wireguard(cluster.lab.node(node), device)
        assert own.port == cluster.flannel.port, f"{node}: port {own.port}"
        found = [(r.dst, r.scope) for r in facts.node(node).routes if r.dev == device]
        assert found == [(cluster.flannel.network, "link")], f"{node}: {found}"


@check("WG-02")
def test_one_peer_a_node_with_its_subnet_alone(paths: Paths, cluster: Cluster, facts: Facts) -> None:
    """Key and endpoint as the peer published them, exactly its podCIDR; a handshake where packets go. Source: src."""
    if cluster.flannel.tunnel_device == cluster.flannel.tunnel_device6:
        pytest.skip("one device carries both families, which is what V6-17 looks at")
    path = paths.take("XS")
    answer = ping(path.source, path.address)
    assert answer.lost == 0, answer.output

    def look() -> None:
        leases = facts.leases()
        for node in cluster.members:
            _, peers = read_wireguard(node, str(cluster.flannel.tunnel_device))
            found = {peer.key: (peer.allowed, peer.endpoint) for peer in peers}
            wanted = {}
            for name, cidr in facts.peers(node.name).items():
                value = leases[name]["value"]
                endpoint = f"{value['PublicIP']}:{value['BackendData']['Port']}"
                wanted[value["BackendData"]["PublicKey"]] = ((str(cidr),), endpoint)
            assert found == wanted, f"{node.name}: {found}"

    facts.eventually(look)
    _, peers = read_wireguard(path.source_node, str(cluster.flannel.tunnel_device))
    keys = cluster.flannel.backend_keys
    shared = (keys.get("PSK") or "", int(keys.get("PersistentKeepaliveInterval") or 0))
    assert all((peer.psk, peer.keepalive) == shared for peer in peers), f"PSK and keepalive: {peers}"
    away = str(cluster.pod_cidr(path.target_node.name))
    ages = [peer.handshake_age for peer in peers if peer.allowed == (away,)]
    assert len(ages) == 1, f"{len(ages)} peers have {away}"
    assert ages[0] is not None, f"no handshake with {path.target_node.name}"
    assert ages[0] < HANDSHAKE_SECONDS, f"the last handshake was {ages[0]} s ago"


@check("WG-03", encapsulated=True)
def test_nothing_in_clear_leaves_the_node(path: Path, cluster: Cluster, window: Window) -> None:
    """Of a pod's packet nothing can be read on the wire, where a plain one can. Source: cilium tests/encryption.go."""
    nonce, control = Nonce.new(), Nonce.new()
    answer = ping(path.source, path.address, nonce=nonce, count=3)
    assert answer.lost == 0, answer.output
    plain = ping(path.source_node, path.target_node.spec.ip, nonce=control)
    assert plain.lost == 0, plain.output
    for wire in path.wires:
        window.absent(wire, nonce, control=control)
        for pod in path.pods:
            clear = window.everything(wire, pod.address.packed)
            assert not clear, f"{wire}: {len(clear)} packets with the address of {pod.name} in them"
        carried = encrypted(cluster, path, window, wire)
        assert len(carried) >= 6, f"{wire}: {len(carried)} encrypted packets for 3 pings"


def public_key(cluster: Cluster, node: Node) -> str:
    """The key that a node's device shows. A flanneld that has just started may have none yet."""
    try:
        own, _ = read_wireguard(node, str(cluster.flannel.tunnel_device))
    except LabError as error:
        raise AssertionError(f"{node.name}: {error}") from error
    return own.public_key


@check("WG-04", disruptive=True)
def test_the_key_is_the_node_s_own_and_stays(cluster: Cluster, facts: Facts) -> None:
    """A file that only root reads, and the same public key in the lease, also after a restart. Source: src."""
    node = cluster.members[0]
    mode = node.run(["stat", "-c", "%a", KEY_FILE]).stdout.strip()
    assert mode == "400", f"{KEY_FILE} has mode {mode}"
    before = public_key(cluster, node)
    assert facts.leases()[node.name]["value"]["BackendData"]["PublicKey"] == before
    cluster.stop_flanneld(node.name)
    node.run(["rm", "-f", cluster.flannel.subnet_file])  # that it is there again says that flanneld is ready
    cluster.start_flanneld(node.name)
    cluster.wait_ready([node.name])
    facts.forget()

    def look() -> None:
        assert public_key(cluster, node) == before
        published = facts.leases()[node.name]["value"]["BackendData"]["PublicKey"]
        assert published == before, f"{node.name} has the key {before}, and publishes {published} after a restart"

    facts.eventually(look)
