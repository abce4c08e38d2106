"""RES: many nodes, and pods that come and go."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network, ip_interface
from typing import Any

import pytest

from testbed.checks import check
from testbed.deadline import Deadline
from testbed.errors import LabError
from testbed.fixtures import Facts, Figures, Paths
from testbed.labs.base import Node
from testbed.nodes import cni
from testbed.nodes.alone import NETWORK, PREFIX, UPLINK, Alone, flanneld_alone
from testbed.nodes.deploy import Cluster
from testbed.nodes.madeup import key_of
from testbed.nodes.pods import container_id
from testbed.nodes.scratch import forget_pods
from testbed.parallel import each
from testbed.probes.cnifiles import read_cni_files
from testbed.probes.iproute import read_state

FEW, PEERS, SUBNET_LEN = 200, 1000, 27
MOVES = 6
"""How often every peer gets another address in one go: six thousand changes."""
PROGRAMMED_SECONDS = 30.0
"""For a machine that is busy: flannel takes a second."""
MOVED_SECONDS = 90.0
"""The same for all moves, each of which may be followed one by one."""
RSS_KB = 100 * 1024
ROUNDS, PODS = 4, 10


def peers(cluster: Cluster, moved: int = 0) -> dict[IPv4Network, dict[str, Any]]:
    """The leases of a thousand peers by subnet, each behind an address of the uplink: another one for each move."""
    found: dict[IPv4Network, dict[str, Any]] = {}
    for number, subnet in enumerate(list(NETWORK.subnets(new_prefix=SUBNET_LEN))[-PEERS:]):
        lease: dict[str, Any] = {"PublicIP": str(UPLINK[3 + (number + moved) % 200]), "BackendType": "host-gw"}
        if cluster.flannel.backend.type == "vxlan":
            mac = f"02:00:5e:01:{number >> 8:02x}:{number & 255:02x}"
            lease |= {"BackendType": "vxlan", "BackendData": {"VNI": 1, "VtepMAC": mac}}
        found[subnet] = lease
    return found


def missing(alone: Alone, wanted: Mapping[IPv4Network, Mapping[str, Any]]) -> str:
    """What of the peers is not as it has to be in the kernel of that flanneld's network; "" where all is."""
    state = read_state(alone.place)
    there = {route.dst for route in state.routes if route.dst.prefixlen == SUBNET_LEN and route.dev != "lo"}
    faults = [f"{len(wanted.keys() - there)} routes missing", f"{len((there & ALL) - wanted.keys())} too many"]
    plain = {(subnet, IPv4Address(x["PublicIP"])) for subnet, x in wanted.items() if not x.get("BackendData")}
    faults.append(f"{len(plain - {(route.dst, route.gateway) for route in state.routes})} by another address")
    if any(lease.get("BackendData") for lease in wanted.values()) or state.link("flannel.1"):
        macs = {str(lease["BackendData"]["VtepMAC"]): IPv4Address(lease["PublicIP"]) for lease in wanted.values()}
        entries = {(entry.mac, entry.dst) for entry in state.fdb if entry.dev == "flannel.1" and entry.dst}
        near = {(n.address, n.mac) for n in state.neighbours if n.dev == "flannel.1" and "PERMANENT" in n.state}
        ends = {(subnet[0], str(lease["BackendData"]["VtepMAC"])) for subnet, lease in wanted.items()}
        faults += [f"{len(entries ^ macs.items())} forwarding entries wrong", f"{len(near ^ ends)} neighbours wrong"]
    return ", ".join(fault for fault in faults if not fault.startswith("0 "))


ALL = frozenset(list(NETWORK.subnets(new_prefix=SUBNET_LEN))[-PEERS:])


def programmed(
    alone: Alone, wanted: Mapping[IPv4Network, Mapping[str, Any]], seconds: float = PROGRAMMED_SECONDS
) -> None:
    """Wait until the peers, and no others, are in the kernel."""
    said = ["never looked"]

    def look() -> bool:
        said[0] = missing(alone, wanted)
        return not said[0]

    assert Deadline(seconds).poll(look), f"{len(wanted)} peers: {said[0]}\n{alone.log()[-1000:]}"


def publish(alone: Alone, leases: Mapping[IPv4Network, Mapping[str, Any]]) -> None:
    """Put the peers' leases into the store, where they replace those of the same subnets."""
    alone.etcd.put_all({key_of(PREFIX, subnet): json.dumps(lease) for subnet, lease in leases.items()})


