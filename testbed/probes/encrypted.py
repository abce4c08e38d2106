"""Encrypted packets between two nodes: told by their outer headers, for nothing of what they carry can be read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from testbed.probes.packets import Decoded

if TYPE_CHECKING:
    from testbed.fixtures import Path
    from testbed.nodes.deploy import Cluster
    from testbed.probes.capture import Window

ESP = 50
"""IP's number for ESP."""


def is_encrypted(packet: Decoded, port: int | None) -> bool:
    """Whether it is ESP, or a UDP packet to that port where there is one; a fragment of either counts too."""
    if packet.ip is None:
        return False
    if packet.ip.fragment:
        return True
    return packet.ip.proto == ESP if port is None else packet.udp is not None and packet.udp.dport == port


def encrypted(cluster: Cluster, path: Path, window: Window, wire: str) -> list[Decoded]:
    """The encrypted packets between the nodes of a path, both ways, in the window of a check. It does not wait."""
    between = {path.source_node.spec.ip, path.target_node.spec.ip}
    seen = window.everything(wire, path.source_node.spec.ip.packed)
    own = [packet for packet in seen if packet.ip and {packet.ip.src, packet.ip.dst} == between]
    return [packet for packet in own if is_encrypted(packet, cluster.flannel.port)]
