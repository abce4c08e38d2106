"""What a lab is: frozen, typed, no I/O.

Every name, address, MAC and port of a lab is derived here, once, from the lab's id and its topology.
Lab kinds bring a `LabSpec` to life; renderers write it for other tools.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface

from testbed.linkfault import NETEM, LinkFault

VRF = "vrf"
"""The kernel feature that leaves with a VRF take."""

UNDERLAY = "eth0"
"""Name of a node's interface to its leaf."""

BRIDGE = "br0"
"""Name of a leaf's bridge; its address is the rack's gateway."""


class Role(StrEnum):
    """What a machine of the lab is."""

    NODE = "node"
    LEAF = "leaf"
    SPINE = "spine"
    OUTSIDE = "outside"


@dataclass(frozen=True, slots=True)
class IfaceSpec:
    """One end of a link. `address` is None for BGP-unnumbered fabric links and for bridge ports."""

    name: str
    mac: str
    mtu: int
    address: IPv4Interface | None = None
    bridge: str | None = None
    address6: IPv6Interface | None = None


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """One machine of the lab. Of IPv6 there is something only in a lab with IPv6: see `testbed.ipv6`."""

    name: str
    role: Role
    ifaces: tuple[IfaceSpec, ...]
    rack: str | None = None
    asn: int | None = None  # routers only
    loopback: IPv4Interface | None = None  # routers' BGP id; the outside host's address
    gateway: IPv4Address | None = None  # nodes only: their leaf
    bridge_address: IPv4Interface | None = None  # leaves only
    vrf: str | None = None  # leaves only: where all their ports are, and their routing
    loopback6: IPv6Interface | None = None
    gateway6: IPv6Address | None = None
    bridge_address6: IPv6Interface | None = None

    def iface(self, name: str) -> IfaceSpec:
        """Return the interface of that name; KeyError where there is none."""
        for iface in self.ifaces:
            if iface.name == name:
                return iface
        raise KeyError(f"{self.name} has no interface {name}")

    @property
    def routes(self) -> bool:
        """Whether this machine runs FRR."""
        return self.asn is not None

    @property
    def underlay(self) -> IfaceSpec:
        """A node's interface to its leaf."""
        return self.iface(UNDERLAY)

    @property
    def ip(self) -> IPv4Address:
        """The address this machine is reached at: a node's on the underlay, a router's loopback."""
        address = self.iface(UNDERLAY).address if self.role is Role.NODE else self.loopback
        assert address is not None  # the builder gives every machine one
        return address.ip

    @property
    def ip6(self) -> IPv6Address | None:
        """The IPv6 address this machine is reached at; None in a lab without IPv6."""
        address = self.iface(UNDERLAY).address6 if self.role is Role.NODE else self.loopback6
        return address.ip if address is not None else None


@dataclass(frozen=True, slots=True)
class LinkEnd:
    """An interface by machine and name; prints as it is written on the command line."""

    node: str
    iface: str

    def __str__(self) -> str:
        return f"{self.node}:{self.iface}"


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """A cable between two interfaces."""

    a: LinkEnd
    b: LinkEnd
    mtu: int
    fault: LinkFault | None = None  # what its topology declares

    @property
    def name(self) -> str:
        """The link by its machines, as topologies name it: `leaf1-spine1`."""
        return f"{self.a.node}-{self.b.node}"

    @property
    def names(self) -> tuple[str, str]:
        """What it may be called: its machines in either order."""
        return self.name, f"{self.b.node}-{self.a.node}"

    def senders(self, fault: LinkFault) -> tuple[LinkEnd, ...]:
        """The ends whose packets a fault meets: a kernel does it to what an interface sends."""
        return tuple(near for near, far in ((self.a, self.b), (self.b, self.a)) if fault.towards in ("", far.node))


@dataclass(frozen=True, slots=True)
class Rack:
    """A leaf with the nodes behind it; input of `fabric`."""

    leaf: str
    subnet: IPv4Network
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LabSpec:
    """A whole lab: the machines, the cables, and which node is the control plane (and runs etcd)."""

    id: str
    topology: str
    mtu: int
    nodes: tuple[NodeSpec, ...]
    links: tuple[LinkSpec, ...]
    control_plane: str
    _index: dict[str, NodeSpec] = field(init=False, repr=False, compare=False)
    _faulty: tuple[LinkSpec, ...] = field(init=False, repr=False, compare=False)  # a big fabric has many links

    def __post_init__(self) -> None:
        object.__setattr__(self, "_faulty", tuple(link for link in self.links if link.fault))
        object.__setattr__(self, "_index", {n.name: n for n in self.nodes})

    def node(self, name: str) -> NodeSpec:
        """Return the machine of that name; KeyError where there is none."""
        return self._index[name]

    def of_role(self, *roles: Role) -> tuple[NodeSpec, ...]:
        """The machines of these roles, in the lab's order."""
        return tuple(n for n in self.nodes if n.role in roles)

    def link(self, name: str) -> LinkSpec:
        """Return the link of that name, its machines in either order; KeyError where there is none."""
        for link in self.links:
            if name in link.names:
                return link
        raise KeyError(f"{self.topology} has no link {name}")

    def faults_of(self, node: str) -> tuple[tuple[str, LinkFault], ...]:
        """What its links' faults do to what a machine sends, by its interfaces."""
        return tuple(
            (end.iface, link.fault)
            for link in self._faulty
            if link.fault
            for end in link.senders(link.fault)
            if end.node == node
        )

    @property
    def kernel_features(self) -> tuple[str, ...]:
        """What the lab itself takes of a kernel, beside what every lab does."""
        netem = (NETEM,) if self._faulty else ()
        return (*netem, VRF) if any(node.vrf for node in self.nodes) else netem

    @property
    def cluster_nodes(self) -> tuple[NodeSpec, ...]:
        """The machines that run flannel."""
        return self.of_role(Role.NODE)

    @property
    def outside(self) -> NodeSpec:
        """The host beyond the fabric."""
        return self.of_role(Role.OUTSIDE)[0]

    def same_subnet(self, a: str, b: str) -> bool:
        """Whether two nodes sit behind the same leaf, so that they reach each other without a router."""
        return self.node(a).rack == self.node(b).rack


