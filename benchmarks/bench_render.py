"""How long it takes to read, lay out, render and check a fabric of 300 nodes: the aim is under 2 s."""

from __future__ import annotations

import time

from testbed.flannelbuild import default_flannel
from testbed.render import render_all
from testbed.topology import load_topology

ROUNDS = 5


def main() -> None:
    """Print the best and the worst of a few rounds."""
    flannel = default_flannel("vxlan", net_conf_overrides={"Network": "10.240.0.0/12"})
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        lab = load_topology("clos", "bench", overrides={"racks": "20", "nodes": "15", "spines": "4"})
        files = render_all(lab, flannel)
        seconds.append(time.perf_counter() - start)
    size = sum(map(len, files.values())) // 1024
    print(f"{len(lab.cluster_nodes)} nodes, {len(lab.nodes)} machines, {len(lab.links)} links: ", end="")
    print(f"{len(files)} files, {size} KiB in {min(seconds):.2f} to {max(seconds):.2f} s")


if __name__ == "__main__":
    main()
