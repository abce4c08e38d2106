"""Leases of nodes that there are not, and a node's flanneld with another configuration for a while."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from itertools import islice
from typing import TYPE_CHECKING, Any

from testbed.deadline import Deadline
from testbed.errors import LabError, ProductError
from testbed.nodes.etcd import PREFIX, Etcd
from testbed.nodes.store import EtcdLeases

if TYPE_CHECKING:
    from testbed.nodes.deploy import Cluster

OTHER_PREFIX = "/other/network"
OTHER_SECONDS = 20.0


def etcd_of(cluster: Cluster) -> Etcd | None:
    """The lab's etcd; None where leases are elsewhere."""
    store = cluster.store
    return store.etcd if isinstance(store, EtcdLeases) else None


def key_of(prefix: str, subnet: IPv4Network) -> str:
    """A lease's key."""
    return f"{prefix}/subnets/{str(subnet).replace('/', '-')}"


def free_subnets(cluster: Cluster, count: int) -> list[IPv4Network]:
    """Subnets that no member has, from the Network's end."""
    taken = {cluster.pod_cidr(member.name) for member in cluster.members}
    subnets = reversed(list(cluster.flannel.network.subnets(new_prefix=cluster.flannel.subnet_len)))
    return list(islice((one for one in subnets if one not in taken), count))


@contextmanager
def made_up_leases(etcd: Etcd, leases: Mapping[IPv4Network, Mapping[str, Any]]) -> Iterator[None]:
    """Leases by subnet, for as long as the block runs."""
    try:
        for subnet, value in leases.items():
            etcd.put(key_of(PREFIX, subnet), json.dumps(value))
        yield
    finally:
        for subnet in leases:
            etcd.delete(key_of(PREFIX, subnet))


@contextmanager
def other_backend(cluster: Cluster, etcd: Etcd, node: str, backend: Mapping[str, Any]) -> Iterator[None]:
    """A node's flanneld with another backend, of vxlan's kind, and its peers' leases as that one has them.

    It keeps its subnet. What it had before runs again at the end, whatever happened. Raises ProductError where the
    other one does not come up.
    """
    conf = {**cluster.flannel.net_conf, "Backend": dict(backend)}
    etcd.put(f"{OTHER_PREFIX}/config", json.dumps(conf))
    for number, member in enumerate(cluster.members):
        if member.name != node:
            data = {"VNI": backend.get("VNI", 1), "VtepMAC": f"02:00:5e:00:53:{number:02x}"}
            value = _lease(member.spec.ip, str(backend["Type"]), data)
            etcd.put(key_of(OTHER_PREFIX, cluster.pod_cidr(member.name)), json.dumps(value))
    own = key_of(OTHER_PREFIX, cluster.pod_cidr(node))
    cluster.stop_flanneld(node)
    try:
        argv = [*cluster.flanneld_argv(node), f"--etcd-prefix={OTHER_PREFIX}"]
        cluster.lab.node(node).start(argv, name="flanneld", env=dict(cluster.flannel.env))
        if Deadline(OTHER_SECONDS).poll(lambda: own in _subnets_of(etcd)) is None:
            raise ProductError(f"no lease with backend {backend['Type']}\n{cluster.flanneld_log(node)}", where=node)
        yield
    finally:
        _end(cluster, node)
        cluster.start_flanneld(node)
        for key in etcd.under(f"{OTHER_PREFIX}/"):
            etcd.delete(key)


def _end(cluster: Cluster, node: str) -> None:
    """End the node's flanneld, whatever state it is in."""
    if cluster.flanneld_pid(node) is None:
        return
    try:
        cluster.stop_flanneld(node)
    except ProductError:
        cluster.stop_flanneld(node, "KILL")


@dataclass(frozen=True, slots=True)
class Stranger:
    """A node that there is not, on the link of the first member."""

    subnet: IPv4Network
    address: IPv4Address
    mac: str

    @classmethod
    def new(cls, cluster: Cluster) -> Stranger:
        """One with a free subnet, an address that no machine has, and a MAC of its own. Raises LabError."""
        subnets = free_subnets(cluster, 1)
        if not subnets:
            raise LabError("every subnet of the Network is leased")
        return cls(subnets[0], cluster.members[0].spec.ip + 100, random_mac())

    def lease(self, cluster: Cluster) -> dict[str, Any]:
        """Its lease with the cluster's backend."""
        kind, data = cluster.flannel.backend.type, None
        if kind == "vxlan":
            data = {"VNI": cluster.flannel.vni, "VtepMAC": self.mac}
        elif kind == "wireguard":
            key = base64.b64encode(hashlib.sha256(self.mac.encode()).digest()).decode()
            data = {"PublicKey": key, "Port": cluster.flannel.port}
        return _lease(self.address, kind, data)


def random_mac() -> str:
    """A locally administered MAC that nobody has."""
    return f"02:{secrets.token_bytes(5).hex(':')}"


def _lease(address: IPv4Address, kind: str, data: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"PublicIP": str(address), "BackendType": kind, "BackendData": data}


def _subnets_of(etcd: Etcd) -> set[str]:
    """The leases' keys of the other network, by their IPv4 subnets."""
    return {key.partition("&")[0] for key in etcd.under(f"{OTHER_PREFIX}/subnets/")}
