"""Whether flannel's DaemonSet gives flanneld what it needs: network, devices, mounts, image and resources."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from testbed.flanneldargs import parse_flags
from testbed.manifestimage import ARCHITECTURE_LABELS, architecture_of, selected, version_of
from testbed.manifestobjects import Daemon, Findings, Manifest
from testbed.yamlmarks import Path

LEAST_MEMORY = 42_000_000
"""Bytes that flanneld of upstream has resident without any other node, its binary's pages counted."""

LEAST_CPU = 0.009
"""Processors that it keeps busy while nothing happens, its rules' upkeep counted."""

CPU_PER_PACKET = 18.7e-6
"""Seconds of a processor for each packet that its udp backend sends."""

OWN_PLUGIN = (0, 15)
"""The first version of flannel whose own manifest installs the CNI plugin, which the reference plugins had lost."""

NET_CONF_PATH = "/etc/kube-flannel/net-conf.json"
SUBNET_FILE = "/run/flannel/subnet.env"
CNI_CONF_DIR, CNI_BIN_DIR, TUN = "/etc/cni/net.d", "/opt/cni/bin", "/dev/net/tun"

_UNITS = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30}


def check_daemon(manifest: Manifest, daemon: Daemon, findings: Findings) -> None:
    """Check a DaemonSet that runs flanneld."""
    _check_pod(daemon, findings)
    _check_volumes(manifest, daemon, findings)
    _check_subnet_file(daemon, findings)
    _check_cni(daemon, findings)
    _check_security(manifest, daemon, findings)
    _check_images(daemon, findings)
    _check_resources(manifest, daemon, findings)


def _containers(daemon: Daemon) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    for key in ("initContainers", "containers"):
        yield from daemon.object.each(*daemon.pod, key)


def _check_pod(daemon: Daemon, findings: Findings) -> None:
    found, pod = daemon.object, daemon.pod
    if found.at(*pod, "hostNetwork") is not True:
        what = "flanneld runs in a network of its own pod's, and makes devices and routes there"
        findings.faults.append(found.fault((*pod, "hostNetwork"), what, "hostNetwork: true"))
    wanted = found.at("spec", "selector", "matchLabels")
    labels = found.at("spec", "template", "metadata", "labels")
    given = labels if isinstance(labels, dict) else {}
    for label, value in (wanted if isinstance(wanted, dict) else {}).items():
        if given.get(label) != value:
            what = f"selects {label}: {value}, but the pods have {given.get(label, 'no such label')}"
            findings.faults.append(found.fault(("spec", "selector", "matchLabels", label), what, "make them equal"))
    flags = parse_flags(daemon.args, daemon.env)
    if daemon.unknown_args or not flags.boolean("kube-subnet-mgr", default=False):
        return
    names = {str(item.get("name")) for _, item in found.each(*daemon.container, "env")}
    missing = sorted({"POD_NAME", "POD_NAMESPACE"} - names)
    if missing and "NODE_NAME" not in names and not daemon.at("envFrom"):
        what = f"{' and '.join(missing)} missing: flanneld finds out by them which node it is on"
        findings.faults.append(daemon.fault(("env",), what, "valueFrom: {fieldRef: {fieldPath: metadata.name}}"))


def _volumes(daemon: Daemon) -> dict[str, Mapping[str, Any]]:
    return {str(volume.get("name")): volume for _, volume in daemon.object.each(*daemon.pod, "volumes")}


def _inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _plain(path: Any) -> str:
    text = posixpath.normpath(str(path))
    return text.removeprefix("/var") if _inside(text, "/var/run") else text


def _host_path(daemon: Daemon, container: Path, path: str) -> tuple[str | None, Path]:
    """Where on the node a path in a container is, and the mount that puts it there; None where it is not there.

    "" is a volume that is no folder of the node's.
    """
    best: tuple[int, str | None, Path] = (-1, None, (*container, "volumeMounts"))
    volumes = _volumes(daemon)
    for place, mount in daemon.object.each(*container, "volumeMounts"):
        target = _plain(mount.get("mountPath"))
        if not _inside(path, target) or len(target) <= best[0]:
            continue
        volume = volumes.get(str(mount.get("name")), {})
        host = volume.get("hostPath")
        source = host.get("path") if isinstance(host, dict) else None
        rest = path[len(target) :].lstrip("/")
        below = posixpath.join(str(mount.get("subPath") or ""), rest)
        best = (len(target), _plain(posixpath.join(str(source), below)) if source else "", place)
    return best[1], best[2]


def _check_volumes(manifest: Manifest, daemon: Daemon, findings: Findings) -> None:
    volumes = _volumes(daemon)
    for container, _ in _containers(daemon):
        for place, mount in daemon.object.each(*container, "volumeMounts"):
            name = str(mount.get("name"))
            if name not in volumes:
                close = get_close_matches(name, volumes, 1)
                hint = f"did you mean {close[0]}?" if close else f"its volumes are {', '.join(volumes)}"
                findings.faults.append(daemon.object.fault(place, f"the pod has no volume {name}", hint))
    if manifest.config is not None:
        _check_config_mount(manifest.config.called, daemon, findings)


