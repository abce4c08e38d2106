"""RES: nodes that move, are made anew under their name, and get another backend."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest

from testbed.checks import check
from testbed.collecting import kernel_has
from testbed.fixtures import Facts, Path, Paths
from testbed.flannelspec import BACKENDS, SPEAK_IPV6, TEST_PSK, Backend
from testbed.labs.base import Node
from testbed.nodes.deploy import Cluster
from testbed.nodes.etcd import PREFIX
from testbed.nodes.madeup import Stranger, etcd_of, free_subnets, made_up_leases, random_mac
from testbed.nodes.madeuppeer import sweep_entries
from testbed.nodes.otherwise import reconfigure, restart_flanneld
from testbed.probes.flows import ping

SETTLED_SECONDS = 20.0
"""How long the lab may take to be as it has to be behind a change; a flanneld that restarts is in it."""
MOVED = 90
"""How far a node moves within its subnet, where nobody else is."""


@check("RES-08", disruptive=True)
def test_peers_follow_a_node_to_another_address(paths: Paths, cluster: Cluster, facts: Facts) -> None:
    """After its flanneld's restart: the same subnet, nothing to the old address, pods answer. Source: #533, docs."""
    path = paths.remote()
    node, was = path.target_node, path.target_node.spec.ip
    cidr, before = cluster.pod_cidr(node.name), {str(lease["key"]) for lease in cluster.leases().values()}
    try:
        move(cluster, node, was, was + MOVED)
        followed(cluster, facts, path, was, was + MOVED)
        assert cluster.pod_cidr(node.name) == cidr, f"{node.name} has another subnet than {cidr}"
    finally:
        move(cluster, node, was + MOVED, was)
        put_right(cluster, node, cidr, before)
    followed(cluster, facts, path, was + MOVED, was)


def put_right(cluster: Cluster, node: Node, cidr: IPv4Network, known: Set[str]) -> None:
    """Remove what a flanneld leaves that takes another subnet: a lease and entries; and give its pods' route back."""
    if (etcd := etcd_of(cluster)) is not None:
        etcd.delete_all(key for key in etcd.under(f"{PREFIX}/subnets/") if key not in known)
    sweep_entries(cluster)
    own = ["dev", cluster.flannel.bridge, "proto", "kernel", "scope", "link", "src", str(cidr[1])]
    node.run(["ip", "route", "replace", str(cidr), *own])


def move(cluster: Cluster, node: Node, old: IPv4Address, new: IPv4Address) -> None:
    """Give a node another address, as DHCP does, and restart its flanneld."""
    iface = node.spec.underlay
    assert iface.address is not None  # a cluster node's has one
    length, device = iface.address.network.prefixlen, iface.name
    node.run(["ip", "address", "delete", f"{old}/{length}", "dev", device])
    node.run(["ip", "address", "add", f"{new}/{length}", "dev", device])
    node.run(["ip", "route", "replace", "default", "via", str(node.spec.gateway)])
    restart_flanneld(cluster, node.name)


def followed(cluster: Cluster, facts: Facts, path: Path, old: IPv4Address, new: IPv4Address) -> None:
    """Wait until the lease says the new address, no peer has anything to the old one, and the pod answers."""
    subnet = str(cluster.pod_cidr(path.target_node.name)).replace("/", "-")

    def look() -> None:
        said = [lease["value"]["PublicIP"] for lease in facts.leases().values() if subnet in str(lease["key"])]
        assert said == [str(new)], f"the lease of {subnet} says {said}, not {new}"
        for peer in cluster.members:
            state = facts.node(peer.name)
            stale = [str(e) for e in state.fdb if e.dst == old]
            stale += [str(r) for r in state.routes if old in {gateway for gateway, _ in r.hops}]
            assert not stale, f"{peer.name}: {stale}"
        answer = ping(path.source, path.address, wait=1)
        assert answer.lost == 0, answer.output

    facts.forget()
    facts.eventually(look, seconds=SETTLED_SECONDS)


@check("RES-09")
def test_a_node_that_came_back_with_another_subnet_has_none_of_the_old(cluster: Cluster, facts: Facts) -> None:
    """Removed and added again with another podCIDR: every member leads to that one alone. Source: S2, #1850."""
    etcd = etcd_of(cluster)
    if etcd is None:
        pytest.skip("leases of nodes that there are not need etcd")
    first, (_, other) = Stranger.new(cluster), free_subnets(cluster, 2)
    second = replace(first, subnet=other, mac=random_mac())
    for old, new in ((second, first), (first, second)):
        with made_up_leases(etcd, {new.subnet: new.lease(cluster)}):
            facts.eventually(lambda new=new, old=old: leads_to(cluster, facts, new, old))  # type: ignore[misc]


