"""Who is who in a lab that a packet is followed through: its machines, its pods, and how flannel carries packets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from testbed.errors import InputError
from testbed.flannelspec import BACKENDS, ENCRYPTED
from testbed.labs.base import Lab, Node, Place
from testbed.model import LinkEnd, NodeSpec, Role
from testbed.probes.packets import Tunnel

if TYPE_CHECKING:
    from testbed.labs.kinds import AnyLab
    from testbed.nodes.deploy import Cluster

DEFAULT_PORTS = {"vxlan": 8472, "udp": 8285, "wireguard": 51820}


@dataclass(frozen=True, slots=True)
class PodAt:
    """A pod: the node it is on, the path of its network there, and its address."""

    node: str
    netns: str
    address: str


@dataclass(frozen=True)
class Layout:
    """A lab as far as packets are concerned."""

    lab: Lab
    run: str
    rules: str
    bridge: str
    tunnels: tuple[str, ...]
    port: int | None
    pods: Mapping[str, PodAt] = field(default_factory=dict)

    @property
    def backend(self) -> str:
        """The backend's type: `vxlan`, `host-gw`, …"""
        return BACKENDS[self.run].type

    @property
    def tunnel(self) -> Tunnel:
        """How packets are encapsulated that can be looked into."""
        kind = self.backend
        return Tunnel(kind if kind in ("vxlan", "udp", "ipip") else None, self.port)

    @property
    def six(self) -> bool:
        """Whether pods have IPv6 alone, so that it is packets of IPv6 that are followed."""
        return any(":" in pod.address for pod in self.pods.values())

    @property
    def carrier(self) -> str:
        """The tunnel device of the family that is followed; "" where there is none."""
        return (self.tunnels[-1] if self.six else self.tunnels[0]) if self.tunnels else ""

    @property
    def encrypted(self) -> str:
        """What outer packets are called that cannot be looked into; "" where they can."""
        return ENCRYPTED.get(self.backend, "")

    def node_of(self, endpoint: str) -> Node:
        """The machine that an endpoint is, or is on."""
        return self.lab.node(self.pods[endpoint].node if endpoint in self.pods else endpoint)

    def place(self, endpoint: str) -> Place:
        """Where an endpoint's commands run. Raises InputError naming the endpoints that there are."""
        if endpoint in self.pods:
            pod = self.pods[endpoint]
            return self.lab.node(pod.node).netns(pod.netns, endpoint)
        if endpoint in self.lab.nodes:
            return self.lab.node(endpoint)
        known = ", ".join([*self.lab.nodes, *self.pods])
        raise InputError(f"lab {self.lab.spec.id} has no {endpoint}", hint=f"it has: {known}")

    def address(self, endpoint: str) -> str:
        """The address by which an endpoint is reached. Raises InputError where there is no such endpoint."""
        self.place(endpoint)
        return self.pods[endpoint].address if endpoint in self.pods else self.address_of(self.lab.spec.node(endpoint))

    def address_of(self, machine: NodeSpec) -> str:
        """The address by which a machine is reached, of the family that is followed."""
        return str(machine.ip6 if self.six and machine.ip6 else machine.ip)

    def endpoint_at(self, address: str) -> str | None:
        """The endpoint that has an address; None where none has."""
        known = {pod.address: name for name, pod in self.pods.items()}
        return known.get(address) or next((n for n in self.lab.nodes if self.address(n) == address), None)

    def spaces(self, machine: str) -> Mapping[str, str]:
        """The network namespaces of a machine by place: its own, with the path "", and its pods'."""
        return {machine: ""} | {name: pod.netns for name, pod in self.pods.items() if pod.node == machine}

    def cable(self, machine: str, interface: str) -> LinkEnd | None:
        """The other end of the cable in a machine's interface; None where it is none of a cable."""
        end = LinkEnd(machine, interface)
        for link in self.lab.spec.links:
            if end in (link.a, link.b):
                return link.b if link.a == end else link.a
        return None

    def kind(self, place: str, interface: str) -> str:
        """What sort of interface that is, as hops say it."""
        if place in self.pods:
            return "pod"
        spec = self.lab.spec.node(place)
        if spec.role is not Role.NODE:
            return "fabric"
        if interface == spec.underlay.name:
            return "underlay"
        if interface in self.tunnels:
            return "tunnel"
        if interface == self.bridge:
            return "bridge"
        return "veth" if interface.startswith("veth") else "other"


def of_record(lab: AnyLab) -> Layout:
    """The layout of a lab that was brought up by another command. Raises InputError where flannel is not on it."""
    facts = lab.record.facts
    if "backend" not in facts:
        raise InputError(f"lab {lab.spec.id} has no flannel, and so no pods", hint="`testbed up --backend vxlan`")
    run = str(facts["backend"])
    pods = {n: PodAt(pod["node"], pod["netns"], pod["address"]) for n, pod in facts.get("pods", {}).items()}
    tunnels = tuple(name for name in (facts.get("tunnel"), facts.get("tunnel6")) if name)
    port = facts.get("port", DEFAULT_PORTS.get(BACKENDS[run].type))
    return Layout(lab, run, facts.get("rules", "iptables-nft"), facts.get("bridge", "cni0"), tunnels, port, pods)


def of_cluster(cluster: Cluster, *, six: bool = False) -> Layout:
    """The layout of a run's lab; with `six` for packets of IPv6, as without it where pods have no IPv4."""
    flannel = cluster.flannel
    pods = {
        name: PodAt(pod.node.name, pod.netns, str((six and pod.address6) or pod.address4 or pod.address6))
        for name, pod in cluster.pods.items()
    }
    tunnels = tuple(name for name in (flannel.tunnel_device, flannel.tunnel_device6) if name)
    return Layout(cluster.lab, flannel.backend.run, flannel.rules, flannel.bridge, tunnels, flannel.port, pods)
