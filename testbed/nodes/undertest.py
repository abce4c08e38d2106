"""Which implementations of flannel the nodes of a cluster run, and what they say that their version is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.nodes.nodefiles import FLANNELD
from testbed.report.expectations import Implementation, numbers

if TYPE_CHECKING:
    from testbed.nodes.deploy import Cluster

VERSION_SECONDS = 10.0


def implementations(cluster: Cluster, known: dict[str, Implementation]) -> Mapping[str, Implementation]:
    """The implementation of each node by its name; `known` keeps what was asked before.

    A program that is not ours is asked on its node and nowhere else: it may be anybody's.
    """
    asked: dict[Path | None, Implementation] = {}
    for node in cluster.members:
        if node.name in known:
            continue
        path = cluster.options.implementation(node.name)
        if path not in asked:
            asked[path] = Implementation("bundled" if path is None else path.name, _version(cluster, node.name))
        known[node.name] = asked[path]
    return known


def _version(cluster: Cluster, node: str) -> str:
    """What `flanneld --version` says on a node; "" where that is no version."""
    said = cluster.lab.node(node).run([FLANNELD, "--version"], check=False, timeout=VERSION_SECONDS)
    lines = [line.strip() for line in (said.stdout + "\n" + said.stderr).splitlines()]
    return next((line for line in lines if numbers(line) is not None), "")
