"""Reads a user's own kube-flannel.yml: what it tells flannel decides what is deployed and what checks expect.

Every fault of the file is found in one reading, with the line it is on, inside net-conf.json too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from testbed import netconf
from testbed.errors import Fault, InputError
from testbed.flannelbuild import build, check_rules_name
from testbed.flannelspec import BACKENDS, NFTABLES, FlannelSpec, normalise, run_of
from testbed.manifestcluster import Network
from testbed.manifestimage import OS_LABELS, selected
from testbed.manifestjson import JsonText
from testbed.manifestlint import check_manifest, in_order
from testbed.manifestobjects import Daemon, Findings, Manifest, ManifestObject
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
    reading = _Reading()
    reading.read([(file, text)])
    return reading.spec(run, net_conf_overrides or {}, rules)


def lint(texts: Sequence[tuple[str, str]], pod_cidrs: Sequence[tuple[Network, str]] = ()) -> Findings:
    """Everything that is wrong with the manifests of some files, read as one; each is a name and a text.

    `pod_cidrs` are the networks of the cluster's pods, each with who said so.  What only a lab minds is a warning.
    """
    reading = _Reading()
    reading.read(texts)
    found = check_manifest(reading.manifest, pod_cidrs)
    in_labs = [Fault(f.file, f.line, f.key, f"in a lab: {f.what}", f.hint) for f in reading.lab_faults]
    return Findings(in_order([*reading.faults, *found.faults]), in_order([*found.warnings, *in_labs]))


class _Reading:
    """One reading of one manifest, which may be several files."""

    def __init__(self) -> None:
        self.file = ""
        self.faults: list[Fault] = []
        self.lab_faults: list[Fault] = []  # what keeps a lab from deploying it, and no cluster
        self.manifest = Manifest()
        self.cni_conf: dict[str, Any] = {}
        self.container: Container | None = None

    @property
    def conf(self) -> dict[str, Any]:
        return self.manifest.conf

    @property
    def net_conf(self) -> JsonText | None:
        return self.manifest.net_conf

    def read(self, texts: Sequence[tuple[str, str]]) -> None:
        objects = self.manifest.objects
        bare = None
        for self.file, text in texts:
            if is_net_conf(text):
                bare = self.read_net_conf(JsonText(self.file, NET_CONF, text, 1, True))
                continue
            documents, faults = parse(text, self.file)
            self.faults += [_with_template_hint(fault, text) for fault in faults]
            objects += [found for document in documents for found in self.objects(document)]
            if not documents and not faults:
                self.faults.append(Fault(self.file, 0, "", "the file is empty", "give flannel's kube-flannel.yml"))
        if not objects:
            if bare is not None:
                self.lab_faults.append(Fault(self.file, 0, "", "no DaemonSet", "give the whole kube-flannel.yml"))
            return
        daemons = [daemon for daemon in self.manifest.of_kind("DaemonSet") if not _for_windows(daemon)]
        configs = self.configs_of(daemons)
        config = self.only(configs, f"ConfigMap with {NET_CONF} and {CNI_CONF}")
        self.manifest.config = config
        if config is not None:
            self.read_config(config)
        self.read_daemons(daemons, config)

    def configs_of(self, daemons: list[ManifestObject]) -> list[ManifestObject]:
        """The ConfigMaps that may be flannel's; where there are several, those that its DaemonSets mount."""
        configs = [o for o in self.manifest.of_kind("ConfigMap") if self.holds_configuration(o)]
        places = [daemon.each("spec", "template", "spec", "volumes") for daemon in daemons]
        maps = [volume.get("configMap") for volumes in places for _, volume in volumes]
        mounted = {str(config.get("name")) for config in maps if isinstance(config, dict)}
        # A file for Windows' nodes alone brings a ConfigMap of its own, which flannel on Linux never reads.
        foreign = not daemons and bool(self.manifest.of_kind("DaemonSet"))
        return [c for c in configs if c.called in mounted] or ([] if foreign else configs)

    def stop_if(self, ended: bool) -> None:
        if ended and (self.faults or self.lab_faults):
            raise InputError(faults=in_order([*self.faults, *self.lab_faults]))

    def objects(self, document: Document, path: Path = (), value: Any = None) -> Iterator[ManifestObject]:
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
            yield ManifestObject(document, path, value)

    def holds_configuration(self, config: ManifestObject) -> bool:
        data = config.at("data")
        return isinstance(data, dict) and (NET_CONF in data or CNI_CONF in data)

    def only(self, found: list[ManifestObject], what: str) -> ManifestObject | None:
        if not found:
            self.lab_faults.append(Fault(self.file, 0, "", f"no {what}", "give the whole kube-flannel.yml"))
        for other in found[1:]:
            first = found[0].document.line(found[0].path)
            self.faults.append(other.fault((), f"a second {what}; the first is on line {first}", "keep one"))
        return found[0] if found else None

    def json(self, config: ManifestObject, key: str) -> JsonText | None:
        text = config.at("data", key)
        if text is None:
            faults = self.lab_faults if key == CNI_CONF else self.faults  # an image may bring its own
            faults.append(config.fault(("data", key), "missing", f"flannel reads it from {config.name}"))
            return None
        if not isinstance(text, str):
            self.faults.append(config.fault(("data", key), "has to be text", f"write `{key}: |` and the JSON below"))
            return None
        place = config.document.places[(*config.path, "data", key)]
        result = JsonText(config.document.file, key, text, place.text_line, place.block)
        self.faults += result.faults
        return result

    def read_config(self, config: ManifestObject) -> None:
        source = self.json(config, NET_CONF)
        if source is not None:
            self.read_net_conf(source)
        cni = self.json(config, CNI_CONF)
        if cni is not None and cni.value is not None:
            problems = list(check_conflist(cni.value))
            self.keep(problems, cni)
            self.cni_conf = cni.value if not problems else {}

    def read_net_conf(self, source: JsonText) -> JsonText:
        self.manifest.net_conf = source
        self.faults += [fault for fault in source.faults if fault not in self.faults]
        if source.value is not None:
            self.manifest.conf, problems = netconf.canonical(source.value)
            self.keep(problems, source)
        return source

    def keep(self, problems: Sequence[netconf.Problem], source: JsonText) -> None:
        for problem in problems:
            kept = self.lab_faults if problem.lab_only else self.faults
            kept.append(source.fault(problem.key, problem.what, problem.hint))

    def read_daemons(self, daemons: list[ManifestObject], config: ManifestObject | None) -> None:
        """Find the container that runs flanneld; older manifests have a DaemonSet for each architecture."""
        found: list[tuple[ManifestObject, Container]] = []
        faults: list[Fault] = []
        for daemon in daemons:
            pod = (*daemon.path, "spec", "template", "spec")
            container = read_container(daemon.document, pod, faults, self.lab_faults)
            if container is not None:
                found.append((daemon, container))
                place = container.path[len(daemon.path) :]
                given = Daemon(daemon, place, container.words, container.variables, container.hidden)
                self.manifest.daemons.append(given)
        if not found:
            what = "no DaemonSet with a container that runs flanneld"
            self.faults += faults
            if not faults:
                self.lab_faults.append(Fault(self.file, 0, "", what, "give the whole kube-flannel.yml"))
            return
        self.faults += faults
        first, self.container = found[0]
        for daemon, container in found[1:]:
            if (container.args, container.env) != (self.container.args, self.container.env):
                hint = "a lab has one kind of node: keep the DaemonSet that is meant"
                self.lab_faults.append(
                    daemon.fault((), f"{daemon.name} runs flanneld differently from {first.name}", hint)
                )
        apart = config is not None and None not in (config.namespace, first.namespace)
        if config is not None and apart and config.namespace != first.namespace:
            what = f"in namespace {config.namespace}, but {first.name} is in {first.namespace}"
            self.faults.append(config.fault(("metadata", "namespace"), what, "pods cannot mount it from there"))

    def spec(self, run: str, overrides: Mapping[str, str], rules: str | None) -> FlannelSpec:
        """The FlannelSpec, once no fault is left."""
        found = check_manifest(self.manifest)
        if self.faults or self.lab_faults:  # it is refused anyway, so everything is said at once
            self.faults += found.faults
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
            warnings=[str(fault) for fault in in_order([*found.faults, *found.warnings])],
        )


