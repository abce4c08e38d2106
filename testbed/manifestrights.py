"""Whether flannel's service account may do what flanneld does with the Kubernetes API, and is the one that is bound."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from testbed.flanneldargs import parse_flags
from testbed.manifestimage import version_of
from testbed.manifestobjects import Daemon, Findings, Manifest, ManifestObject
from testbed.yamlmarks import Path

GET_NODES = (0, 24)
"""The first version of flannel whose manifest has the right to get nodes; one with a PodSecurityPolicy never had it."""


@dataclass(frozen=True, slots=True)
class Right:
    """A right of the core API group, and what flanneld cannot do without it."""

    verb: str
    resource: str
    purpose: str


NODES = (
    Right("list", "nodes", "flanneld learns of the other nodes by it"),
    Right("watch", "nodes", "flanneld learns of the other nodes by it"),
    Right("patch", "nodes/status", "flanneld annotates its node by it, which is how the others learn of it"),
)
GET_NODE = Right("get", "nodes", "flanneld finds its MAC of before a restart by it")
GET_POD = Right("get", "pods", "flanneld asks which node it is on by it, unless NODE_NAME says so")


def check_rights(manifest: Manifest, daemon: Daemon, findings: Findings) -> None:
    """Check account, bindings and roles of a DaemonSet that keeps its leases in the Kubernetes API."""
    flags = parse_flags(daemon.args, daemon.env)
    if daemon.unknown_args or not flags.boolean("kube-subnet-mgr", default=False) or flags.last("kubeconfig-file"):
        return
    bindings = manifest.of_kind("ClusterRoleBinding", "RoleBinding")
    if not bindings:
        hint = "give the file with them too: testbed lint kube-flannel-rbac.yml kube-flannel.yml"
        findings.warnings.append(daemon.object.fault((), "these files bind no role, so rights are not checked", hint))
        return
    bound = _bindings_of(daemon, bindings, findings)
    if not bound:
        return
    rules: list[Mapping[str, Any]] = []
    for binding in bound:
        role = _role_of(manifest, binding, findings)
        if role is None or role.at("aggregationRule") is not None:
            return  # what it allows stands elsewhere
        rules += [rule for _, rule in role.each("rules")]
    for right in _wanted(manifest, daemon):
        if not any(_allows(rule, right) for rule in rules):
            roles = [r for b in bound if (r := _role(manifest, b)) is not None]
            hint = f'add {{apiGroups: [""], resources: [{right.resource}], verbs: [{right.verb}]}}'
            what = f"{roles[0].name} lacks the right to {right.verb} {right.resource}: {right.purpose}"
            findings.faults.append(roles[0].fault(_nearest_rule(roles[0], right), what, hint))


def _wanted(manifest: Manifest, daemon: Daemon) -> Iterator[Right]:
    version = version_of(str(daemon.at("image")))
    if (version is None or version >= GET_NODES) and not manifest.of_kind("PodSecurityPolicy"):
        yield GET_NODE
    yield from NODES
    variables = {str(item.get("name")) for _, item in daemon.object.each(*daemon.container, "env")}
    if "NODE_NAME" not in variables:
        yield GET_POD


def _account(daemon: Daemon) -> tuple[str, str, Path]:
    """The account's name, its namespace, and where the name stands."""
    pod = daemon.object.at(*daemon.pod) or {}
    key = "serviceAccountName" if "serviceAccountName" in pod else "serviceAccount"
    return str(pod.get(key) or "default"), str(daemon.object.namespace or "default"), (*daemon.pod, key)


