"""From a lab's model to the plan that the box carries out, and back: what is wired is compared with the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib import resources
from typing import Any

from testbed.model import BRIDGE, UNDERLAY, IfaceSpec, LabSpec, NodeSpec, Role, lab_mac
from testbed.render import render_frr

ROOT_BECOMES = 70707
"""The id that labs of root run as: in no distribution's range, so it owns nothing of the host."""

#: In a namespace of one id every system user of a daemon has to be that id.
PASSWD = "".join(f"{name}:x:0:0::/root:/bin/sh\n" for name in ("root", "frr", "tcpdump", "etcd"))
GROUP = "".join(f"{name}:x:0:\n" for name in ("root", "frr", "frrvty", "tcpdump", "etcd"))

#: No router advertisements are believed and no address waits for duplicates, or links take seconds to be usable.
COMMON_SYSCTLS = {
    "net/ipv6/conf/default/accept_dad": "0",
    "net/ipv6/conf/default/dad_transmits": "0",
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
}
ROUTER_SYSCTLS = COMMON_SYSCTLS | {
    "net/ipv4/ip_forward": "1",
    "net/ipv6/conf/all/forwarding": "1",
    "net/ipv4/fib_multipath_hash_policy": "1",
    "?net/bridge/bridge-nf-call-iptables": "0",
    "?net/bridge/bridge-nf-call-ip6tables": "0",
}
NODE_SYSCTLS = COMMON_SYSCTLS | {
    "?net/bridge/bridge-nf-call-iptables": "1",
    "?net/bridge/bridge-nf-call-ip6tables": "1",
}

VRF_TABLE = 1001
"""The routing table of a leaf's VRF."""

VRF_EXEC = "/opt/testbed/vrfexec.py"
"""Where a leaf with a VRF has the program that puts a command's sockets in it."""

#: zebra first: bgpd asks it for everything, and asks again only after seconds.
FRR = (
    {"name": "zebra", "ready": "/run/frr/zserv.api"},
    {"name": "bgpd", "ready": "/run/frr/bgpd.vty"},
)


def hosts_file(lab: LabSpec) -> str:
    """/etc/hosts of every machine: all of them by name."""
    lines = ["127.0.0.1 localhost", *(f"{node.ip} {node.name}" for node in lab.nodes)]
    lines += [f"{node.ip6} {node.name}" for node in lab.nodes if node.ip6]
    return "\n".join(lines) + "\n"


def link_batch(lab: LabSpec) -> str:
    """The `ip -batch` that lays every cable; `@NAME@` stands for a node's pid."""

    def end(node: str, iface: str) -> str:
        spec = lab.node(node).iface(iface)
        return f"name {spec.name} mtu {spec.mtu} address {spec.mac} netns @{node}@"

    return "".join(
        f"link add {end(link.a.node, link.a.iface)} type veth peer {end(link.b.node, link.b.iface)}\n"
        for link in lab.links
    )


def node_batch(lab: LabSpec, node: NodeSpec) -> str:
    """The `ip -batch` that a machine runs in its own namespace."""
    lines = ["link set lo up"]
    if node.vrf:
        lines.append(f"link add {node.vrf} type vrf table {VRF_TABLE}")
        lines.append(f"link set {node.vrf} up")
    loopbacks = filter(None, (node.loopback, node.loopback6))
    lines += [f"addr replace {loopback} dev {node.vrf or 'lo'}" for loopback in loopbacks]
    if node.bridge_address:
        mac = lab_mac(lab.id, node.name, BRIDGE)
        lines.append(f"link add {BRIDGE} mtu {lab.mtu} address {mac} type bridge stp_state 0")
        if node.vrf:
            lines.append(f"link set {BRIDGE} master {node.vrf}")
        lines.append(f"addr replace {node.bridge_address} dev {BRIDGE}")
        if node.bridge_address6:
            lines.append(f"addr replace {node.bridge_address6} dev {BRIDGE} nodad")
        lines.append(f"link set {BRIDGE} up")
    for iface in node.ifaces:
        if master := iface.bridge or node.vrf:
            lines.append(f"link set {iface.name} master {master}")
        if iface.address:
            lines.append(f"addr replace {iface.address} brd + dev {iface.name}")
        if iface.address6:
            lines.append(f"addr replace {iface.address6} dev {iface.name} nodad")
        lines.append(f"link set {iface.name} up")
    if node.gateway:
        lines.append(f"route add default via {node.gateway} dev {UNDERLAY}")
    if node.gateway6:
        lines.append(f"route add default via {node.gateway6} dev {UNDERLAY}")
    return "\n".join(lines) + "\n"


