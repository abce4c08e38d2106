"""Many pods on one node, and how long each takes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from testbed.errors import LabError
from testbed.labs.base import Node
from testbed.nodes import cni, pods

if TYPE_CHECKING:
    from testbed.nodes.deploy import Cluster

AT_ONCE = 5
"""How many pods a node starts at once, as kubelets do."""

PAIRS = 12
"""How many ADDs of flannel and of its delegate are timed in turn."""

SAVED = "/var/lib/cni/flannel"
"""Where flannel keeps what it has told its delegate, for DEL."""


@dataclass
class Seen:
    """Seconds: of whole pods, of ADDs by flannel's plugin, and of its delegate alone with the same configuration."""

    starts: list[float] = field(default_factory=list)
    adds: list[float] = field(default_factory=list)
    delegates: list[float] = field(default_factory=list)


def add_many(cluster: Cluster, node: Node, count: int) -> Seen:
    """Make so many pods on a node, and time some more ADDs beside them; all of it is gone again at the end.

    Raises CniError where a plugin refuses.
    """
    seen = Seen()
    made: list[pods.Pod] = []

    def start(number: int) -> None:
        began = time.monotonic()
        made.append(cluster.add_pod(node.name, f"many{number}"))
        seen.starts.append(time.monotonic() - began)

    try:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for pod in [pool.submit(start, number) for number in range(count)]:
                pod.result()
        for number in range(PAIRS):
            _pair(cluster, node, number, seen)
    finally:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(cluster.delete_pod, made))
    return seen


def _pair(cluster: Cluster, node: Node, number: int, seen: Seen) -> None:
    conflist = cluster.flannel.cni_conf
    conf = dict(conflist["plugins"][0], name=conflist["name"], cniVersion=conflist["cniVersion"])
    first, second = (_attachment(cluster, node, f"add{number}-{which}") for which in ("flannel", "alone"))
    with_flannel = _Timed(node, conf, first)
    try:
        seen.adds.append(with_flannel.add())
        told = json.loads(node.read(f"{conf.get('dataDir', SAVED)}/{first.container_id}"))
        alone = _Timed(node, told, second)
        try:
            seen.delegates.append(alone.add())
        finally:
            alone.end()
    finally:
        with_flannel.end()


def _attachment(cluster: Cluster, node: Node, name: str) -> cni.Attachment:
    identity = pods.container_id(cluster.lab.spec.id, node.name, name)
    return cni.Attachment(identity, f"/run/netns/cni-{identity[:12]}")


@dataclass
class _Timed:
    """One plugin's attachment to a namespace of its own."""

    node: Node
    conf: Mapping[str, Any]
    attachment: cni.Attachment

    def add(self) -> float:
        """Make the namespace, and attach it; the seconds of the ADD."""
        self.node.run(["ip", "netns", "add", self.attachment.netns.rpartition("/")[2]])
        done = cni.call(self.node, "ADD", self.conf, self.attachment)
        if not done.ok:
            raise LabError(f"ADD by {self.conf['type']}: {done.stdout[-300:]}", where=self.node.name)
        return done.seconds

    def end(self) -> None:
        """Detach it, and remove the namespace."""
        cni.call(self.node, "DEL", self.conf, self.attachment)
        self.node.run(["ip", "netns", "delete", self.attachment.netns.rpartition("/")[2]], check=False)
