"""Writes a lab for other tools: FRR configurations, containerlab, kind, Kubernetes manifests.  Pure.

What was rendered is parsed back and compared with the model before anyone sees it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network
from typing import Any

from testbed import rendered
from testbed.errors import InputError
from testbed.flanneldargs import parse_flags
from testbed.flannelfits import check_fits
from testbed.flannelspec import NFTABLES, FlannelSpec
from testbed.images.names import named_images
from testbed.model import BRIDGE, UNDERLAY, LabSpec, LinkEnd, NodeSpec, Role
from testbed.templates import render

MAX_PATHS = 64
"""Equal-cost paths that a router keeps; what the largest fabric has spines."""

CLAB, CLAB_KIND, KIND = "lab.clab.yml", "kind.clab.yml", "kind.yml"
FLANNEL, WORKLOADS = "manifests/kube-flannel.yml", "manifests/workloads.yml"

NAMESPACE = "kube-flannel"
FABRIC_IN_KIND = "eth1"
"""A kind node's interface to the fabric: its eth0 is Docker's, which carries the API and image pulls."""

MAX_KIND_NAME = 50

SERVICE_SUBNETS = ("10.96.0.0/16", "172.30.0.0/16", "192.168.0.0/16")
SERVICE_SUBNET6 = "fd00:10:96::/112"


def _named(key: str) -> Any:
    return field(default_factory=lambda: named_images()[key].reference())


@dataclass(frozen=True, slots=True)
class Images:
    """Which container images the files name; by default those of `testbed/images/images.yml`."""

    frr: str = _named("frr")
    node: str = _named("node")
    kind: str = _named("kind")
    flannel: str = _named("flannel")
    cni_plugin: str = _named("cni_plugin")
    workload: str = _named("workload")
    binds: tuple[str, ...] = ()
    """What a machine of the first two sees of the host, as containerlab writes it."""
    pulled_routers: bool = False
    """Whether leaves and spines are of `frr` as a registry has it, which is given nothing but its configuration."""


def render_frr(spec: NodeSpec, lab: LabSpec) -> dict[str, str]:
    """FRR's files of one router, by name in /etc/frr.

    `frr.conf` serves both ways of starting FRR: read by `vtysh -b`, and given to zebra and bgpd with `-f`.
    """
    if not spec.routes or spec.loopback is None:
        raise ValueError(f"{spec.name} does not route")
    # A session that both ends open at once is torn down and tried again seconds later, so one end waits: the spines,
    # and whoever the outside host hangs on.
    ports = [
        {"name": iface.name, "passive": spec.role is Role.SPINE or iface.name.startswith("out")}
        for iface in spec.ifaces
        if iface.bridge is None and iface.address is None
    ]
    networks = [spec.loopback.network]
    if spec.bridge_address is not None:
        networks.append(spec.bridge_address.network)
    networks6 = [address.network for address in (spec.loopback6, spec.bridge_address6) if address is not None]
    config = render(
        "topologies",
        "frr.conf.j2",
        router=spec,
        lab=lab,
        ports=ports,
        networks=networks,
        networks6=networks6,
        bridge=BRIDGE,
        paths=MAX_PATHS,
    )
    return {
        "daemons": render("topologies", "daemons.j2"),
        "frr.conf": config,
        "vtysh.conf": render("topologies", "vtysh.conf.j2"),
    }


def cluster_name(lab: LabSpec) -> str:
    """The lab's name for containerlab and kind: letters and digits, as containers are called by it."""
    name = re.sub(r"[^a-z0-9]", "", lab.id)[: MAX_KIND_NAME - len("-control-plane") - 4]
    # Two ids that differ in what is left out here must not meet in one name.
    return name if name == lab.id else name + hashlib.sha256(lab.id.encode()).hexdigest()[:4]


def kind_nodes(lab: LabSpec) -> dict[str, str]:
    """What kind calls each of the lab's nodes, in kind's order: the control plane first."""
    name = cluster_name(lab)
    workers = [node.name for node in lab.cluster_nodes if node.name != lab.control_plane]
    called = {lab.control_plane: f"{name}-control-plane"}
    for number, worker in enumerate(workers, 1):
        called[worker] = f"{name}-worker{number if number > 1 else ''}"
    return called


def render_clab(lab: LabSpec, images: Images, *, kind: bool = False) -> str:
    """A containerlab topology: all machines as containers, or (`kind`) the fabric around a kind cluster's nodes."""
    outer = kind_nodes(lab) if kind else {}

    def called(node: str, iface: str) -> str:
        return FABRIC_IN_KIND if node in outer and iface == UNDERLAY else iface

    def end(at: LinkEnd) -> dict[str, str]:
        mac = lab.node(at.node).iface(at.iface).mac
        return {"node": outer.get(at.node, at.node), "iface": called(at.node, at.iface), "mac": mac}

    faults = {
        node.name: [
            f"tc qdisc replace dev {called(node.name, iface)} root {' '.join(fault.netem())}"
            for iface, fault in lab.faults_of(node.name)
        ]
        for node in lab.nodes
    }
    links = [{"mtu": link.mtu, "ends": [end(link.a), end(link.b)]} for link in lab.links]
    name = cluster_name(lab)
    return render(
        "topologies", "clab.yml.j2", lab=lab, name=name, images=images, outer=outer, links=links, faults=faults
    )


