"""SEC: who can get into the tunnel, and who can read what is in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from testbed.checks import check
from testbed.fixtures import Facts, Paths
from testbed.labs.base import Node
from testbed.nodes.deploy import Cluster
from testbed.probes.capture import Window
from testbed.probes.flows import Nonce, ping
from testbed.probes.forged import TunnelEnd, forged_ping
from testbed.probes.translated import VIRTUAL

ENCRYPTED = ("wireguard", "ipsec")


@contextmanager
def strict(node: Node, device: str) -> Iterator[None]:
    """While the block lasts the node drops what comes by a device that its own routes do not lead back to."""
    setting = f"net/ipv4/conf/{device}/rp_filter"  # with dots the device's own would part its name
    before = node.run(["sysctl", "-n", setting]).stdout.strip()
    node.run(["sysctl", "-q", "-w", f"{setting}=1"])
    try:
        yield
    finally:
        node.run(["sysctl", "-q", "-w", f"{setting}={before}"])


@check("SEC-01")
def test_strangers_get_into_the_tunnel_unless_sources_are_checked(
    paths: Paths, cluster: Cluster, facts: Facts, window: Window
) -> None:
    """What is known: a host that is no peer reaches pods by it; strict rp_filter stops it. Source: #961, felix#2000."""
    path, flannel = paths.remote(), cluster.flannel
    pod, node, device = path.pods[1], path.target_node, str(flannel.tunnel_device)
    end = TunnelEnd("ipip", node.spec.ip)
    if flannel.backend.type == "vxlan":
        end = TunnelEnd(
            "vxlan", node.spec.ip, int(flannel.port or 0), flannel.vni or 0, facts.link(node.name, device).mac
        )
    stranger, place = cluster.lab.node(cluster.lab.spec.outside.name), f"{pod.name}:eth0"
    known = Nonce.new()
    forged_ping(stranger, end, VIRTUAL, pod.address, nonce=known)
    seen = window.select(place, known, lambda p: bool(p.ip and p.ip.src == VIRTUAL), at_least=3)
    assert len(seen) == 3, f"{len(seen)} of 3 packets of a stranger's reached {pod.name}, as they are known to do"
    stopped, control = Nonce.new(), Nonce.new()
    with strict(node, device):
        forged_ping(stranger, end, VIRTUAL, pod.address, nonce=stopped)
        answer = ping(path.source, pod.address, nonce=control)
        assert answer.lost == 0, f"strict rp_filter on {device} stops peers, too: {answer.output}"
        window.absent(place, stopped, control=control)


@check("SEC-02")
def test_only_encrypting_backends_hide_what_is_sent(paths: Paths, cluster: Cluster, window: Window) -> None:
    """Whoever sees the underlay can read pods' packets, but for wireguard's and ipsec's. Source: S1, S4."""
    path, nonce, control = paths.remote(), Nonce.new(), Nonce.new()
    answer = ping(path.source, path.address, nonce=nonce, count=3)
    ping(path.source_node, path.target_node.spec.ip, nonce=control)
    kind = cluster.flannel.backend.type
    for wire in path.wires:
        if kind in ENCRYPTED:
            window.absent(wire, nonce, control=control)
        else:
            seen = window.packets(wire, nonce, at_least=6)
            assert len(seen) == 6, f"{wire}: of 6 packets {len(seen)} can be read, where {kind} does not encrypt"
    assert answer.lost == 0, answer.output