def resident(node: Node, name: str) -> int:
    """How much memory a daemon of a node has, in kB. Raises LabError where it does not run."""
    pid = int(node.read(f"/run/{name}.pid") or b"0")
    found = re.search(rb"^VmRSS:\s+(\d+) kB", node.read(f"/proc/{pid}/status"), re.MULTILINE)
    if found is None:
        raise LabError(f"{name} has no memory", where=node.name)
    return int(found[1])


@check("RES-12")
def test_a_thousand_peers_are_all_programmed(cluster: Cluster, figures: Figures) -> None:
    """Every route, neighbour and entry of 200, of 1000, and of these moved six times, in 100 MiB. Source: k8s#25969."""
    with flanneld_alone(cluster) as alone:
        if alone is None:
            pytest.skip("leases of nodes that there are not need etcd")
        wanted = peers(cluster)
        alone.configure({"Type": cluster.flannel.backend.type}, SubnetLen=SUBNET_LEN, SubnetMax=str(min(ALL)[0] - 32))
        alone.start()
        alone.wait_ready()
        (own,) = alone.leases()
        for some in (dict(list(wanted.items())[:FEW]), wanted):
            deadline = Deadline(PROGRAMMED_SECONDS)
            publish(alone, some)
            programmed(alone, some)
            figures.add(f"{len(some)} peers are in the kernel", deadline.elapsed, "s")
        for move in range(1, MOVES + 1):
            publish(alone, peers(cluster, move))
        programmed(alone, peers(cluster, MOVES), MOVED_SECONDS)
        used = resident(alone.node, "alone")
        assert used < RSS_KB, f"flanneld takes {used} kB for {PEERS} peers"
        kept = alone.etcd.under(own)[own]
        alone.etcd.delete_all([key_of(PREFIX, subnet) for subnet in wanted])
        programmed(alone, {})
        assert alone.etcd.under(own)[own] == kept, "its own lease is another one now"


@check("RES-14")
def test_pods_that_come_and_go_leave_nothing(paths: Paths, cluster: Cluster, facts: Facts) -> None:
    """Four times ten at once: no address twice, none kept, and the bridge has the ports that it had. Source: POD-14."""
    node = paths.remote().source_node
    name, cidr = str(cluster.flannel.cni_conf["name"]), cluster.pod_cidr(node.name)
    taken = {pod.address for pod in cluster.pods.values()}
    ports, files = ports_of(cluster, facts, node), read_cni_files(node, name)
    wanted = [attachment(cluster, node, number) for number in range(PODS)]
    conf = cluster.flannel.cni_conf
    try:
        for turn in range(1, ROUNDS + 1):
            results = each(lambda one: made(node, conf, one), wanted)
            given = [ip_interface(ip["address"]).ip for one in results for ip in one["ips"]]
            found = [address for address in given if isinstance(address, IPv4Address)]
            assert len(set(found)) == PODS, f"round {turn}: {len(set(found))} addresses for {PODS} pods"
            assert not taken & set(found), f"round {turn}: {taken & set(found)} are other pods'"
            assert all(address in cidr for address in found), f"round {turn}: {found} are not all of {cidr}"
            each(lambda pair: removed(node, conf, *pair), zip(wanted, results, strict=True))
            left = set(read_cni_files(node, name).reserved) - set(files.reserved)
            assert not left, f"round {turn}: {len(left)} addresses are kept for pods that are gone"
            now = ports_of(cluster, facts, node)
            assert now == ports, f"round {turn}: the bridge has other ports: {now ^ ports}"
    finally:
        each(lambda one: node.run(["ip", "netns", "delete", one.netns.rpartition("/")[2]], check=False), wanted)
        forget_pods(node, name, {pod.container_id for pod in cluster.pods.values()})
        facts.forget()


def attachment(cluster: Cluster, node: Node, number: int) -> cni.Attachment:
    """Who one of the pods is to CNI."""
    identity = container_id(cluster.lab.spec.id, node.name, f"churn-{number}")
    return cni.Attachment(identity, f"/run/netns/cni-{identity[:12]}")


def made(node: Node, conf: Mapping[str, Any], one: cni.Attachment) -> dict[str, Any]:
    """Make a pod's network, without anything that runs in it."""
    node.run(["ip", "netns", "add", one.netns.rpartition("/")[2]])
    return cni.add(node, conf, one)


def removed(node: Node, conf: Mapping[str, Any], one: cni.Attachment, result: Mapping[str, Any]) -> None:
    """Remove it again."""
    cni.delete(node, conf, one, result)
    node.run(["ip", "netns", "delete", one.netns.rpartition("/")[2]])


def ports_of(cluster: Cluster, facts: Facts, node: Node) -> frozenset[str]:
    """The bridge's ports."""
    facts.forget()
    return frozenset(link.name for link in facts.node(node.name).links if link.master == cluster.flannel.bridge)