def _bindings_of(daemon: Daemon, bindings: list[ManifestObject], findings: Findings) -> list[ManifestObject]:
    """The bindings of the DaemonSet's account; where there is none, the reason is a fault."""
    name, namespace, place = _account(daemon)
    bound: list[ManifestObject] = []
    near: list[tuple[ManifestObject, Path, Mapping[str, Any]]] = []
    for binding in bindings:
        for path, subject in binding.each("subjects"):
            group = str(subject.get("name"))
            if subject.get("kind") == "Group" and group.startswith("system:serviceaccounts"):
                return []  # whole groups have rights of their own
            if subject.get("kind") != "ServiceAccount" or subject.get("name") != name:
                continue
            if subject.get("namespace", binding.namespace or "") == namespace:
                bound.append(binding)
            else:
                near.append((binding, path, subject))
    for binding, path, subject in near if not bound else ():
        where = f"of namespace {subject['namespace']}" if subject.get("namespace") else "without a namespace"
        what = f"ServiceAccount {name} {where} is bound, but {daemon.object.name} runs as the one of {namespace}"
        findings.faults.append(binding.fault((*path, "namespace"), what, f"namespace: {namespace}"))
    if not bound and not near:
        names = [str(s.get("name")) for b in bindings for _, s in b.each("subjects")]
        close = get_close_matches(name, names, 1)
        hint = f"did you mean {close[0]}?" if close else f"bind ServiceAccount {name} of namespace {namespace}"
        findings.faults.append(daemon.object.fault(place, f"no role is bound to ServiceAccount {name}", hint))
    for binding in [b for b in bound if b.kind == "RoleBinding"]:
        if len(bound) == 1:
            hint = "nodes are in no namespace: make it a ClusterRoleBinding"
            findings.faults.append(binding.fault(("kind",), "a RoleBinding gives no right to nodes", hint))
    return [b for b in bound if b.kind == "ClusterRoleBinding"]


def _role(manifest: Manifest, binding: ManifestObject) -> ManifestObject | None:
    wanted = binding.at("roleRef", "name")
    return next((r for r in manifest.of_kind("ClusterRole") if r.called == wanted), None)


def _role_of(manifest: Manifest, binding: ManifestObject, findings: Findings) -> ManifestObject | None:
    role = _role(manifest, binding)
    if role is None:
        name = str(binding.at("roleRef", "name"))
        close = get_close_matches(name, [r.called for r in manifest.of_kind("ClusterRole")], 1)
        what = f"ClusterRole {name} is not in these files, so its rights are not checked"
        hint = f"did you mean {close[0]}?" if close else ""
        findings.warnings.append(binding.fault(("roleRef", "name"), what, hint))
    return role


def _allows(rule: Mapping[str, Any], right: Right) -> bool:
    def has(key: str, value: str) -> bool:
        given = rule.get(key)
        return isinstance(given, list) and (value in given or "*" in given)

    wanted = has("apiGroups", "") and has("verbs", right.verb) and not rule.get("resourceNames")
    return wanted and (has("resources", right.resource) or has("resources", f"*/{right.resource.partition('/')[2]}"))


def _nearest_rule(role: ManifestObject, right: Right) -> Path:
    """The rule about the resource, where only the verb is missing; else the rules."""
    for path, rule in role.each("rules"):
        if isinstance(rule.get("resources"), list) and right.resource in rule["resources"]:
            return (*path, "verbs")
    return ("rules",)


def check_accounts(manifest: Manifest, findings: Findings) -> None:
    """Check that the namespace that a manifest makes is the one that its service account and its pods are in."""
    made = {n.called: n for n in manifest.of_kind("Namespace")}
    kinds = ("ServiceAccount", "DaemonSet", "ConfigMap", "Deployment", "Service")
    used = {str(o.namespace) for o in manifest.of_kind(*kinds) if o.namespace}
    if not made or not used or used & made.keys():
        return
    wanted = next(iter(made))
    hint = f"namespace: {wanted}, here and in every object; or leave Namespace {wanted} away"
    places = [
        (binding, (*path, "namespace"), subject.get("namespace"))
        for binding in manifest.of_kind("ClusterRoleBinding")
        for path, subject in binding.each("subjects")
        if subject.get("kind") == "ServiceAccount" and subject.get("namespace") not in made
    ]
    for binding, place, namespace in places:
        what = f"the service account is bound in namespace {namespace}, but the namespace made here is {wanted}"
        findings.faults.append(binding.fault(place, what, hint))
    if not places:
        first = made[wanted]
        what = f"nothing is in namespace {wanted}: every object is in {', '.join(sorted(used))}"
        findings.faults.append(first.fault(("metadata", "name"), what, hint))