def lab_mac(lab_id: str, node: str, iface: str) -> str:
    """A locally administered unicast MAC, the same for the same lab, machine and interface."""
    digest = hashlib.sha256(f"{lab_id}/{node}/{iface}".encode()).digest()
    return ":".join(f"{b:02x}" for b in bytes([0x02]) + digest[:5])


class _Builder:
    """Collects interfaces and links while the fabric is laid out."""

    def __init__(self, lab_id: str, mtu: int, faults: Mapping[str, LinkFault]) -> None:
        self.lab_id = lab_id
        self.mtu = mtu
        self.faults = faults
        self.ifaces: dict[str, list[IfaceSpec]] = {}
        self.links: list[LinkSpec] = []

    def end(self, node: str, name: str, address: IPv4Interface | None = None, bridge: str | None = None) -> LinkEnd:
        mac = lab_mac(self.lab_id, node, name)
        self.ifaces.setdefault(node, []).append(IfaceSpec(name, mac, self.mtu, address, bridge))
        return LinkEnd(node, name)

    def link(self, a: LinkEnd, b: LinkEnd) -> None:
        link = LinkSpec(a, b, self.mtu)
        fault = next((self.faults[name] for name in link.names if name in self.faults), None)
        self.links.append(replace(link, fault=fault))


FIRST_HOST = 11
"""The first node of a rack has this host number, so that .1 to .10 stay the fabric's."""

SPINE_ASN, OUTSIDE_ASN, LEAF_ASN = 65000, 65099, 65101


def fabric(
    lab_id: str,
    topology: str,
    *,
    mtu: int,
    spines: Sequence[str],
    racks: Sequence[Rack],
    outside: IPv4Address,
    control_plane: str,
    faults: Mapping[str, LinkFault] | None = None,
    leaf_vrf: str | None = None,
) -> LabSpec:
    """Lay out a leaf-spine fabric: racks of nodes behind leaves, and a host beyond the spines.

    With no spine at all the outside host hangs on every leaf.  A leaf is `swpN` towards the spines and `nodeN`
    towards its nodes, which are ports of one bridge that holds the rack's gateway address (the subnet's first).
    `faults` are what links do to packets, by the links' names; `leaf_vrf` is the VRF of the leaves' ports and routing.
    """
    build = _Builder(lab_id, mtu, faults or {})
    for rack in racks:
        for position, name in enumerate(rack.nodes):
            host = IPv4Interface((rack.subnet[FIRST_HOST + position], rack.subnet.prefixlen))
            build.link(
                build.end(name, UNDERLAY, address=host),
                build.end(rack.leaf, f"node{position + 1}", bridge=BRIDGE),
            )
    for number, rack in enumerate(racks, 1):
        for position, spine in enumerate(spines, 1):
            build.link(build.end(rack.leaf, f"swp{position}"), build.end(spine, f"swp{number}"))
    upstream = list(spines) or [rack.leaf for rack in racks]
    for position, router in enumerate(upstream, 1):
        build.link(build.end("outside", f"eth{position - 1}"), build.end(router, "out1"))

    nodes: list[NodeSpec] = []
    for rack in racks:
        nodes += [
            NodeSpec(name, Role.NODE, tuple(build.ifaces[name]), rack=rack.leaf, gateway=rack.subnet[1])
            for name in rack.nodes
        ]
    for number, rack in enumerate(racks, 1):
        gateway = IPv4Interface((rack.subnet[1], rack.subnet.prefixlen))
        nodes.append(
            NodeSpec(
                rack.leaf,
                Role.LEAF,
                tuple(build.ifaces[rack.leaf]),
                rack=rack.leaf,
                asn=LEAF_ASN + number - 1,
                loopback=IPv4Interface(f"172.31.{1 + number // 256}.{number % 256}/32"),
                bridge_address=gateway,
                vrf=leaf_vrf,
            )
        )
    for number, spine in enumerate(spines, 1):
        loopback = IPv4Interface(f"172.31.0.{number}/32")
        nodes.append(NodeSpec(spine, Role.SPINE, tuple(build.ifaces[spine]), asn=SPINE_ASN, loopback=loopback))
    nodes.append(
        NodeSpec(
            "outside",
            Role.OUTSIDE,
            tuple(build.ifaces["outside"]),
            asn=OUTSIDE_ASN,
            loopback=IPv4Interface((outside, 32)),
        )
    )
    return LabSpec(lab_id, topology, mtu, tuple(nodes), tuple(build.links), control_plane)
