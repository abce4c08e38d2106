"""Pods that a check makes for itself, and removes again with all that they leave."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from testbed.errors import TestbedError
from testbed.probes.cnifiles import DELEGATES, NETWORKS, read_cni_files

if TYPE_CHECKING:
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
    network = str(cluster.flannel.cni_conf["name"])
    left = [f"{NETWORKS}/{network}/{address}" for address in read_cni_files(pod.node, network).of(pod.container_id)]
    pod.node.run(["rm", "-f", f"{DELEGATES}/{pod.container_id}", *left])
    pod.node.run(["ip", "netns", "delete", f"cni-{pod.container_id[:12]}"], check=False)
