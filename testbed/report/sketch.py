"""What the page of a run knows of its lab: machines, cables, pods, MTUs, and the versions of everything.

    "labs": {"vxlan-1f": {"topology": "racks", "mtu": 9150, "backend": "vxlan",
      "machines": [{"name": "worker1", "role": "node", "rack": "leaf1", "address": "172.18.1.12", "asn": null}, …],
      "cables": [["worker1:eth0", "leaf1:node2"], …],
      "pods": [{"name": "worker1/client", "machine": "worker1", "address": "10.244.1.3", "veth": "veth1a2b"}, …],
      "devices": {"worker1": {"wire": "eth0", "tunnel": "flannel.1", "bridge": "cni0"}, …},
      "subnets": {"worker1": "10.244.1.0/24", …},
      "mtus": [{"machine": "worker1", "underlay": 9150, "tunnel": 9100, "bridge": 9100,
                "pods": {"worker1/client": 9100}, "wanted": 9100, "tunnel_wanted": 9100}, …],
      "versions": {"kernel": "6.1.0", "flanneld on worker1": "…", …}}}

The tunnel is that of IPv4; where pods have IPv6 alone it is that of IPv6, which may have to have less than pods have.
What cannot be had is left out: a report of a lab that is broken is when it is needed.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import metadata
from typing import TYPE_CHECKING, Any

from testbed import __version__
from testbed.errors import TestbedError
from testbed.fixtures import Facts
from testbed.labs.base import Node

if TYPE_CHECKING:
    from testbed.flannelspec import FlannelSpec
    from testbed.nodes.deploy import Cluster
    from testbed.nodes.pods import Pod

PROGRAMS: Mapping[str, tuple[str, ...]] = {
    "iproute2": ("ip", "-V"),
    "iptables": ("iptables", "-V"),
    "nftables": ("nft", "--version"),
    "FRR": ("/usr/lib/frr/zebra", "--version"),
    "etcd": ("etcd", "--version"),
    "tcpdump": ("tcpdump", "--version"),
    "ping": ("ping", "-V"),
}
"""Programs of the machine that a lab runs, and how they are asked for their version."""

LIBRARIES = ("scapy", "pytest")
VERSION_SECONDS = 5.0


def _attempt(look: Callable[[], Any]) -> Any:
    """What a look brings; None where the lab is too broken for it."""
    with suppress(TestbedError, AssertionError, KeyError, StopIteration, ValueError, OSError):
        return look()
    return None


def of(cluster: Cluster, facts: Facts, versions: Mapping[str, str]) -> dict[str, Any]:
    """The lab of a cluster as plain data; `versions` are those of the machine's programs."""
    spec, flannel = cluster.lab.spec, cluster.flannel
    machines = [
        {"name": node.name, "role": str(node.role), "rack": node.rack, "address": str(node.ip), "asn": node.asn}
        for node in spec.nodes
    ]
    names = {"tunnel": _tunnel(flannel), "bridge": flannel.bridge}
    return {
        "topology": spec.topology,
        "mtu": spec.mtu,
        "backend": cluster.options.backend,
        "rules": flannel.rules,
        "machines": machines,
        "cables": [[str(link.a), str(link.b)] for link in spec.links],
        "pods": [_pod(pod, facts) for pod in cluster.pods.values()],
        "devices": {n.name: {"wire": n.underlay.name} | names for n in spec.cluster_nodes},
        "subnets": {node.name: _subnet(node.name, cluster) for node in spec.cluster_nodes},
        "mtus": [_mtus(node, cluster, facts) for node in cluster.members],
        "versions": {**flanneld_versions(cluster), **versions},
    }


def _subnet(node: str, cluster: Cluster) -> str:
    cidr = cluster.pod_cidr if cluster.flannel.ipv4 else cluster.pod_cidr6
    return str(_attempt(lambda: cidr(node)) or "")


def _pod(pod: Pod, facts: Facts) -> dict[str, Any]:
    veth = _attempt(lambda: facts.host_veth(pod).name)
    address = pod.address4 or pod.address6
    return {"name": pod.name, "machine": pod.node.name, "address": str(address or ""), "veth": veth or ""}


def _tunnel(flannel: FlannelSpec) -> str | None:
    return flannel.tunnel_device if flannel.ipv4 else flannel.tunnel_device6


def _mtus(node: Node, cluster: Cluster, facts: Facts) -> dict[str, Any]:
    """The MTUs along a node's way out; None for a device that is not there."""
    flannel = cluster.flannel

    def of_device(name: str | None) -> int | None:
        link = _attempt(lambda: facts.node(node.name).link(name)) if name else None
        return link.mtu if link else None

    def of_pod(pod: Pod) -> int | None:
        link = _attempt(lambda: facts.pod(pod).link("eth0"))
        return link.mtu if link else None

    return {
        "machine": node.name,
        "underlay": of_device(node.spec.underlay.name),
        "tunnel": of_device(_tunnel(flannel)),
        "bridge": of_device(flannel.bridge),
        "pods": {pod.name: of_pod(pod) for pod in cluster.pods.values() if pod.node.name == node.name},
        "wanted": flannel.mtu_of(node.spec.underlay.mtu),
        "tunnel_wanted": (flannel.mtu_of if flannel.ipv4 else flannel.mtu6_of)(node.spec.underlay.mtu),
    }


def flanneld_versions(cluster: Cluster) -> dict[str, str]:
    """What runs on each node; only a program that is not ours has to be asked."""
    from testbed.nodes.undertest import implementations

    if not cluster.options.flanneld:
        return {"flanneld": "bundled"}
    asked = _attempt(lambda: implementations(cluster, {})) or {}
    return {f"flanneld on {node}": f"{found.name} {found.version}".strip() for node, found in asked.items()}


def machine_versions() -> dict[str, str]:
    """The versions of this machine's programs that a lab is made of."""
    found = {"testbed": __version__, "kernel": f"{os.uname().release} {os.uname().machine}"}
    found["Python"] = platform.python_version()
    with ThreadPoolExecutor(2) as pool:
        said = zip(PROGRAMS, pool.map(_said, PROGRAMS.values()), strict=True)
        found |= {name: line for name, line in said if line}
    for library in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            found[library] = metadata.version(library)
    return found


def _said(argv: tuple[str, ...]) -> str:
    """The first line of what a program says of itself; "" where it is not there."""
    try:
        done = subprocess.run(argv, capture_output=True, timeout=VERSION_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = (done.stdout or done.stderr).decode(errors="replace").strip().splitlines()
    return lines[0][:120] if lines else ""