def leads_to(cluster: Cluster, facts: Facts, new: Stranger, old: Stranger) -> None:
    """Assert that every member that can reach it has one route to the new subnet, and nothing of the old one."""
    facts.forget()
    for node in cluster.members:
        state, own = facts.node(node.name), node.spec.underlay.address
        reached = cluster.flannel.backend.tunnels or (own is not None and new.address in own.network)
        routes = [str(route) for route in state.routes_to(new.subnet)]
        assert len(routes) == int(reached), f"{node.name}: {routes} to {new.subnet}"
        left = [str(route) for route in state.routes_to(old.subnet)]
        left += [str(n) for n in state.neighbours if n.address == old.subnet[0]]
        left += [str(entry) for entry in state.fdb if entry.mac == old.mac]
        assert not left, f"{node.name}: {left} is left of {old.subnet}"


PINGS = 10


def net_conf_of(cluster: Cluster, backend: Backend) -> Mapping[str, Any]:
    """The cluster's configuration with another backend."""
    keys = {"Type": backend.type} | ({"PSK": TEST_PSK} if backend.type == "ipsec" else {})
    return {**cluster.flannel.net_conf, "Backend": keys}


def others(cluster: Cluster) -> list[Backend]:
    """The backends that this kernel has and this configuration can be given, other than the cluster's own."""
    found = [BACKENDS[name] for name in ("vxlan", "host_gw", "ipip", "udp", "wireguard")]
    six = cluster.flannel.network6 is not None
    fitting = [one for one in found if one.type in SPEAK_IPV6 or not six]
    return [x for x in fitting if x.type != cluster.flannel.backend.type and all(map(kernel_has, x.kernel_features))]


@check("RES-11", disruptive=True)
def test_only_the_new_backend_carries_after_a_change(paths: Paths, cluster: Cluster, facts: Facts) -> None:
    """One backend after another on the running cluster: its device alone carries, no old route is left. Source: S2."""
    taken = [paths.take(kind) for kind in ("SS", "XS") if not paths.specs[kind].reason]
    try:
        for backend in others(cluster):
            conf = net_conf_of(cluster, backend)
            reconfigure(cluster, conf)
            device = backend.tunnel_device(conf)
            for path in taken:
                if backend.tunnels or path.kind == "SS":
                    carries_alone(cluster, facts, path, device)
    finally:
        reconfigure(cluster, cluster.flannel.net_conf)
        own = cluster.flannel.tunnel_device
        for path in taken:
            settle(cluster, facts, path, own)


DEVICES = ("flannel.1", "flannel.ipip", "flannel0", "flannel-wg")
"""What the backends' devices are called that `net_conf_of` asks for; the cluster's own may have another VNI."""


def settle(cluster: Cluster, facts: Facts, path: Path, device: str | None) -> None:
    """Wait until the path leads by that device."""
    facts.eventually(lambda: leads_by(cluster, facts, path, device), seconds=SETTLED_SECONDS)


def carries_alone(cluster: Cluster, facts: Facts, path: Path, device: str | None) -> None:
    """Wait until the path leads by that device, and assert that no other backend's carries anything."""
    settle(cluster, facts, path, device)
    carried = traffic(cluster, facts, path)
    idle = {name: count for name, count in carried.items() if name != device and count}
    assert not idle, f"{path.kind} by {device or 'plain routes'}: {idle} packets by other devices"
    assert device is None or carried[device] >= PINGS, f"{path.kind} by {device}: {carried} for {PINGS} pings"


def leads_by(cluster: Cluster, facts: Facts, path: Path, device: str | None) -> None:
    """Assert that no route into the Network goes by a device of another backend, and that the path's target answers."""
    facts.forget()
    for node in cluster.members:
        fit = {cluster.flannel.bridge, node.spec.underlay.name, *([device] if device else [])}
        routes = [r for r in facts.node(node.name).routes if r.dst.subnet_of(cluster.flannel.network)]
        strange = [str(route) for route in routes if not {dev for _, dev in route.hops} <= fit]
        assert not strange, f"{node.name}: {strange} beside {device or 'plain routes'}"
    answer = ping(path.source, path.address, wait=1)
    assert answer.lost == 0, answer.output


def traffic(cluster: Cluster, facts: Facts, path: Path) -> dict[str, int]:
    """How many packets each backend's device on the source's node sends while the path's target is pinged."""
    names = {*DEVICES, cluster.flannel.tunnel_device}

    def sent() -> dict[str, int]:
        facts.forget()
        return {link.name: link.tx_packets for link in facts.node(path.source_node.name).links if link.name in names}

    before = sent()
    answer = ping(path.source, path.address, count=PINGS)
    assert answer.lost == 0, answer.output
    return {name: count - before.get(name, 0) for name, count in sent().items()}
