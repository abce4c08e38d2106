"""WG: peers that come and go, strangers' addresses, other backends before this one, and a flanneld that restarts."""

from __future__ import annotations

import base64
import secrets
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest

from testbed.checks import check
from testbed.errors import LabError
from testbed.fixtures import Facts, Figures, Paths
from testbed.nodes.deploy import Cluster
from testbed.nodes.etcd import Etcd
from testbed.nodes.madeup import etcd_of, free_subnets, made_up_leases, other_backend
from testbed.probes.capture import Window
from testbed.probes.encrypted import encrypted
from testbed.probes.flows import Nonce, ping, pinged
from testbed.probes.spoof import spoofed_ping
from testbed.probes.wireguard import read_wireguard

#: A restart takes so long in a slow lab; a peer whose device was made anew is asked for a new key after 15 s at most.
BACK_SECONDS = 40.0
COUNT, EVERY = 150, 0.02


def needs_etcd(cluster: Cluster) -> Etcd:
    """The lab's etcd; skips without it."""
    etcd = etcd_of(cluster)
    if etcd is None:
        pytest.skip("leases of nodes that there are not need etcd")
    return etcd


def nobody(cluster: Cluster) -> IPv4Address:
    """An address in the nodes' subnet that no machine has."""
    return cluster.members[0].spec.ip + 100


def a_lease(address: IPv4Address, port: int) -> dict[str, Any]:
    """A lease with a fresh public key."""
    key = base64.b64encode(secrets.token_bytes(32)).decode()
    return {"PublicIP": str(address), "BackendType": "wireguard", "BackendData": {"PublicKey": key, "Port": port}}


def peers_of(cluster: Cluster, node: str) -> dict[str, tuple[tuple[str, ...], str]]:
    """A node's peers: key, subnets and endpoint. A flanneld that has just started may have no device yet."""
    try:
        _, peers = read_wireguard(cluster.lab.node(node), str(cluster.flannel.tunnel_device))
    except LabError as error:
        raise AssertionError(f"{node}: {error}") from error
    return {peer.key: (peer.allowed, peer.endpoint) for peer in peers}


def all_peers(cluster: Cluster, facts: Facts) -> dict[str, dict[str, tuple[tuple[str, ...], str]]]:
    """Every node's peers, once each has one for each other: a flanneld may have started a moment ago."""

    def complete() -> None:
        for member in cluster.members:
            assert len(peers_of(cluster, member.name)) == len(cluster.members) - 1, member.name

    facts.eventually(complete, seconds=BACK_SECONDS)
    return {member.name: peers_of(cluster, member.name) for member in cluster.members}


def expected(leases: dict[IPv4Network, dict[str, Any]]) -> dict[str, tuple[tuple[str, ...], str]]:
    """The peers that leases are."""
    return {
        lease["BackendData"]["PublicKey"]: ((str(subnet),), f"{lease['PublicIP']}:{lease['BackendData']['Port']}")
        for subnet, lease in leases.items()
    }


@check("WG-05")
def test_a_peer_speaks_for_its_own_subnet_alone(paths: Paths, cluster: Cluster, facts: Facts, window: Window) -> None:
    """What comes out of the tunnel with another node's address inside is dropped. Source: src."""
    path = paths.take("XS")
    source, target = path.pods
    device = str(cluster.flannel.tunnel_device)
    third = next(m.name for m in cluster.members if m.name not in (path.source_node.name, path.target_node.name))
    stranger = cluster.pod_cidr(third)[77]
    foreign, own = Nonce.new(), Nonce.new()
    facts.eventually(lambda: pinged(source, target.address, wait=1), seconds=BACK_SECONDS)
    spoofed_ping(path.source_node, device, stranger, target.address, nonce=foreign)
    spoofed_ping(path.source_node, device, source.address, target.address, nonce=own)
    seen = window.select(f"{target.name}:eth0", own, lambda p: bool(p.icmp and p.icmp.type == 8), at_least=3)
    assert {p.ip.src for p in seen if p.ip} == {source.address}
    window.absent(f"{target.name}:eth0", foreign, control=own)


