"""Reads a user's own kube-flannel.yml: what it tells flannel decides what is deployed and what checks expect.

Every fault of the file is found in one reading, with the line it is on, inside net-conf.json too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from testbed import netconf
from testbed.errors import Fault, InputError
from testbed.flannelspec import (
    BACKENDS,
    NFTABLES,
    FlannelSpec,
    build,
    check_rules_name,
    normalise,
    run_of,
)
from testbed.manifestjson import JsonText
from testbed.manifestpod import Container, read_container
from testbed.yamlmarks import Document, Path, parse, read_text

NET_CONF, CNI_CONF = "net-conf.json", "cni-conf.json"


def read_manifest(
    path: str,
    run_name: str,
    *,
    net_conf_overrides: Mapping[str, str] | None = None,
    rules: str | None = None,
) -> FlannelSpec:
    """Return the flannel that a manifest deploys, for one run.

    `net_conf_overrides` are the command line's `--net-conf` and change the manifest's net-conf.json; `rules` is
    `--rules`, by default what the manifest's EnableNFTables says.  Raises InputError with every fault, also where the
    manifest is for another backend than the run's.
    """
    text = read_text(str(path), what="manifest")
    return parse_manifest(text, str(path), run_name, net_conf_overrides=net_conf_overrides, rules=rules)


def parse_manifest(
    text: str,
    file: str,
    run_name: str,
    *,
    net_conf_overrides: Mapping[str, str] | None = None,
    rules: str | None = None,
) -> FlannelSpec:
    """As `read_manifest`, for a text; `file` is what faults call it."""
    run = normalise(run_name)
    if rules is not None:
        check_rules_name(rules)
    reading = _Reading(file)
    reading.read(text)
    return reading.spec(run, net_conf_overrides or {}, rules)


@dataclass(frozen=True, slots=True)
class _Object:
    """A Kubernetes object of the file: its document, and where in it."""

    document: Document
    path: Path
    value: Mapping[str, Any]

    def at(self, *keys: str | int) -> Any:
        """The value at a path below the object; None where there is none."""
        value: Any = self.value
        for key in keys:
            inside = isinstance(value, dict) if isinstance(key, str) else isinstance(value, list)
            try:
                value = value[key] if inside else None
            except (KeyError, IndexError):
                return None
        return value

    @property
    def name(self) -> str:
        return f"{self.at('kind')} {self.at('metadata', 'name')}"

    @property
    def namespace(self) -> Any:
        return self.at("metadata", "namespace")

    def fault(self, path: Path, what: str, hint: str = "") -> Fault:
        return self.document.fault((*self.path, *path), what, hint)


class _Reading:
    """One reading of one manifest."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.faults: list[Fault] = []
        self.notes: list[str] = []
        self.net_conf: JsonText | None = None
        self.conf: dict[str, Any] = {}
        self.cni_conf: dict[str, Any] = {}
        self.container: Container | None = None

    def read(self, text: str) -> None:
        documents, self.faults = parse(text, self.file)
        objects = [found for document in documents for found in self.objects(document)]
        if not documents and not self.faults:
            self.faults.append(Fault(self.file, 0, "", "the file is empty", "give flannel's kube-flannel.yml"))
        self.stop_if(not objects)
        configs = [o for o in objects if o.at("kind") == "ConfigMap" and self.holds_configuration(o)]
        daemons = [o for o in objects if o.at("kind") == "DaemonSet"]
        config = self.only(configs, f"ConfigMap with {NET_CONF} and {CNI_CONF}")
        if config is not None:
            self.read_config(config)
        self.read_daemons(daemons, config)

    def stop_if(self, ended: bool) -> None:
        if ended and self.faults:
            raise InputError(faults=sorted(dict.fromkeys(self.faults), key=lambda fault: fault.line))

    def objects(self, document: Document, path: Path = (), value: Any = None) -> Iterator[_Object]:
        """The objects of a document; a List's items are objects too."""
        value = document.value if not path else value
        if not isinstance(value, dict):
            self.faults.append(document.fault(path, "no Kubernetes object, which has apiVersion and kind"))
        elif value.get("kind") == "List" and isinstance(value.get("items"), list):
            for position, item in enumerate(value["items"]):
                yield from self.objects(document, (*path, "items", position), item)
        elif not isinstance(value.get("kind"), str):
            hint = "every object of a manifest says what it is"
            self.faults.append(document.fault((*path, "kind"), "missing", hint))
        else:
            yield _Object(document, path, value)

    def holds_configuration(self, config: _Object) -> bool:
        data = config.at("data")
        return isinstance(data, dict) and (NET_CONF in data or CNI_CONF in data)

    def only(self, found: list[_Object], what: str) -> _Object | None:
        if not found:
            self.faults.append(Fault(self.file, 0, "", f"no {what}", "give the whole kube-flannel.yml"))
        for other in found[1:]:
            first = found[0].document.line(found[0].path)
            self.faults.append(other.fault((), f"a second {what}; the first is on line {first}", "keep one"))
        return found[0] if found else None

    def json(self, config: _Object, key: str) -> JsonText | None:
        text = config.at("data", key)
        if text is None:
            self.faults.append(config.fault(("data", key), "missing", f"flannel reads it from {config.name}"))
            return None
        if not isinstance(text, str):
            self.faults.append(config.fault(("data", key), "has to be text", f"write `{key}: |` and the JSON below"))
            return None
        place = config.document.places[(*config.path, "data", key)]
        result = JsonText(self.file, key, text, place.text_line, place.block)
        self.faults += result.faults
        return result

    def read_config(self, config: _Object) -> None:
        self.net_conf = self.json(config, NET_CONF)
        if self.net_conf is not None and self.net_conf.value is not None:
            self.conf, problems = netconf.canonical(self.net_conf.value)
            self.faults += [self.net_conf.fault(p.key, p.what, p.hint) for p in problems]
        cni = self.json(config, CNI_CONF)
        if cni is not None and cni.value is not None:
            problems = list(check_conflist(cni.value))
            self.faults += [cni.fault(p.key, p.what, p.hint) for p in problems]
            self.cni_conf = cni.value if not problems else {}

    def read_daemons(self, daemons: list[_Object], config: _Object | None) -> None:
        """Find the container that runs flanneld; older manifests have a DaemonSet for each architecture."""
        found: list[tuple[_Object, Container]] = []
        faults: list[Fault] = []
        for daemon in daemons:
            container = read_container(daemon.document, (*daemon.path, "spec", "template", "spec"), faults)
            if container is not None:
                found.append((daemon, container))
        if not found:
            what = "no DaemonSet with a container that runs flanneld"
            self.faults += faults or [Fault(self.file, 0, "", what, "give the whole kube-flannel.yml")]
            return
        self.faults += faults
        first, self.container = found[0]
        for daemon, container in found[1:]:
            if (container.args, container.env) != (self.container.args, self.container.env):
                hint = "a lab has one kind of node: keep the DaemonSet that is meant"
                self.faults.append(daemon.fault((), f"{daemon.name} runs flanneld differently from {first.name}", hint))
        apart = config is not None and None not in (config.namespace, first.namespace)
        if config is not None and apart and config.namespace != first.namespace:
            what = f"in namespace {config.namespace}, but {first.name} is in {first.namespace}"
            self.faults.append(config.fault(("metadata", "namespace"), what, "pods cannot mount it from there"))

    def spec(self, run: str, overrides: Mapping[str, str], rules: str | None) -> FlannelSpec:
        """The FlannelSpec, once no fault is left."""
        backend = self.conf.get("Backend")
        if self.net_conf is not None and isinstance(backend, dict) and str(backend.get("Type")) in netconf.BACKEND_KEYS:
            other = run_of(self.conf)
            if other is None:
                self.faults.append(self.net_conf.fault("Backend", "no run has this combination of backend and keys"))
            elif other != run:
                hint = f"./run {other} -- --manifest {self.file}"
                what = f"the manifest deploys {_called(other)}, but the run is {_called(run)}"
                self.faults.append(self.net_conf.fault("Backend", what, hint))
        nftables = bool(self.conf.get("EnableNFTables"))
        if rules is not None and self.net_conf is not None and (rules == NFTABLES) != nftables:
            what = f"{str(nftables).lower()} here, which contradicts --rules {rules}"
            self.faults.append(self.net_conf.fault("EnableNFTables", what, "leave --rules away, or change the file"))
        self.stop_if(True)
        assert self.container is not None  # without it there is a fault
        notes = [*self.container.notes]
        if "SubnetLen" in self.conf:
            notes.append("SubnetLen counts here: only flannel's Kubernetes store ignores it")
        return build(
            BACKENDS[run],
            self.conf,
            cni_conf=self.cni_conf,
            args=self.container.args,
            env=self.container.env,
            rules=rules,
            overrides=overrides,
            source=self.file,
            notes=notes,
        )


