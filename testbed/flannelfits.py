"""Whether a flannel can work on a lab: its Network leaves the lab's addresses alone, and its devices' names fit."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Network

from testbed.errors import Fault, InputError
from testbed.flannelspec import FlannelSpec
from testbed.model import LabSpec, NodeSpec

MAX_DEVICE = 15
"""Longest name of a network device, in characters."""


def _networks_of(machine: NodeSpec) -> Iterator[IPv4Network | IPv6Network]:
    """Every network that a machine of the lab has an address in."""
    yield from (i.address.network for i in machine.ifaces if i.address)
    yield from (i.address6.network for i in machine.ifaces if i.address6)
    for address in (machine.loopback, machine.bridge_address, machine.loopback6, machine.bridge_address6):
        if address is not None:
            yield address.network


def check_fits(flannel: FlannelSpec, lab: LabSpec) -> None:
    """Raise InputError where flannel's Network cannot work on that lab, or where a kernel takes no device of that name.

    It has to leave the lab's own addresses alone, and to hold a subnet for each node.
    """
    problems = [
        (f"{name} has {len(name)} characters, and a device's name at most {MAX_DEVICE}", "choose a shorter VNI or name")
        for name in (flannel.bridge, flannel.tunnel_device, flannel.tunnel_device6)
        if name and len(name) > MAX_DEVICE
    ]
    networks: list[tuple[str, IPv4Network | IPv6Network, int]] = []
    if flannel.ipv4:
        networks.append(("", flannel.network, flannel.subnet_len))
    if flannel.network6 is not None:
        networks.append(("IPv6", flannel.network6, flannel.subnet6_len))
    for family, network, length in networks:
        for machine in lab.nodes:
            if any(network.version == other.version and network.overlaps(other) for other in _networks_of(machine)):
                what = f"{network} overlaps the addresses of {machine.name}"
                problems.append((what, f"choose another {family}Network"))
                break
        # The first subnet of the Network is left out by flannel.
        room = (1 << (length - network.prefixlen)) - 1
        if room < len(lab.cluster_nodes):
            what = f"{network} has {room} subnets of /{length}, for {len(lab.cluster_nodes)} nodes"
            problems.append((what, f"give a wider {family}Network, or a longer {family}SubnetLen, by --net-conf"))
    mtu = flannel.mtu_of(lab.mtu)
    if mtu > lab.mtu - flannel.backend.overhead:
        problems.append((f"Backend.MTU leaves pods {mtu} bytes, more than the lab's MTU of {lab.mtu} can carry", ""))
    if problems:
        raise InputError(faults=[Fault("net-conf.json", 0, "", what, hint) for what, hint in problems])