def fault_batch(lab: LabSpec, node: NodeSpec) -> str:
    """The `tc -batch` of a machine: what its topology's faults do to what it sends."""
    return "".join(
        f"qdisc replace dev {iface} root {' '.join(fault.netem())}\n" for iface, fault in lab.faults_of(node.name)
    )


def node_plan(lab: LabSpec, node: NodeSpec) -> dict[str, Any]:
    """What the box makes of one machine."""
    files = {
        "/etc/hosts": hosts_file(lab),
        "/etc/hostname": node.name + "\n",
        "/etc/passwd": PASSWD,
        "/etc/group": GROUP,
    }
    if node.routes:
        files |= {f"/etc/frr/{name}": text for name, text in render_frr(node, lab).items()}
    if node.vrf:
        files[VRF_EXEC] = resources.files("testbed.labs").joinpath("vrfexec.py").read_text()
    return {
        "name": node.name,
        "files": files,
        "sysctls": ROUTER_SYSCTLS if node.routes else NODE_SYSCTLS,
        "batch": node_batch(lab, node),
        "faults": fault_batch(lab, node),
        "offloads": {iface.name: False for iface in node.ifaces},
        "daemons": list(FRR) if node.routes else [],
    }


def box_plan(lab: LabSpec, *, frr_folder: str, root_becomes: int | None) -> dict[str, Any]:
    """What the box makes of a lab; `root_becomes` is the id that real root gives itself up for."""
    return {
        "id": lab.id,
        "root_becomes": root_becomes,
        "frr_folder": frr_folder,
        "links": link_batch(lab),
        "nodes": [node_plan(lab, node) for node in lab.nodes],
    }


def wiring_faults(lab: LabSpec, facts: Mapping[str, Mapping[str, Any]], of: Collection[str] = ()) -> list[str]:
    """Compare what was wired, or only that `of` some machines, with the model; every difference is a line."""
    nodes = [node for node in lab.nodes if not of or node.name in of]
    return [fault for node in nodes for fault in _node_faults(node, facts[node.name])]


def _node_faults(node: NodeSpec, facts: Mapping[str, Any]) -> list[str]:
    links = {link["ifname"]: link for link in facts["addresses"]}
    faults = []
    for iface in node.ifaces:
        where = f"{node.name}:{iface.name}"
        link = links.get(iface.name)
        if link is None:
            faults.append(f"{where} is missing")
            continue
        faults += [f"{where}: {text}" for text in _iface_faults(node, iface, link)]
        switched_on = [name for name, on in facts["offloads"].get(iface.name, {}).items() if on]
        if switched_on:
            faults.append(f"{where}: offloads still on: {' '.join(switched_on)}")
    if node.role is Role.LEAF and node.bridge_address:
        bridge = links.get(BRIDGE)
        if bridge is not None and bridge.get("master") != node.vrf:
            faults.append(f"{node.name}:{BRIDGE}: belongs to {bridge.get('master')}, not {node.vrf}")
        for address in filter(None, (node.bridge_address, node.bridge_address6)):
            if bridge is None or str(address) not in _addresses(bridge):
                faults.append(f"{node.name}:{BRIDGE} lacks {address}")
    return faults


def _addresses(link: Mapping[str, Any]) -> list[str]:
    return [f"{a['local']}/{a['prefixlen']}" for a in link["addr_info"] if a["scope"] == "global"]


def _iface_faults(node: NodeSpec, iface: IfaceSpec, link: Mapping[str, Any]) -> list[str]:
    faults = []
    if link["mtu"] != iface.mtu:
        faults.append(f"MTU {link['mtu']}, not {iface.mtu}")
    if link["address"] != iface.mac:
        faults.append(f"MAC {link['address']}, not {iface.mac}")
    if "UP" not in link["flags"]:
        faults.append("is down")
    master = iface.bridge or node.vrf
    if link.get("master") != master:
        faults.append(f"belongs to {link.get('master')}, not {master}")
    wanted = [str(address) for address in (iface.address, iface.address6) if address]
    if _addresses(link) != wanted:
        faults.append(f"addresses {_addresses(link)}, not {wanted}")
    return faults
