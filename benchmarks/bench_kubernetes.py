"""What flanneld costs among 1000 nodes whose leases are in the Kubernetes API, beside another flanneld if one is given.

Usage: python -m benchmarks.bench_kubernetes [--nodes N] [--peer PATH]. Prints a table. Both run in one lab at once, the
bundled one on worker1, the peer on worker2; nodes are as large as a kubelet's are, 20 KB.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, table
from testbed.deadline import Deadline
from testbed.errors import TestbedError
from testbed.nodes import deploy
from testbed.nodes.deploy import Cluster
from testbed.nodes.kubernetes import Call
from testbed.options import RunOptions

PREFIX = "flannel.alpha.coreos.com/"
BATCH, SECONDS = 50, 120.0


def node(number: int) -> dict[str, Any]:
    """A node that somebody's flanneld has annotated."""
    cidr = f"10.{96 + number // 256 % 16}.{number % 256}.0/24"
    texts = {
        "kube-subnet-manager": "true",
        "backend-type": "vxlan",
        "backend-data": json.dumps({"VNI": 1, "VtepMAC": f"0a:00:00:00:{number // 256:02x}:{number % 256:02x}"}),
        "public-ip": f"172.20.{number // 256}.{number % 256}",
    }
    images = [
        {"names": [f"registry.example/library/image-{one}@sha256:{one:064x}", f"registry.example/image-{one}:v1"]}
        for one in range(120)
    ]
    return {
        "metadata": {"name": f"node{number}", "annotations": {PREFIX + key: text for key, text in texts.items()}},
        "spec": {"podCIDR": cidr, "podCIDRs": [cidr]},
        "status": {"images": images},
    }


def figures(cluster: Cluster, name: str, nodes: int) -> dict[str, float]:
    """Start flanneld anew on a node, and tell what it took until all routes were there."""
    place = cluster.lab.node(name)
    cluster.stop_flanneld(name)
    place.run(["sh", "-c", "rm -rf /run/flannel && ip link delete flannel.1"])
    began = Deadline(SECONDS)
    pid = cluster.start_flanneld(name)
    cluster.wait_ready([name])
    ready = began.elapsed
    count = ["sh", "-c", "ip route show dev flannel.1 | wc -l"]
    if not began.poll(lambda: int(place.run(count).stdout) >= nodes or None):
        raise SystemExit(f"{name}: not all routes within {SECONDS:.0f} s\n{cluster.flanneld_log(name)}")
    routes = began.elapsed
    status = dict(line.split(":", 1) for line in place.read(f"/proc/{pid}/status").decode().splitlines())
    ticks = sum(map(int, place.read(f"/proc/{pid}/stat").decode().rpartition(")")[2].split()[11:13]))
    resident = int(status["VmRSS"].split()[0]) / 1024
    return {"ready s": ready, "all routes s": routes, "CPU s": ticks / os.sysconf("SC_CLK_TCK"), "RSS MB": resident}


def kubernetes(nodes: int, peer: Path | None) -> list[Figure]:
    """The figures among so many nodes."""
    options = RunOptions(
        backend="vxlan",
        name=f"bench-{os.getpid()}",
        topology="flat",
        store="kubernetes",
        net_conf={"Network": "10.96.0.0/12", "SubnetLen": "24"},
        flanneld={"worker2": peer} if peer else {},
    )
    try:
        cluster = deploy.bring_up(options)
    except TestbedError as error:
        return [Figure("kubernetes", "", None, note=f"not measured: {error}")]
    try:
        for first in range(BATCH, nodes + BATCH, BATCH):
            cluster.kubernetes.ask(*[Call("POST", "/api/v1/nodes", node(one)) for one in range(first, first + BATCH)])
        ours = figures(cluster, "worker1", nodes)
        theirs = figures(cluster, "worker2", nodes) if peer else {}
    finally:
        cluster.lab.down()
    rows = (
        ("memory", "RSS MB", "MB", 0.8),
        ("CPU to all routes", "CPU s", "s", None),
        ("all routes", "all routes s", "s", None),
    )
    return [
        Figure(f"{what}, Kubernetes store, {nodes} nodes", unit, ours[key], theirs.get(key), aim=aim)
        for what, key, unit, aim in rows
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--peer", type=Path)
    given = parser.parse_args()
    print(table(kubernetes(given.nodes, given.peer)))


if __name__ == "__main__":
    main()
