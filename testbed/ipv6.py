"""A lab's underlay with IPv6 beside IPv4: its addresses are derived from the IPv4 ones, so that both read alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Interface
from typing import NamedTuple

from testbed.model import LabSpec, NodeSpec, Role

ROUTERS6, OUTSIDE6 = IPv6Address("fd50::"), IPv6Address("2001:db8::")
"""Where routers' loopbacks are, and the outside host: outside any unique local range, as its IPv4 address is public."""


class _Rack(NamedTuple):
    number: int
    subnet: IPv4Network

    def interface(self, address: IPv4Address) -> IPv6Interface:
        """The host's number in its subnet, whose decimal digits stand for themselves: 11 is ::11."""
        host = int(address) - int(self.subnet.network_address)
        return IPv6Interface((int(IPv6Address(f"fd50:0:0:{self.number:x}::")) + int(str(host), 16), 64))


def with_ipv6(lab: LabSpec) -> LabSpec:
    """The same lab with IPv6 on its underlay.

    The first rack is fd50:0:0:1::/64, the next fd50:0:0:2::/64; the eleventh address of a rack's IPv4 subnet is ::11
    there.  Routers' loopbacks are in fd50::/64, the outside host in 2001:db8::/64.  Fabric links stay unnumbered.
    """
    leaves = [(leaf.name, leaf.bridge_address) for leaf in lab.of_role(Role.LEAF)]
    racks = {name: _Rack(number, gateway.network) for number, (name, gateway) in enumerate(leaves, 1) if gateway}
    return replace(lab, nodes=tuple(_machine(node, racks) for node in lab.nodes))


def _machine(node: NodeSpec, racks: Mapping[str, _Rack]) -> NodeSpec:
    loopback = None
    if node.loopback is not None:
        base, mask = (OUTSIDE6, 0xFF) if node.role is Role.OUTSIDE else (ROUTERS6, 0xFFFF)
        loopback = IPv6Interface((int(base) + (int(node.loopback.ip) & mask), 128))
    rack = racks.get(node.rack or "")
    if rack is None:
        return replace(node, loopback6=loopback)
    ifaces = [
        replace(iface, address6=rack.interface(iface.address.ip)) if iface.address else iface for iface in node.ifaces
    ]
    return replace(
        node,
        ifaces=tuple(ifaces),
        loopback6=loopback,
        gateway6=rack.interface(node.gateway).ip if node.gateway else None,
        bridge_address6=rack.interface(node.bridge_address.ip) if node.bridge_address else None,
    )