def _check_config_mount(config: str, daemon: Daemon, findings: Findings) -> None:
    """Whether flanneld finds its net-conf.json: the ConfigMap's name, and where it is mounted."""
    flags = parse_flags(daemon.args, daemon.env)
    if daemon.unknown_args or not flags.boolean("kube-subnet-mgr", default=False):
        return
    wanted = _plain(flags.last("net-config-path") or NET_CONF_PATH)
    volumes = {name: volume for name, volume in _volumes(daemon).items() if "projected" not in volume}
    mounted = [(n, v["configMap"]) for n, v in volumes.items() if isinstance(v.get("configMap"), dict)]
    path, place = _host_path(daemon, daemon.container, wanted)
    if path is None:
        hint = f"mountPath: {posixpath.dirname(wanted)}/"
        findings.faults.append(daemon.fault(place[len(daemon.container) :], f"nothing is mounted at {wanted}", hint))
        return
    used = str(daemon.object.at(*place, "name"))
    named = next((str(c.get("name")) for n, c in mounted if n == used), config)
    if named != config:
        at = next(p for p, v in daemon.object.each(*daemon.pod, "volumes") if str(v.get("name")) == used)
        what = f"mounts ConfigMap {named}, but net-conf.json is in {config}"
        findings.faults.append(daemon.object.fault((*at, "configMap", "name"), what, f"name: {config}"))


def _check_subnet_file(daemon: Daemon, findings: Findings) -> None:
    """Whether the node has the subnet.env that the CNI plugin reads there."""
    flags = parse_flags(daemon.args, daemon.env)
    wanted = _plain(flags.last("subnet-file") or SUBNET_FILE)
    found, place = _host_path(daemon, daemon.container, wanted)
    hint = f"mount hostPath {posixpath.dirname(SUBNET_FILE)} at {posixpath.dirname(wanted)}"
    if not found:
        what = f"{wanted} stays in the container, and the CNI plugin on the node does not find it"
        findings.faults.append(daemon.object.fault(place, what, hint))
    elif found != SUBNET_FILE:
        what = f"flanneld's {wanted} is {found} on the node, where the CNI plugin looks for {SUBNET_FILE}"
        findings.faults.append(daemon.object.fault(place, what, hint))


def _check_cni(daemon: Daemon, findings: Findings) -> None:
    """Whether the CNI configuration and plugin get to the node."""
    mounts: list[tuple[str, Path, Path]] = []
    for container, value in _containers(daemon):
        for place, mount in daemon.object.each(*container, "volumeMounts"):
            host, _ = _host_path(daemon, container, _plain(mount.get("mountPath")))
            if host:
                mounts.append((host, place, container))
        _check_copy(daemon, container, value, findings)
    hosts = [host for host, _, _ in mounts]
    where = (*daemon.pod, "volumes")
    if not any(posixpath.basename(host).startswith("net.") or _inside(CNI_CONF_DIR, host) for host in hosts):
        what = f"no container mounts the node's {CNI_CONF_DIR}, so its runtime gets no CNI configuration"
        findings.faults.append(daemon.object.fault(where, what, f"hostPath: {{path: {CNI_CONF_DIR}}}"))
    if not any(("cni" in host and _bin(host)) or _inside(CNI_BIN_DIR, host) for host in hosts):
        version = version_of(str(daemon.at("image")))
        what = "no container installs the flannel CNI plugin"
        hint = "the reference CNI plugins are without it since 1.0: add flannel's image of it as an init container"
        old = version < OWN_PLUGIN if version is not None else daemon.object.at("apiVersion") != "apps/v1"
        fault = daemon.object.fault((*daemon.pod, "initContainers"), what, hint)
        (findings.warnings if old else findings.faults).append(fault)


def _bin(path: str) -> bool:
    return posixpath.basename(path) == "bin" or posixpath.basename(posixpath.dirname(path)) == "bin"


def _check_copy(daemon: Daemon, container: Path, value: Mapping[str, Any], findings: Findings) -> None:
    """A container that copies one file has to copy it to the node, and to where the node looks for it."""
    given = [value.get(key) for key in ("command", "args")]
    words = [str(word) for part in given if isinstance(part, list) for word in part]
    if not words or posixpath.basename(words[0]) not in ("cp", "install-conf") or not words[-1].startswith("/"):
        return
    target = _plain(words[-1])
    expected = next((d for d in (CNI_CONF_DIR, CNI_BIN_DIR) if _inside(target, d)), None)
    host, place = _host_path(daemon, container, target)
    if not host:
        what = f"copies to {target}, which is no folder of the node's"
        hint = f"mount a hostPath at {posixpath.dirname(target)}"
        findings.faults.append(daemon.object.fault(place, what, hint))
    elif expected and not _inside(host, expected):
        near = host.startswith(posixpath.dirname(expected) + "/") or not re.search("cni", host)
        what = f"{target} is {host} on the node, where it is looked for in {expected} unless that is configured"
        fault = daemon.object.fault(place, what, f"hostPath: {{path: {expected}}}")
        (findings.faults if near and "/net." not in host else findings.warnings).append(fault)


