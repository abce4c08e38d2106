"""A node of a cluster that starts anew, and all that ran there with it."""

from __future__ import annotations

from testbed.labs.fabric import wait_converged
from testbed.model import Role
from testbed.nodes import cni
from testbed.nodes.deploy import Cluster, remember, start_outside


def restart_node(cluster: Cluster, name: str) -> None:
    """Let a machine start anew, and start what ran there: the store, flanneld, pods, or routing.

    Pods come back under their names, attached anew, as a kubelet does it; what its disk has stays.  Raises LabError and
    ProductError as `bring_up` does.
    """
    lab = cluster.lab
    lab.restart(name)
    lab.settle([name])
    spec = lab.spec.node(name)
    if spec.routes:
        wait_converged(lab)
    if spec.role is Role.OUTSIDE:
        start_outside(cluster)
    if spec in lab.spec.cluster_nodes:
        cluster.store.resume(name)
        cluster.start_flanneld(name)
        cluster.wait_ready([name])
        for pod in [pod for pod in cluster.pods.values() if pod.node.name == name]:
            # Its network namespace is gone with the memory; its address is still taken, on the disk.
            cni.delete(lab.node(name), cluster.flannel.cni_conf, pod.attachment, pod.result)
            cluster.add_pod(name, pod.pod_name)
    remember(cluster)
