"""What a user needs to run rendered files by hand: each machine's addresses, flannel's configuration, a README."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network

from testbed.flannelspec import FlannelSpec
from testbed.labs.plan import node_batch
from testbed.model import UNDERLAY, LabSpec, NodeSpec
from testbed.nodes.etcd import PORT, PREFIX
from testbed.render import Images, cluster_name, kind_nodes
from testbed.templates import render

README = "README.md"
ADDRESSES, FABRIC_ADDRESSES = "addresses", "addresses-eth1"
CONFIGURE, NET_CONF = "flannel/configure.py", "flannel/net-conf.json"


def fabric_networks(lab: LabSpec, node: NodeSpec) -> list[IPv4Network | IPv6Network]:
    """Every network of the lab beyond a node's leaf."""
    routers = [router for router in lab.nodes if router.routes]
    known = [(router.loopback, router.bridge_address) for router in routers]
    known6 = [(router.loopback6, router.bridge_address6) for router in routers]
    networks = {pair.network for pairs in (*known, *known6) for pair in pairs if pair}
    own = {iface.network for iface in (node.underlay.address, node.underlay.address6) if iface}
    return sorted(networks - own, key=lambda network: (network.version, network.network_address.packed))


def node_addresses(lab: LabSpec, node: NodeSpec, *, underlay: str = UNDERLAY) -> str:
    """The `ip -batch` that gives a machine its addresses and routes.

    A node whose link to its leaf is not eth0 has an eth0, and a default route, of somebody else's: there the fabric's
    networks are routed one by one.
    """
    batch = node_batch(lab, node)
    if node.gateway is None or underlay == UNDERLAY:
        return batch
    lines = [re.sub(rf"\b{UNDERLAY}\b", underlay, line) for line in batch.splitlines() if " default " not in line]
    gateways = {4: node.gateway, 6: node.gateway6}
    networks = fabric_networks(lab, node)
    lines += [f"route replace {network} via {gateways[network.version]} dev {underlay}" for network in networks]
    return "\n".join(lines) + "\n"


def flannel_files(flannel: FlannelSpec) -> dict[str, str]:
    """What puts flannel's configuration into the lab's etcd."""
    return {
        NET_CONF: json.dumps(flannel.net_conf, indent=2) + "\n",
        CONFIGURE: render("topologies", "configure.py.j2", key=f"{PREFIX}/config", port=PORT),
    }


def render_readme(lab: LabSpec, flannel: FlannelSpec, images: Images, targets: Sequence[str], bundled: str) -> str:
    """The commands that run what was rendered; `bundled` is the folder of the flannel that comes with this."""
    store = f"http://{lab.node(lab.control_plane).ip}:{PORT}"
    arguments = [f"--etcd-endpoints={store}", f"--etcd-prefix={PREFIX}", *flannel.args]
    members = [node.name for node in lab.cluster_nodes]
    name = cluster_name(lab)
    return render(
        "topologies",
        "README.md.j2",
        name=name,
        targets=targets,
        images=images,
        machines=" ".join(node.name for node in lab.nodes),
        routers=" ".join(node.name for node in lab.nodes if node.routes),
        members=" ".join(members),
        outer=kind_nodes(lab),
        master=lab.control_plane,
        first=members[0],
        last=members[-1],
        target=lab.node(members[-1]).ip,
        pulled=None if images.frr == images.node else images.frr,
        store=store,
        etcd_port=PORT,
        environment="".join(f" -e {shlex.quote(f'{key}={value}')}" for key, value in flannel.env.items()),
        arguments=shlex.join(arguments),
        subnet_file=shlex.quote(flannel.subnet_file),
        bundled=shlex.quote(bundled),
        backend=flannel.backend.run,
        topology=lab.topology,
    )
