"""A peer that there is not: its lease in whichever store the lab has, which a check changes as it likes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import TYPE_CHECKING, Any

from testbed.deadline import Deadline
from testbed.errors import LabError
from testbed.nodes.etcd import PREFIX
from testbed.nodes.kubernetes import PREFIX as ANNOTATIONS
from testbed.nodes.kubernetes import Call
from testbed.nodes.madeup import etcd_of, free_subnets, key_of
from testbed.probes.iproute import read_state

if TYPE_CHECKING:
    from testbed.nodes.deploy import Cluster

NAME = "madeup"
POD_CIDR_SECONDS = 20.0


@dataclass(frozen=True)
class MadeUpPeer:
    """A lease, or a node of Kubernetes, of a machine that there is not. `subnet6` is there in dual stack alone."""

    cluster: Cluster
    subnet: IPv4Network
    subnet6: IPv6Network | None = None

    def publish(
        self, ip: IPv4Address, data: Any, *, ip6: IPv6Address | None = None, data6: Any = None, kind: str = ""
    ) -> None:
        """Say how it is reached: addresses, and the data of the backend, which is the cluster's unless `kind` says."""
        kind = kind or self.cluster.flannel.backend.type
        if (etcd := etcd_of(self.cluster)) is not None:
            value = {"PublicIP": str(ip), "BackendType": kind, "BackendData": data}
            value |= {"PublicIPv6": str(ip6), "BackendV6Data": data6} if ip6 is not None else {}
            etcd.put(self._key, json.dumps(value))
            return
        said = {"kube-subnet-manager": "true", "backend-type": kind, "public-ip": str(ip)}
        said |= {"backend-data": json.dumps(data)}
        said |= {"public-ipv6": str(ip6), "backend-v6-data": json.dumps(data6)} if ip6 is not None else {}
        self.cluster.kubernetes.annotate(NAME, {f"{ANNOTATIONS}{key}": text for key, text in said.items()})

    @property
    def _key(self) -> str:
        more = f"&{str(self.subnet6).replace('/', '-')}" if self.subnet6 is not None else ""
        return key_of(PREFIX, self.subnet) + more


@contextmanager
def made_up_peer(cluster: Cluster) -> Iterator[MadeUpPeer]:
    """A peer that publishes nothing yet, for as long as the block lasts. Raises LabError for a node without podCIDR."""
    etcd = etcd_of(cluster)
    if etcd is None:
        yield from _in_kubernetes(cluster)
        return
    peer = MadeUpPeer(cluster, free_subnets(cluster, 1)[0], _free_subnet6(cluster))
    try:
        yield peer
    finally:
        etcd.delete(peer._key)


def _free_subnet6(cluster: Cluster) -> IPv6Network | None:
    network6 = cluster.flannel.network6
    if network6 is None:
        return None
    taken = {cluster.pod_cidr6(member.name) for member in cluster.members}
    length = cluster.flannel.subnet6_len
    last = int(network6.broadcast_address) >> (128 - length)
    subnets = (IPv6Network(((last - number) << (128 - length), length)) for number in range(len(taken) + 1))
    return next(one for one in subnets if one not in taken)


def _in_kubernetes(cluster: Cluster) -> Iterator[MadeUpPeer]:
    api = cluster.kubernetes
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NAME, "annotations": {}}}
    api.ask(Call("POST", "/api/v1/nodes", node))
    try:
        cidrs = Deadline(POD_CIDR_SECONDS).poll(lambda: api.nodes()[NAME]["spec"].get("podCIDRs"))
        if not cidrs:
            raise LabError(f"Kubernetes gave the node {NAME} no podCIDR", where=api.node.name)
        networks = [ip_network(cidr) for cidr in cidrs]
        first = next(one for one in networks if isinstance(one, IPv4Network))
        yield MadeUpPeer(cluster, first, next((one for one in networks if isinstance(one, IPv6Network)), None))
    finally:
        api.try_delete(NAME)


def sweep_entries(cluster: Cluster) -> None:
    """Remove forwarding entries for tunnels that no member has: some flannelds leave what a peer was known by."""
    device = cluster.flannel.tunnel_device
    if cluster.flannel.backend.type != "vxlan" or device is None:
        return
    states = {node.name: read_state(node) for node in cluster.members}
    alive = {link.mac for state in states.values() if (link := state.link(device)) is not None}
    for node in cluster.members:
        for entry in states[node.name].fdb:
            if entry.dev == device and entry.dst is not None and entry.mac not in alive:
                argv = ["bridge", "fdb", "delete", entry.mac, "dev", device, "dst", str(entry.dst)]
                node.run(argv, check=False)  # somebody may have seen to it meanwhile