def _called(run: str) -> str:
    direct = {True: " with DirectRouting", False: ""}[BACKENDS[run].direct]
    return f"{BACKENDS[run].type}{direct} (run {run})"


def check_conflist(conf: Any) -> Iterator[netconf.Problem]:
    """What is wrong with a cni-conf.json, as a runtime and the flannel plugin see it."""
    if not isinstance(conf, dict):
        yield netconf.Problem("", "has to be a JSON object")
        return
    for key in ("name", "cniVersion"):
        if not isinstance(conf.get(key), str) or not conf[key]:
            yield netconf.Problem(key, "has to be text" if key in conf else "missing")
    plugins = conf.get("plugins")
    if not isinstance(plugins, list) or not plugins:
        what = "has to be a list of plugins" if "plugins" in conf else "missing"
        yield netconf.Problem("plugins", what, "the flannel plugin and, as a rule, portmap")
        return
    for position, plugin in enumerate(plugins):
        if not isinstance(plugin, dict) or not isinstance(plugin.get("type"), str):
            yield netconf.Problem(f"plugins[{position}]", "has to be an object with a type")
    flannels = [plugin for plugin in plugins if isinstance(plugin, dict) and plugin.get("type") == "flannel"]
    if len(flannels) != 1:
        yield netconf.Problem("plugins", f"has {len(flannels)} plugins of type flannel, and needs one")
    for plugin in flannels:
        yield from _check_delegate(plugin.get("delegate", {}))


def _check_delegate(delegate: Any) -> Iterator[netconf.Problem]:
    if not isinstance(delegate, dict):
        yield netconf.Problem("delegate", "has to be an object")
        return
    for key in sorted(delegate.keys() & {"name", "ipam"}):
        yield netconf.Problem(f"delegate.{key}", "the flannel plugin fills it in and refuses it here", "remove it")
    if not isinstance(delegate.get("type", "bridge"), str):
        yield netconf.Problem("delegate.type", "has to be text")
    bridge = delegate.get("bridge", "cni0")
    if not isinstance(bridge, str) or not 0 < len(bridge) <= 15 or any(c in " /:" for c in bridge):
        yield netconf.Problem("delegate.bridge", f"{bridge!r} is no name of a device, of up to 15 characters")
