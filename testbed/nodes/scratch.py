"""Pods that a check makes for itself, and removes again with all that they leave."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from testbed.errors import TestbedError
from testbed.probes.cnifiles import DELEGATES, NETWORKS, read_cni_files

if TYPE_CHECKING:
    from testbed.labs.base import Node
    from testbed.nodes.deploy import Cluster
    from testbed.nodes.pods import Pod


@contextmanager
def scratch_pod(cluster: Cluster, node: str, name: str = "scratch") -> Iterator[Pod]:
    """A pod for as long as the block lasts. Raises CniError where a plugin refuses it."""
    pod = cluster.add_pod(node, name)
    try:
        yield pod
    finally:
        discard(cluster, pod)


def discard(cluster: Cluster, pod: Pod) -> None:
    """Remove a pod, whatever state it is in; what a plugin forgets is removed by hand, for the checks to come."""
    with suppress(TestbedError):
        cluster.delete_pod(pod)
    cluster.pods.pop(pod.name, None)
    alive = {one.container_id for one in cluster.pods.values()}
    forget_pods(pod.node, str(cluster.flannel.cni_conf["name"]), alive)
    pod.node.run(["ip", "netns", "delete", f"cni-{pod.container_id[:12]}"], check=False)


def forget_pods(node: Node, network: str, alive: Collection[str]) -> None:
    """Remove what CNI keeps on a node for containers other than these; `network` is the conflist's name."""
    found = read_cni_files(node, network)
    dead = [f"{NETWORKS}/{network}/{address}" for address, who in found.reserved.items() if who not in alive]
    dead += [f"{DELEGATES}/{who}" for who in found.delegates if who not in alive]
    if dead:
        node.run(["rm", "-f", *dead])