def _check_security(manifest: Manifest, daemon: Daemon, findings: Findings) -> None:
    context = daemon.at("securityContext")
    context = context if isinstance(context, dict) else {}
    if context.get("privileged") is True:
        return
    added = daemon.at("securityContext", "capabilities", "add")
    names = {str(name).removeprefix("CAP_") for name in added} if isinstance(added, list) else set()
    if not names & {"NET_ADMIN", "ALL"}:
        what = "flanneld may change no device, route or rule: it is neither privileged nor has it NET_ADMIN"
        hint = "capabilities: {add: [NET_ADMIN, NET_RAW]}"
        findings.faults.append(daemon.fault(("securityContext",), what, hint))
    backend = manifest.conf.get("Backend")
    if isinstance(backend, dict) and backend.get("Type") == "udp":
        host, _ = _host_path(daemon, daemon.container, TUN)
        if host != TUN:
            what = f"the udp backend needs {TUN}, which this container has not"
            hint = f"mount hostPath {TUN} there, or privileged: true"
            findings.faults.append(daemon.fault(("volumeMounts",), what, hint))


def _check_images(daemon: Daemon, findings: Findings) -> None:
    pod = daemon.object.at(*daemon.pod)
    nodes = selected(pod, ARCHITECTURE_LABELS)
    for container, value in _containers(daemon):
        image = str(value.get("image"))
        architecture = architecture_of(image)
        place = (*container, "image")
        if not architecture or nodes == {architecture}:
            continue
        if nodes is None:
            what = f"{image} is for {architecture} alone, but nothing keeps it from nodes of another architecture"
            hint = f"nodeSelector: {{kubernetes.io/arch: {architecture}}}, or an image for all"
            fault = daemon.object.fault(place, what, hint)
            (findings.warnings if architecture == "amd64" else findings.faults).append(fault)
        else:
            what = f"{image} is for {architecture}, but its nodes are {' or '.join(sorted(nodes))}"
            findings.faults.append(daemon.object.fault(place, what, "make image and node selection agree"))


def quantity(value: Any) -> float | None:
    """A quantity as Kubernetes writes it, `100m` or `50Mi`; None where it is none."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)(m|k|M|G|T|Ki|Mi|Gi)?", str(value))
    return float(match.group(1)) * _UNITS[match.group(2) or ""] if match else None


def _check_resources(manifest: Manifest, daemon: Daemon, findings: Findings) -> None:
    for name in ("cpu", "memory"):
        values = {kind: daemon.at("resources", kind, name) for kind in ("requests", "limits")}
        found = {kind: quantity(value) for kind, value in values.items() if value is not None}
        for kind, amount in found.items():
            if amount is None:
                what = f"{values[kind]!r} is no quantity"
                findings.faults.append(daemon.fault(("resources", kind, name), what, "100m of a processor, 50Mi"))
        limit, request = found.get("limits"), found.get("requests")
        place: Path = ("resources", "limits", name)
        if limit is not None and request is not None and request > limit:
            what = f"{values['limits']}, which is less than the request of {values['requests']}"
            findings.faults.append(daemon.fault(place, what, "Kubernetes refuses that"))
        if limit is None:
            continue
        if name == "memory" and limit < LEAST_MEMORY:
            what = f"{values['limits']} is too little: flanneld has {LEAST_MEMORY // 10**6} MB resident at its start"
            findings.faults.append(daemon.fault(place, what, "50Mi, and more for more than 200 nodes"))
        if name == "cpu":
            _check_cpu(manifest, daemon, limit, values["limits"], findings)


def _check_cpu(manifest: Manifest, daemon: Daemon, limit: float, given: Any, findings: Findings) -> None:
    place: Path = ("resources", "limits", "cpu")
    backend = manifest.conf.get("Backend")
    if limit < LEAST_CPU:
        what = f"{given} is too little: flanneld needs {LEAST_CPU * 1000:.0f}m while nothing happens"
        findings.faults.append(daemon.fault(place, what, "100m"))
    elif isinstance(backend, dict) and backend.get("Type") == "udp" and limit < 1:
        rate = limit / CPU_PER_PACKET
        what = f"{given} holds the udp backend to about {rate:.0f} packets, {rate * 1400 * 8 / 1e6:.0f} Mbit a second"
        hint = "flanneld itself carries every packet of it: leave the limit away"
        findings.warnings.append(daemon.fault(place, what, hint))