def _called(run: str) -> str:
    direct = {True: " with DirectRouting", False: ""}[BACKENDS[run].direct]
    return f"{BACKENDS[run].type}{direct} (run {run})"


def is_net_conf(text: str) -> bool:
    """Whether a file is a net-conf.json of its own, as flanneld built into other programs reads it."""
    return text.lstrip().startswith("{") and '"kind"' not in text and '"Backend"' in text


def _with_template_hint(fault: Fault, text: str) -> Fault:
    if fault.hint or "{{" not in text:
        return fault
    hint = "this is a template: render it first, as with helm template, and check what comes out"
    return Fault(fault.file, fault.line, fault.key, fault.what, hint)


def _for_windows(daemon: ManifestObject) -> bool:
    pod = daemon.at("spec", "template", "spec")
    return isinstance(pod, dict) and selected(pod, OS_LABELS) == {"windows"}


def check_conflist(conf: Any) -> Iterator[netconf.Problem]:
    """What is wrong with a cni-conf.json, as a runtime and the flannel plugin see it."""
    if not isinstance(conf, dict):
        yield netconf.Problem("", "has to be a JSON object")
        return
    for key in ("name", "cniVersion"):
        if not isinstance(conf.get(key), str) or not conf[key]:
            old = key == "cniVersion" and key not in conf  # only old runtimes took it without
            hint = "kubelets since 1.16 refuse it without" if old else ""
            yield netconf.Problem(key, "has to be text" if key in conf else "missing", hint, lab_only=old)
    plugins = conf.get("plugins")
    if plugins is None and conf.get("type") == "flannel":
        yield netconf.Problem("plugins", "missing", "a single plugin is for old kubelets: make it a list", True)
        return
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
