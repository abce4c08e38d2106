"""Whether a manifest fits its cluster: the pods' network, the keys of net-conf.json, the API versions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any

from testbed import netconf
from testbed.errors import Fault
from testbed.manifestobjects import Findings, Manifest, ManifestObject
from testbed.yamlmarks import parse

Network = IPv4Network | IPv6Network

GONE = {
    ("DaemonSet", "extensions/v1beta1"): "1.16",
    ("DaemonSet", "apps/v1beta2"): "1.16",
    ("PodSecurityPolicy", "extensions/v1beta1"): "1.16",
    ("PodSecurityPolicy", "policy/v1beta1"): "1.25",
    ("ClusterRole", "rbac.authorization.k8s.io/v1beta1"): "1.22",
    ("ClusterRoleBinding", "rbac.authorization.k8s.io/v1beta1"): "1.22",
    ("ClusterRole", "rbac.authorization.k8s.io/v1alpha1"): "1.22",
    ("ClusterRoleBinding", "rbac.authorization.k8s.io/v1alpha1"): "1.22",
}
"""API versions that flannel's manifests had, and since which Kubernetes they are gone."""


def read_pod_cidrs(text: str, where: str) -> tuple[list[Network], list[Fault]]:
    """The networks of a text with one, or several after commas; and what is wrong with it."""
    found: list[Network] = []
    faults: list[Fault] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            found.append(ip_network(part, strict=False))
        except ValueError:
            faults.append(Fault(where, 0, "", f"{part!r} is no network", "--pod-cidr 10.244.0.0/16"))
    return found, faults


def pod_cidrs(manifest: Manifest) -> Iterator[tuple[Network, str]]:
    """The pods' networks that the files say the cluster has, each with where it is said."""
    for found in manifest.objects:
        values: list[tuple[Any, tuple[str | int, ...]]] = []
        if found.kind in ("ClusterConfiguration", "Cluster"):
            values.append((found.at("networking", "podSubnet"), ("networking", "podSubnet")))
        elif found.kind == "KubeProxyConfiguration":
            values.append((found.at("clusterCIDR"), ("clusterCIDR",)))
        elif found.kind == "ConfigMap" and isinstance(found.at("data", "ClusterConfiguration"), str):
            documents, _ = parse(found.at("data", "ClusterConfiguration"), found.document.file)
            inner = [ManifestObject(d, (), d.value) for d in documents if isinstance(d.value, dict)]
            values += [(i.at("networking", "podSubnet"), ("data", "ClusterConfiguration")) for i in inner]
        elif found.kind == "Node":
            values.append((found.at("spec", "podCIDR"), ("spec", "podCIDR")))
        for value, path in values:
            if isinstance(value, str):
                line = found.document.line((*found.path, *path))
                for network in read_pod_cidrs(value, found.document.file)[0]:
                    yield network, f"{found.name} in {found.document.file}:{line}"


def check_network(manifest: Manifest, given: Sequence[tuple[Network, str]], findings: Findings) -> None:
    """Check that Network holds the pods' networks, of the command line (`given`) and of the files."""
    source = manifest.net_conf
    if source is None:
        return
    for network, where in [*given, *pod_cidrs(manifest)]:
        key = "Network" if network.version == 4 else "IPv6Network"
        try:
            own = ip_network(str(manifest.conf[key]), strict=False)
        except (KeyError, ValueError):
            continue  # a fault of its own, or a family that flannel does not carry here
        if type(own) is not type(network):
            continue
        if not network.subnet_of(own):  # type: ignore[arg-type] # of one family, as just seen
            what = f"{own} does not hold the pods' network {network} of {where}: flanneld refuses such a podCIDR"
            findings.faults.append(source.fault(key, what, f'"{key}": "{network}"'))


def check_keys(manifest: Manifest, findings: Findings) -> None:
    """Check that flannel knows every key of net-conf.json: it ignores the others without a word."""
    if manifest.net_conf is not None:
        for problem in netconf.unknown_keys(manifest.conf):
            fault = manifest.net_conf.fault(problem.key, problem.what, problem.hint)
            (findings.warnings if problem.lab_only else findings.faults).append(fault)


def check_versions(manifest: Manifest, findings: Findings) -> None:
    """Name the objects that no recent Kubernetes takes."""
    for found in manifest.objects:
        gone = GONE.get((found.kind, str(found.at("apiVersion"))))
        if gone:
            what = f"{found.kind} of {found.at('apiVersion')} is gone since Kubernetes {gone}"
            findings.warnings.append(found.fault(("apiVersion",), what))
