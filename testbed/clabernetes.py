"""A lab as a Clabernetes `Topology`: containerlab's file, each machine a pod of a Kubernetes cluster.

For labs that outgrow one machine.  Clabernetes takes no files of a host and no restart policy, and a pod's eth0 is the
cluster's: so files come from ConfigMaps, each machine addresses itself from one of them, and nodes hang on the fabric
by their second interface, as in kind.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import yaml

from testbed.byhand import node_addresses
from testbed.errors import LabError
from testbed.labs.plan import NODE_SYSCTLS, ROUTER_SYSCTLS
from testbed.model import UNDERLAY, LabSpec, LinkEnd, NodeSpec
from testbed.render import FABRIC_IN_KIND, Images, cluster_name, render_frr
from testbed.rendered import check_yaml

FILE = "clabernetes.yml"
API = "c9s.run/v1alpha1"
"""Releases before it was named so have `OLD_API`, with the same keys."""

OLD_API = "clabernetes.containerlab.dev/v1alpha1"
BATCH = "/etc/testbed/addresses.batch"


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def _dump(*documents: Any) -> str:
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, explicit_start=True, width=120)


def _called(lab: LabSpec, node: str, iface: str) -> str:
    """A machine's interface as it is called in its pod: where it had an eth0, each has the next number."""
    number = iface.removeprefix("eth")
    has_eth0 = any(other.name == UNDERLAY for other in lab.node(node).ifaces)
    return f"eth{int(number) + 1}" if has_eth0 and iface != number and number.isdigit() else iface


def files_of(lab: LabSpec, node: NodeSpec) -> dict[str, str]:
    """What a machine finds in its file system, by path."""
    if node.routes:
        node = replace(node, ifaces=tuple(replace(i, name=_called(lab, node.name, i.name)) for i in node.ifaces))
    files = {BATCH: node_addresses(lab, node, underlay=FABRIC_IN_KIND)}
    if node.routes:
        files |= {f"/etc/frr/{name}": text for name, text in render_frr(node, lab).items()}
    return files


def _commands(lab: LabSpec, node: NodeSpec) -> list[str]:
    settings = ROUTER_SYSCTLS if node.routes else NODE_SYSCTLS
    words = [f"{key.lstrip('?').replace('/', '.')}={value}" for key, value in settings.items()]
    disabled = [f"net.ipv6.conf.{which}.disable_ipv6=0" for which in ("all", "default")]
    faults = [
        f"tc qdisc replace dev {_called(lab, node.name, iface)} root {' '.join(fault.netem())}"
        for iface, fault in lab.faults_of(node.name)
    ]
    # What is there already, such as the pod's own default route, stops no line after it.
    return [f"sysctl -e -w {' '.join([*disabled, *words])}", f"ip -force -batch {BATCH}", *faults]


def _definition(lab: LabSpec, images: Images) -> dict[str, Any]:
    def end(at: LinkEnd) -> dict[str, str]:
        mac = lab.node(at.node).iface(at.iface).mac
        return {"node": at.node, "interface": _called(lab, at.node, at.iface), "mac": mac}

    nodes = {
        node.name: {"image": images.frr if node.routes else images.node, "exec": _commands(lab, node)}
        for node in lab.nodes
    }
    links = [{"type": "veth", "mtu": link.mtu, "endpoints": [end(link.a), end(link.b)]} for link in lab.links]
    topology = {"defaults": {"kind": "linux"}, "nodes": nodes, "links": links}
    return {"name": cluster_name(lab), "topology": topology}


def _config_map(name: str, files: dict[str, str]) -> dict[str, Any]:
    data = {path.rpartition("/")[2]: text for path, text in files.items()}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def render_clabernetes(lab: LabSpec, images: Images) -> str:
    """The resource, and the ConfigMaps before it: one for each machine, since one for all may grow too large."""
    name = cluster_name(lab)
    maps, mounts = [], {}
    for node in lab.nodes:
        files = files_of(lab, node)
        maps.append(_config_map(f"{name}-{node.name}", files))
        mounts[node.name] = [
            {"configMapName": f"{name}-{node.name}", "configMapPath": path.rpartition("/")[2], "filePath": path}
            for path in files
        ]
    resource = {
        "apiVersion": API,
        "kind": "Topology",
        "metadata": {"name": name},
        "spec": {
            "definition": {"containerlab": _dump(_definition(lab, images)).removeprefix("---\n")},
            "deployment": {"filesFromConfigMap": mounts},
            "expose": {"exposeType": "None"},
        },
    }
    return _dump(*maps, resource)


def check_clabernetes(text: str, lab: LabSpec) -> None:
    """Compare a rendered resource with the lab. Raises LabError where it says something else."""
    *maps, resource = check_yaml(text)
    [topology] = [document["topology"] for document in check_yaml(resource["spec"]["definition"]["containerlab"])]
    found = {
        "nodes": sorted(topology["nodes"]),
        "links": [
            (link["mtu"], *((end["node"], end["interface"], end["mac"]) for end in link["endpoints"]))
            for link in topology["links"]
        ],
        "files": {
            node: {mount["filePath"]: _content(maps, mount) for mount in mounts}
            for node, mounts in resource["spec"]["deployment"]["filesFromConfigMap"].items()
        },
    }
    wanted = {
        "nodes": sorted(node.name for node in lab.nodes),
        "links": [
            (
                link.mtu,
                *(
                    (e.node, _called(lab, e.node, e.iface), lab.node(e.node).iface(e.iface).mac)
                    for e in (link.a, link.b)
                ),
            )
            for link in lab.links
        ],
        "files": {node.name: files_of(lab, node) for node in lab.nodes},
    }
    for what, value in wanted.items():
        if found[what] != value:
            raise LabError(f"the rendered {FILE} does not say what the lab's model says", where=what)


def _content(maps: list[Any], mount: dict[str, str]) -> str | None:
    for entry in maps:
        if entry["metadata"]["name"] == mount["configMapName"]:
            content: str | None = entry["data"].get(mount["configMapPath"])
            return content
    return None
