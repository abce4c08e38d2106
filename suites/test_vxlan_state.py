"""VXC: routes, neighbours and forwarding entries of the vxlan device."""

from __future__ import annotations

from ipaddress import IPv4Address

from testbed.checks import check
from testbed.fixtures import Facts
from testbed.nodes.deploy import Cluster


def vtep_mac(facts: Facts, node: str) -> str:
    """The MAC that a node's lease tells its peers."""
    return str(facts.leases()[node]["value"]["BackendData"]["VtepMAC"])


def public_ip(facts: Facts, node: str) -> IPv4Address:
    """The address that a node's lease tells its peers."""
    return IPv4Address(facts.leases()[node]["value"]["PublicIP"])


@check("VXC-01")
def test_one_onlink_route_a_tunnelled_peer(cluster: Cluster, facts: Facts) -> None:
    """Each such peer by its base address through the device, onlink; nothing else there. Source: S0, S2, #254."""
    device = str(cluster.flannel.tunnel_device)

    def look() -> None:
        for node in cluster.members:
            routes = [r for r in facts.node(node.name).routes if r.dev == device]
            found = {(r.dst, r.gateway, "onlink" in r.flags) for r in routes}
            wanted = {(cidr, cidr[0], True) for cidr in facts.tunnelled_peers(node.name).values()}
            assert found == wanted, f"{node.name}: {found}"
            assert len(routes) == len(wanted), f"{node.name}: {routes}"

    facts.eventually(look)


@check("VXC-02")
def test_one_permanent_neighbour_a_tunnelled_peer(cluster: Cluster, facts: Facts) -> None:
    """The peer's base address has its VtepMAC, permanently. Source: S0, S2, S4."""
    device = str(cluster.flannel.tunnel_device)

    def look() -> None:
        for node in cluster.members:
            neighbours = [n for n in facts.node(node.name).neighbours if n.dev == device and not n.address.is_multicast]
            found = {(n.address, n.mac, n.state) for n in neighbours}
            peers = facts.tunnelled_peers(node.name).items()
            wanted = {(cidr[0], vtep_mac(facts, peer), frozenset({"PERMANENT"})) for peer, cidr in peers}
            assert found == wanted, f"{node.name}: {found}"

    facts.eventually(look)


@check("VXC-03")
def test_one_forwarding_entry_a_tunnelled_peer(cluster: Cluster, facts: Facts) -> None:
    """The peer's VtepMAC goes to its public address, permanently, and nowhere else. Source: S0, S2, S4."""
    device = str(cluster.flannel.tunnel_device)

    def look() -> None:
        for node in cluster.members:
            entries = [e for e in facts.node(node.name).fdb if e.dev == device and e.dst]
            found = sorted((e.mac, str(e.dst), e.state, "self" in e.flags) for e in entries)
            peers = facts.tunnelled_peers(node.name)
            wanted = sorted((vtep_mac(facts, peer), str(public_ip(facts, peer)), "permanent", True) for peer in peers)
            assert found == wanted, f"{node.name}: {found}"

    facts.eventually(look)


@check("VXC-04")
def test_route_neighbour_and_forwarding_entry_lead_to_the_peer(cluster: Cluster, facts: Facts) -> None:
    """Followed from the route on, each pair of nodes ends at the peer that has that podCIDR. Source: S0, S2, S4."""
    device = str(cluster.flannel.tunnel_device)

    def look() -> None:
        for node in cluster.members:
            state = facts.node(node.name)
            macs = {n.address: n.mac for n in state.neighbours if n.dev == device}
            ends = {e.mac: e.dst for e in state.fdb if e.dev == device and e.dst}
            for peer, cidr in facts.tunnelled_peers(node.name).items():
                gateways = [r.gateway for r in state.routes_to(cidr)]
                assert len(gateways) == 1, f"{node.name} has {len(gateways)} routes to {peer}'s {cidr}"
                mac = macs.get(gateways[0]) if gateways[0] else None
                assert mac, f"{node.name}: no neighbour for {gateways[0]}"
                assert mac == facts.link(peer, device).mac, f"{node.name}: {cidr} goes to the MAC {mac}, not {peer}'s"
                assert ends.get(mac) == cluster.lab.spec.node(peer).ip, f"{node.name}: {mac} goes to {ends.get(mac)}"

    facts.eventually(look)