def render_kind(lab: LabSpec, flannel: FlannelSpec, images: Images, *, artefacts: str) -> str:
    """A kind cluster without a CNI, whose nodes register with their addresses in the fabric."""
    nodes = []
    for name in kind_nodes(lab):
        node, first = lab.node(name), name == lab.control_plane
        nodes.append(
            {
                "name": name,
                "role": "control-plane" if first else "worker",
                "kubeadm": "InitConfiguration" if first else "JoinConfiguration",
                "ip": node.ip,
                "rack": node.rack,
            }
        )
    dual = flannel.network6 is not None
    service = _service_subnet(lab, flannel)
    return render(
        "kind-configs",
        "kind.yml.j2",
        name=cluster_name(lab),
        ip_family="dual" if dual else "ipv4",
        pod_subnet=f"{flannel.network},{flannel.network6}" if dual else flannel.network,
        service_subnet=f"{service},{SERVICE_SUBNET6}" if dual else service,
        proxy_mode="nftables" if flannel.rules == NFTABLES else "iptables",
        nodes=nodes,
        images=images,
        artefacts=artefacts,
        tun=flannel.backend.type == "udp",
    )


def _service_subnet(lab: LabSpec, flannel: FlannelSpec) -> IPv4Network:
    """A subnet for services that meets no address of the lab and no pod."""
    taken = [flannel.network, *(leaf.bridge_address.network for leaf in lab.nodes if leaf.bridge_address)]
    for text in SERVICE_SUBNETS:
        subnet = IPv4Network(text)
        if not any(subnet.overlaps(net) for net in taken):
            return subnet
    raise InputError(
        "the racks and flannel's Network leave no subnet for Kubernetes services",
        where="net-conf.json",
        hint=f"leave one of {', '.join(SERVICE_SUBNETS)} free",
    )


def render_flannel(flannel: FlannelSpec, images: Images, *, interface: str) -> str:
    """flannel's manifest for Kubernetes: namespace, rights, configuration, DaemonSet."""
    own = [flag for flag in parse_flags(flannel.args).given if flag.name != "iface"]
    args = [word for flag in own for word in flag.words] + ["--kube-subnet-mgr", f"--iface={interface}"]
    # A tun device is opened by privileged containers only: newer runtimes no longer allow it to others.
    tun = flannel.backend.type == "udp"
    return render(
        "manifests",
        "kube-flannel.yml.j2",
        namespace=NAMESPACE,
        flannel=flannel,
        images=images,
        args=args,
        tun=tun,
        privileged=tun,
    )


def render_workloads(lab: LabSpec, flannel: FlannelSpec, images: Images) -> str:
    """The test workloads: a server on every node with a NodePort service, and a client on the first worker."""
    client = next((called for name, called in kind_nodes(lab).items() if name != lab.control_plane), None)
    return render(
        "manifests",
        "workloads.yml.j2",
        images=images,
        client_node=client or kind_nodes(lab)[lab.control_plane],
        dual=flannel.network6 is not None,
    )


def render_lab(lab: LabSpec, images: Images) -> dict[str, str]:
    """The files that containerlab deploys a lab from, by their path in one folder.

    Raises LabError where one does not say what the model says.
    """
    files = {CLAB: render_clab(lab, images), **_frr_files(lab)}
    rendered.check_clab(files[CLAB], lab, {}, UNDERLAY)
    return files


def _frr_files(lab: LabSpec) -> dict[str, str]:
    files = {}
    for router in (node for node in lab.nodes if node.routes):
        for name, text in render_frr(router, lab).items():
            files[f"frr/{router.name}.conf" if name == "frr.conf" else f"frr/{name}"] = text
    return files


def render_all(
    lab: LabSpec, flannel: FlannelSpec, *, images: Images | None = None, artefacts: str = "artefacts"
) -> Mapping[str, str]:
    """Every file that `testbed render` writes, by its path in the output folder.

    `artefacts` is the folder with the CNI plugins, relative to where kind is run.  Raises InputError where flannel
    does not fit the lab, LabError where a file does not say what the model says.
    """
    check_fits(flannel, lab)
    images = images or Images()
    files: dict[str, str] = {
        CLAB: render_clab(lab, images),
        CLAB_KIND: render_clab(lab, images, kind=True),
        KIND: render_kind(lab, flannel, images, artefacts=artefacts),
        FLANNEL: render_flannel(flannel, images, interface=FABRIC_IN_KIND),
        WORKLOADS: render_workloads(lab, flannel, images),
    }
    files |= _frr_files(lab)
    called = kind_nodes(lab)
    rendered.check_clab(files[CLAB], lab, {}, UNDERLAY)
    rendered.check_clab(files[CLAB_KIND], lab, called, FABRIC_IN_KIND)
    rendered.check_kind(files[KIND], lab, flannel, list(called))
    rendered.check_flannel(files[FLANNEL], flannel, NAMESPACE)
    rendered.check_yaml(files[WORKLOADS])
    return files
