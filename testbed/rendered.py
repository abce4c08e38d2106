"""Parses rendered files back and compares them with the model: a template cannot say something else unnoticed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from testbed.errors import LabError
from testbed.flannelspec import FlannelSpec
from testbed.manifest import parse_manifest
from testbed.model import UNDERLAY, LabSpec, LinkEnd

MAX_INTERFACE = 15
"""Longest name of a device that the kernel takes; containerlab leaves a longer one under a random name."""

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _differs(what: str, wanted: object, got: object) -> LabError:
    return LabError(f"the rendered {what} does not say what the lab's model says", where=f"{wanted!r} became {got!r}")


def _same(what: str, wanted: object, got: object) -> None:
    if wanted != got:
        raise _differs(what, wanted, got)


def check_yaml(text: str) -> list[Any]:
    """Return the documents of a rendered file. Raises LabError where it is no YAML."""
    try:
        return [document for document in yaml.load_all(text, _Loader) if document is not None]
    except yaml.YAMLError as error:
        raise LabError(f"a rendered file is not YAML: {error}") from None


def check_clab(text: str, lab: LabSpec, outer: Mapping[str, str], underlay: str) -> None:
    """Compare a containerlab topology with the lab.

    `outer` is what another tool calls the lab's nodes, and `underlay` what their eth0 is called there.
    """
    topology = check_yaml(text)[0]["topology"]
    nodes: Mapping[str, Mapping[str, Any]] = topology["nodes"]
    _same("nodes", {outer.get(node.name, node.name) for node in lab.nodes}, set(nodes))
    _same("network mode", "none", topology["defaults"]["network-mode"])
    for name, node in nodes.items():
        group = topology["groups"].get(node.get("group"), {})
        if node.get("kind") != "ext-container":
            _same(f"restart policy of {name}", "no", group.get("restart-policy"))
        _same(f"network mode of {name}", None, node.get("network-mode", group.get("network-mode")))

    commands = {name: node["exec"] for name, node in nodes.items() if "exec" in node}
    _same("faults of links", _fault_commands(lab, outer, underlay), commands)

    def end(at: LinkEnd) -> tuple[str, str, str]:
        iface = underlay if at.node in outer and at.iface == UNDERLAY else at.iface
        return outer.get(at.node, at.node), iface, lab.node(at.node).iface(at.iface).mac

    wanted = [(link.mtu, end(link.a), end(link.b)) for link in lab.links]
    got = [
        (link["mtu"], *((e["node"], e["interface"], e["mac"]) for e in link["endpoints"])) for link in topology["links"]
    ]
    _same("links", wanted, got)
    long = [iface for link in wanted for _, iface, _ in (link[1], link[2]) if len(iface) > MAX_INTERFACE]
    _same("names of interfaces", [], long)


def _fault_commands(lab: LabSpec, outer: Mapping[str, str], underlay: str) -> dict[str, list[str]]:
    wanted: dict[str, list[str]] = {}
    for node in lab.nodes:
        for iface, fault in lab.faults_of(node.name):
            device = underlay if node.name in outer and iface == UNDERLAY else iface
            words = ["tc", "qdisc", "replace", "dev", device, "root", *fault.netem()]
            wanted.setdefault(outer.get(node.name, node.name), []).append(" ".join(words))
    return wanted


def check_kind(text: str, lab: LabSpec, flannel: FlannelSpec, order: Sequence[str]) -> None:
    """Compare a kind configuration with the lab and flannel; `order` are the lab's nodes in kind's order."""
    config = check_yaml(text)[0]
    networks = [str(flannel.network), *([str(flannel.network6)] if flannel.network6 else [])]
    _same("podSubnet", networks, config["networking"]["podSubnet"].split(","))
    _same("disableDefaultCNI", True, config["networking"]["disableDefaultCNI"])
    _same("number of nodes", len(order), len(config["nodes"]))
    for position, (name, node) in enumerate(zip(order, config["nodes"], strict=True)):
        _same(f"role of {name}", "worker" if position else "control-plane", node["role"])
        patches = [check_yaml(patch)[0] for patch in node["kubeadmConfigPatches"]]
        _same(f"kubeadm object of {name}", ["JoinConfiguration" if position else "InitConfiguration"],
              [patch["kind"] for patch in patches])  # fmt: skip
        arguments = patches[0]["nodeRegistration"]["kubeletExtraArgs"]
        _same(f"node-ip of {name}", str(lab.node(name).ip), arguments["node-ip"])


def check_flannel(text: str, flannel: FlannelSpec, namespace: str) -> None:
    """Compare a flannel manifest with what it was rendered from, by the reader of users' manifests too."""
    documents = check_yaml(text)
    kinds = ["Namespace", "ClusterRole", "ClusterRoleBinding", "ServiceAccount", "ConfigMap", "DaemonSet"]
    _same("objects", kinds, [document["kind"] for document in documents])
    spaces = {d["metadata"]["namespace"] for d in documents if "namespace" in d["metadata"]}
    spaces |= {subject["namespace"] for subject in documents[2]["subjects"]}
    _same("namespaces", {namespace}, spaces | {documents[0]["metadata"]["name"]})
    data = documents[4]["data"]
    _same("net-conf.json", flannel.net_conf, json.loads(data["net-conf.json"]))
    _same("cni-conf.json", flannel.cni_conf, json.loads(data["cni-conf.json"]))
    again = parse_manifest(text, "kube-flannel.yml", flannel.backend.run, rules=flannel.rules)
    _same("net-conf.json as flannel reads it", flannel.net_conf, again.net_conf)
    _same("environment of flanneld", flannel.env, again.env)
    wanted = [word for word in flannel.args if not word.startswith(("--iface=", "-iface="))]
    _same("arguments of flanneld", wanted, list(again.args))
