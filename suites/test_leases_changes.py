"""LSE: leases that change while others use them."""

from __future__ import annotations

import base64
import secrets
from ipaddress import IPv4Address
from typing import Any

from testbed.checks import check
from testbed.errors import LabError
from testbed.fixtures import Facts
from testbed.fixtures6 import Facts6
from testbed.nodes.deploy import Cluster
from testbed.nodes.madeuppeer import MadeUpPeer, made_up_peer, sweep_entries
from testbed.probes.wireguard import read_wireguard


def new_data(cluster: Cluster) -> Any:
    """A backend's data as a peer publishes them, with a fresh identity."""
    if cluster.flannel.backend.type == "vxlan":
        return {"VNI": cluster.flannel.vni, "VtepMAC": ":".join(f"{byte:02x}" for byte in (2, *secrets.token_bytes(5)))}
    if cluster.flannel.backend.type == "wireguard":
        key = base64.b64encode(secrets.token_bytes(32)).decode()
        return {"PublicKey": key, "Port": cluster.flannel.port}
    return None


def wanted(cluster: Cluster, node: str, address: IPv4Address, data: Any) -> list[tuple[str, ...]]:
    """How a node has to reach a peer that says this."""
    flannel = cluster.flannel
    underlay = cluster.lab.spec.node(node).underlay.address
    assert underlay is not None
    if flannel.backend.type == "wireguard":
        return [(data["PublicKey"], f"{address}:{data['Port']}")]
    if flannel.backend.type == "vxlan" and not (flannel.direct and address in underlay.network):
        return [(data["VtepMAC"], str(address))]
    return [(str(address),)]


def found(cluster: Cluster, facts: Facts, node: str, peer: MadeUpPeer) -> list[tuple[str, ...]]:
    """How a node reaches a peer: its MAC or key and where that is, or the address that its route goes by."""
    device = cluster.flannel.tunnel_device
    if cluster.flannel.backend.type == "wireguard":
        try:
            _, peers = read_wireguard(cluster.lab.node(node), str(device))
        except LabError as error:
            raise AssertionError(f"{node}: {error}") from error
        return [(one.key, one.endpoint) for one in peers if str(peer.subnet) in one.allowed]
    state = facts.node(node)
    macs = [one.mac for one in state.neighbours if (one.address, one.dev) == (peer.subnet[0], device)]
    if macs:
        return [(one.mac, str(one.dst)) for one in state.fdb if one.dev == device and one.mac in macs]
    return [(str(route.gateway),) for route in state.routes_to(peer.subnet)]


@check("LSE-12")
def test_a_peer_s_change_is_followed(cluster: Cluster, facts: Facts) -> None:
    """Another address, then other data of the backend's, on every node within 5 s. Source: S2, src."""
    nobody = cluster.members[0].spec.ip + 100
    first, second = new_data(cluster), new_data(cluster)
    ip6 = cluster.members[0].spec.ip6
    dual = cluster.flannel.network6 is not None
    with made_up_peer(cluster) as peer:
        for turn, (address, data) in enumerate(((nobody, first), (nobody + 1, first), (nobody + 1, second)), 0x100):
            # In dual stack both change: what becomes of one alone is LSE-13.
            peer.publish(address, data, **({"ip6": ip6 + turn, "data6": new_data(cluster)} if dual and ip6 else {}))

            def look(address: IPv4Address = address, data: Any = data) -> None:
                for node in cluster.members:
                    reached = found(cluster, facts, node.name, peer)
                    right = wanted(cluster, node.name, address, data)
                    assert reached == right, f"{node.name} reaches {peer.subnet} by {reached}, not {right}"

            facts.forget()
            facts.eventually(look)
    facts.eventually(lambda: nothing_left(cluster, facts, peer))
    sweep_entries(cluster)


def nothing_left(cluster: Cluster, facts: Facts, peer: MadeUpPeer) -> None:
    """No node has anything of a peer that has gone."""
    for node in cluster.members:
        left = found(cluster, facts, node.name, peer)
        assert not left, f"{node.name} still reaches {peer.subnet} by {left}"


@check("LSE-13")
def test_a_change_of_one_family_alone_is_followed(cluster: Cluster, facts: Facts, facts6: Facts6) -> None:
    """IPv4's address and data change, IPv6's stay, and the other way round. Source: src."""
    nobody = cluster.members[0].spec.ip + 100
    nobody6 = facts6.ip(cluster.members[0].name) + 0x100
    v4, v6 = (nobody, new_data(cluster)), (nobody6, new_data(cluster))
    device6 = cluster.flannel.tunnel_device6

    def look() -> None:
        for node in cluster.members:
            reached = found(cluster, facts, node.name, peer)
            right = wanted(cluster, node.name, *v4)
            assert reached == right, f"{node.name} reaches {peer.subnet} by {reached}, not {right}"
            entries = [(one.dst, one.mac) for one in facts6.node(node.name).fdb if one.dev == device6]
            assert (v6[0], v6[1]["VtepMAC"]) in entries, f"{node.name} has no entry of {v6} among {entries}"

    with made_up_peer(cluster) as peer:
        changes = [(v4, v6), ((nobody + 1, new_data(cluster)), v6)]
        changes += [(changes[-1][0], (nobody6 + 1, new_data(cluster)))]
        for v4, v6 in changes:
            peer.publish(*v4, ip6=v6[0], data6=v6[1])
            facts6.forget()
            facts6.eventually(look)
    facts.forget()
    facts.eventually(lambda: nothing_left(cluster, facts, peer))
    sweep_entries(cluster)