@check("WG-06", disruptive=True)
def test_a_peer_goes_with_its_lease_also_while_flanneld_is_away(cluster: Cluster, facts: Facts) -> None:
    """And none stays behind without a subnet. Source: k3s#5216, #1421."""
    etcd, (subnet, *_) = needs_etcd(cluster), free_subnets(cluster, 1)
    leases = {subnet: a_lease(nobody(cluster), int(cluster.flannel.port or 0))}
    ((key, peer),) = expected(leases).items()
    away = cluster.members[-1].name
    others = [member.name for member in cluster.members if member.name != away]
    before = all_peers(cluster, facts)

    def all_have_it() -> None:
        for name in [*others, away]:
            assert peers_of(cluster, name) == {**before[name], key: peer}, name

    def nobody_has_it(names: list[str]) -> None:
        for name in names:
            assert peers_of(cluster, name) == before[name], name

    stopped = False
    try:
        with made_up_leases(etcd, leases):
            facts.eventually(all_have_it)
            cluster.stop_flanneld(away)
            stopped = True
        facts.eventually(lambda: nobody_has_it(others))
    finally:
        if stopped:
            cluster.start_flanneld(away)
    facts.eventually(lambda: nobody_has_it([away]), seconds=BACK_SECONDS)


@check("WG-07")
def test_two_nodes_behind_one_address_are_two_peers(cluster: Cluster, facts: Facts) -> None:
    """Told apart by key and port, as behind a NAT. Source: PR #2073, #1810."""
    etcd, address, port = needs_etcd(cluster), nobody(cluster), int(cluster.flannel.port or 0)
    leases = {subnet: a_lease(address, port + n) for n, subnet in enumerate(free_subnets(cluster, 2))}
    before = all_peers(cluster, facts)

    def look(more: dict[str, tuple[tuple[str, ...], str]]) -> None:
        for name, peers in before.items():
            assert peers_of(cluster, name) == {**peers, **more}, name

    with made_up_leases(etcd, leases):
        facts.eventually(lambda: look(expected(leases)))
    facts.eventually(lambda: look({}))


@check("WG-08", disruptive=True)
def test_nothing_of_vxlan_carries_packets_past_wireguard(
    paths: Paths, cluster: Cluster, facts: Facts, window: Window
) -> None:
    """A node that ran vxlan before has no route of it, and sends nothing in clear. Source: rke2#9338."""
    etcd, path = needs_etcd(cluster), paths.take("XS")
    node, network = path.source_node.name, cluster.flannel.network
    wireguard, bridge = str(cluster.flannel.tunnel_device), cluster.flannel.bridge

    def routes() -> set[tuple[IPv4Network, str]]:
        facts.forget()
        return {(r.dst, r.dev) for r in facts.node(node).routes if r.dst.subnet_of(network)}

    def ran() -> None:
        assert {r for r in routes() if r[1] == "flannel.1"} == {(c, "flannel.1") for c in facts.peers(node).values()}

    def runs() -> None:
        assert routes() == {(network, wireguard), (cluster.pod_cidr(node), bridge)}
        assert facts.node(node).link("flannel.1") is None

    try:
        with other_backend(cluster, etcd, node, {"Type": "vxlan", "VNI": 1}):
            facts.eventually(ran)
        facts.eventually(runs, seconds=BACK_SECONDS)
    finally:  # where it is left, only this check is to suffer from it
        path.source_node.run(["ip", "link", "delete", "flannel.1"], check=False)
    facts.eventually(lambda: pinged(path.source, path.address, wait=1), seconds=BACK_SECONDS)
    nonce, control = Nonce.new(), Nonce.new()
    assert ping(path.source, path.address, nonce=nonce, count=3).lost == 0
    ping(path.source_node, path.target_node.spec.ip, nonce=control)
    window.absent(path.wires[0], nonce, control=control)
    assert len(encrypted(cluster, path, window, path.wires[0])) >= 6


@check("WG-09", disruptive=True)
def test_a_restart_of_flanneld_and_what_it_costs(
    paths: Paths, cluster: Cluster, facts: Facts, figures: Figures
) -> None:
    """Nothing with the bundled flanneld; one that takes its device away has packets back soon. Source: src."""
    path = paths.take("XS")
    node = path.target_node.name
    facts.eventually(lambda: pinged(path.source, path.address, wait=1), seconds=BACK_SECONDS)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ping, path.source, path.address, count=COUNT, interval=EVERY)
        cluster.stop_flanneld(node)
        cluster.start_flanneld(node)
        answer = running.result()
    facts.eventually(lambda: pinged(path.source, path.address, wait=1), seconds=BACK_SECONDS)
    figures.add("without an answer over a restart of flanneld", answer.lost * EVERY * 1000, "ms")
    if cluster.implementation(node) == "bundled":
        assert answer.lost == 0, f"{answer.lost} of {answer.sent} packets were lost over a restart"
