"""A node that comes back with another subnet than it had, for a while."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Network
from typing import TYPE_CHECKING

from testbed.errors import ProductError
from testbed.labs.base import Node
from testbed.nodes.etcd import Etcd
from testbed.nodes.otherwise import restart_flanneld
from testbed.nodes.scratch import discard

if TYPE_CHECKING:
    from testbed.nodes.deploy import Cluster

DAY = 86400


@contextmanager
def other_subnet(cluster: Cluster, etcd: Etcd, node: Node) -> Iterator[IPv4Network]:
    """A node whose subnet somebody else has got, and that therefore has another; the bridge is the former one's still.

    Its pods are away meanwhile, and are made anew at the end, in the subnet that it had before.  Raises ProductError
    where flanneld gets no other subnet.
    """
    before = cluster.pod_cidr(node.name)
    key = str(cluster.leases()[node.name]["key"])
    leases = etcd.under(key.rpartition("/")[0] + "/")
    pods = [pod for pod in cluster.pods.values() if pod.node.name == node.name]
    for pod in pods:
        cluster.delete_pod(pod)

    def give_away(_: Node) -> None:
        etcd.put(key, json.dumps({"PublicIP": str(node.spec.ip + 100), "BackendType": "alloc"}))

    def give_back(_: Node) -> None:
        for other in etcd.under(key.rpartition("/")[0] + "/"):
            if other not in leases:
                etcd.delete(other)
        etcd.put(key, leases[key], ttl=DAY)

    try:
        restart_flanneld(cluster, node.name, meanwhile=give_away)
        now = cluster.pod_cidr(node.name)
        if now == before:
            raise ProductError(f"flanneld has {now} again, which is another node's", where=node.name)
        yield now
    finally:
        for pod in [pod for pod in cluster.pods.values() if pod.node.name == node.name]:
            discard(cluster, pod)
        node.run(["ip", "link", "delete", cluster.flannel.bridge], check=False)
        restart_flanneld(cluster, node.name, meanwhile=give_back)
        for pod in pods:
            cluster.add_pod(node.name, pod.pod_name)
