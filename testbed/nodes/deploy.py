"""Putting flannel on a lab's nodes: a store, the CNI plugins, flanneld, then pods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.deadline import Deadline
from testbed.errors import CommandError, InputError, LabError, ProductError, TestbedError
from testbed.flannelbuild import default_flannel
from testbed.flannelfits import check_fits
from testbed.flannelspec import FlannelSpec
from testbed.ipv6 import with_ipv6
from testbed.labs import Progress, Quiet, kinds
from testbed.labs.fabric import calm, wait_converged
from testbed.labs.netns import NetnsLab
from testbed.labs.netnsnode import NetnsNode
from testbed.manifest import read_manifest
from testbed.model import LabSpec
from testbed.nodes import pods as podlib
from testbed.nodes.kubernetes import Kubernetes
from testbed.nodes.nodefiles import FLANNELD, cni_folder, node_files
from testbed.nodes.store import KubernetesLeases, LeaseStore, store_of
from testbed.options import RunOptions
from testbed.parallel import each
from testbed.topology import load_topology

if TYPE_CHECKING:
    from testbed.labs.kinds import AnyLab

READY_SECONDS = 20.0
STOP_SECONDS = 10.0
COPY_SECONDS = 60.0
"""For 60 MB into a guest whose machine is busy."""


class Written(dict[str, Any]):
    """What flannel wrote, by name; that a name is missing is flannel's fault, and not the lab's."""

    def __init__(self, items: Mapping[str, Any], what: str, where: str = "") -> None:
        inner = {k: Written(v, f"{what}'s {k}", where) if isinstance(v, dict) else v for k, v in items.items()}
        super().__init__(inner)
        self.what, self.where = what, where

    def __missing__(self, key: str) -> Any:
        raise ProductError(f"{self.what} has no {key}", where=self.where)


@dataclass
class Cluster:
    """A lab with flannel and pods on it."""

    lab: AnyLab
    flannel: FlannelSpec
    options: RunOptions
    pods: dict[str, podlib.Pod] = field(default_factory=dict)

    @property
    def members(self) -> tuple[NetnsNode, ...]:
        """The nodes that run flannel."""
        return tuple(self.lab.node(n.name) for n in self.lab.spec.cluster_nodes)

    @property
    def store(self) -> LeaseStore:
        """The lab's store."""
        return store_of(self.options.store, self.lab, self.flannel)

    @property
    def kubernetes(self) -> Kubernetes:
        """The lab's Kubernetes API. Raises LabError where it has another store."""
        store = self.store
        if not isinstance(store, KubernetesLeases):
            raise LabError("this lab has no Kubernetes API", hint="--store kubernetes")
        return store.api

    def implementation(self, node: str) -> str:
        """Which flanneld runs there: `bundled`, or the path it was given by."""
        return str(self.options.implementation(node) or "bundled")

    def subnet_env(self, node: str) -> dict[str, str]:
        """The node's subnet.env as keys and values. It raises ProductError for one that is not there."""
        path = self.flannel.subnet_file
        try:
            text = self.lab.node(node).read(path).decode(errors="replace")
        except FileNotFoundError as error:
            raise ProductError(f"flanneld left no {path}", where=node) from error
        return Written(dict(line.partition("=")[::2] for line in text.splitlines()), path, node)

    def subnet(self, node: str) -> IPv4Interface:
        """FLANNEL_SUBNET as the node's subnet.env has it. Raises ProductError."""
        text = self.subnet_env(node)["FLANNEL_SUBNET"]
        try:
            return IPv4Interface(text)
        except ValueError as error:
            raise ProductError(f"{self.flannel.subnet_file}: FLANNEL_SUBNET={text} is no subnet", where=node) from error

    def pod_cidr(self, node: str) -> IPv4Network:
        """The subnet that the node leased. Raises ProductError."""
        return self.subnet(node).network

    def subnet6(self, node: str) -> IPv6Interface:
        """FLANNEL_IPV6_SUBNET as the node's subnet.env has it. Raises ProductError."""
        text = self.subnet_env(node)["FLANNEL_IPV6_SUBNET"]
        try:
            return IPv6Interface(text)
        except ValueError as error:
            what = f"{self.flannel.subnet_file}: FLANNEL_IPV6_SUBNET={text} is no subnet"
            raise ProductError(what, where=node) from error

    def pod_cidr6(self, node: str) -> IPv6Network:
        """The IPv6 subnet that the node leased. Raises ProductError."""
        return self.subnet6(node).network

    def leases(self) -> dict[str, dict[str, Any]]:
        """Every lease in the store by node: `key`, and `value` as decoded JSON; ProductError for what is missing."""
        return Written(self.store.leases(), f"the list of leases in {self.store.title}")

    def flanneld_argv(self, node: str) -> list[str]:
        """The command line of a node's flanneld."""
        return [FLANNELD, *self.store.flags(), *self.flannel.args]

    def start_flanneld(self, node: str) -> int:
        """Start flanneld; returns its pid on the node. It is ready some time later: see `wait_ready`."""
        env = {**self.flannel.env, **self.store.environment(node)}
        return self.lab.node(node).start(self.flanneld_argv(node), name="flanneld", env=env)

    def flanneld_pid(self, node: str) -> int | None:
        """The pid of the node's flanneld; None where it does not run."""
        machine = self.lab.node(node)
        try:
            pid = int(machine.read("/run/flanneld.pid") or b"0")
            return pid if machine.read(f"/proc/{pid}/comm") else None
        except OSError:  # gone; the last moment of a process is ESRCH
            return None

    def signal_flanneld(self, node: str, name: str) -> None:
        """Send the node's flanneld a signal (`STOP`, `CONT`, …). Raises ProductError where it does not run."""
        try:
            self.lab.node(node).run(["sh", "-c", 'kill -s "$1" "$(cat /run/flanneld.pid)"', "kill", name])
        except CommandError as error:
            if self.flanneld_pid(node) is not None:
                raise
            said = self.flanneld_log(node) or "(its log is empty)"
            raise ProductError(f"flanneld is gone, and was to get SIG{name}\n{said}", where=node) from error

    def stop_flanneld(self, node: str, signal: str = "TERM") -> None:
        """End the node's flanneld and wait until it is gone. Raises ProductError where it stays."""
        self.signal_flanneld(node, signal)
        gone = Deadline(STOP_SECONDS).poll(lambda: self.flanneld_pid(node) is None or None)
        if gone is None:
            raise ProductError(f"flanneld did not end within {STOP_SECONDS:.0f} s of SIG{signal}", where=node)

    def wait_ready(self, names: Iterable[str]) -> None:
        """Wait until flanneld has written subnet.env on these nodes. Raises ProductError with the end of its log."""
        deadline = Deadline(READY_SECONDS)
        for name in names:
            if deadline.poll(lambda name=name: self._ready(name)) is None:  # type: ignore[misc]
                what = f"flanneld wrote no {self.flannel.subnet_file} within {READY_SECONDS:.0f} s"
                raise ProductError(f"{what}\n{self.flanneld_log(name) or '(its log is empty)'}", where=name)

    def _ready(self, name: str) -> bool | None:
        node = self.lab.node(name)
        with suppress(FileNotFoundError):
            if node.read(self.flannel.subnet_file):
                return True
        if self.flanneld_pid(name) is None:
            said = self.flanneld_log(name) or "(its log is empty)"
            raise ProductError(f"flanneld ended instead of getting ready\n{said}", where=name)
        return None

    def flanneld_log(self, node: str, lines: int = 20) -> str:
        """The end of the node's flanneld log."""
        return self.lab.node(node).run(["tail", "-n", str(lines), "/var/log/flanneld.log"], check=False).stdout.rstrip()

    def add_pod(self, node: str, name: str) -> podlib.Pod:
        """Make a pod on a node. Raises CniError where a plugin refuses."""
        pod = podlib.make_pod(self.lab.node(node), name, self.flannel.cni_conf, self.lab.spec.id)
        self.pods[pod.name] = pod
        return pod

    def delete_pod(self, pod: podlib.Pod) -> None:
        """Remove a pod. Raises CniError where a plugin refuses."""
        podlib.remove_pod(pod, self.flannel.cni_conf)
        self.pods.pop(pod.name, None)

    def pod(self, endpoint: str) -> podlib.Pod:
        """The pod of that endpoint, `worker1/client`; KeyError where there is none."""
        return self.pods[endpoint]


def describe_lab(options: RunOptions) -> tuple[LabSpec, FlannelSpec]:
    """Read topology and manifest: what will be brought up. Raises InputError."""
    if options.manifest:
        flannel = read_manifest(
            str(options.manifest), options.backend, rules=options.rules, net_conf_overrides=options.net_conf
        )
    else:
        flannel = default_flannel(options.backend, net_conf_overrides=options.net_conf, rules=options.rules)
    topology = options.topology or flannel.backend.topology
    spec = load_topology(topology, options.name, overrides=options.settings, mtu=options.mtu)
    if flannel.network6 is not None:
        spec = with_ipv6(spec)
    if not flannel.ipv4 and options.store == "etcd":
        hint = "--store kubernetes"
        raise InputError("the keys of leases in etcd begin with an IPv4 subnet, and there is none", hint=hint)
    check_fits(flannel, spec)
    if not flannel.backend.implemented and not options.flanneld:
        raise InputError(f"the bundled flanneld cannot do {flannel.backend.run} yet", hint="give one by --flanneld")
    return spec, flannel


def bring_up(options: RunOptions, progress: Progress | None = None) -> Cluster:
    """Bring up a lab with flannel and pods, ready to be checked; it ends with this process unless detached.

    Raises InputError for a wrong topology, manifest or option before anything is made, LabError where the lab is at
    fault and ProductError where the implementation under test does not get ready. Nothing is left behind then.
    """
    progress = progress or Quiet()
    spec, flannel = describe_lab(options)
    cni_folder()
    lab = kinds.bring_up(options.lab, spec, progress=progress, image=options.image, image_prefix=options.image_prefix)
    try:
        lab.settle(lab.nodes)
        cluster = Cluster(lab, flannel, options)
        deploy(cluster, progress)
    except BaseException as error:
        alive = lab.alive
        lab.down()
        if isinstance(error, TestbedError) and not alive:  # whatever it was, it is not flannel's fault
            raise LabError("what the lab runs on has ended", where=spec.id, hint="start again") from error
        raise
    return cluster


def deploy(cluster: Cluster, progress: Progress) -> None:
    """Put a store, flannel and pods on a bare lab."""
    lab, options = cluster.lab, cluster.options
    names = [node.name for node in cluster.members]
    store = cluster.store
    with progress.step(f"Starting {store.title}"):  # which may have to be built first
        store.start()
    with progress.step(f"Copying flannel and the CNI plugins to {len(names)} nodes"):
        archives: dict[tuple[Path | None, Path | None], bytes] = {}
        for name in names:
            key = (options.implementation(name), options.plugin(name))
            if key not in archives:
                archives[key] = node_files(cluster.flannel, *key)
        untar = ["tar", "-x", "-C", "/", "--no-same-owner", "--unlink-first"]

        def copy(name: str) -> None:
            archive = archives[(options.implementation(name), options.plugin(name))]
            lab.node(name).run(untar, stdin=archive, timeout=COPY_SECONDS)

        each(copy, names)
    with progress.step("Waiting for BGP to converge"):
        wait_converged(lab)
        if isinstance(lab, NetnsLab):
            calm(lab)
    with progress.step(f"Writing flannel's configuration to {store.title}"):
        store.configure()
    with progress.step(f"Starting flanneld ({cluster.flannel.backend.type})"):
        each(cluster.start_flanneld, names)
        cluster.wait_ready(names)
    with progress.step("Making pods through CNI"):
        wanted = [(name, "testapp") for name in names] + [(client_node(cluster), "client")]
        each(lambda pair: cluster.add_pod(*pair), wanted)
        start_outside(cluster)
    remember(cluster)


def client_node(cluster: Cluster) -> str:
    """Where the client pod runs: the first node that is not the control plane."""
    names = [node.name for node in cluster.members]
    workers = [name for name in names if name != cluster.lab.spec.control_plane]
    return (workers or names)[0]


def start_outside(cluster: Cluster) -> None:
    """Start the server on the host beyond the fabric."""
    outside = cluster.lab.node(cluster.lab.spec.outside.name)
    outside.write(podlib.SERVER, podlib.server_program())
    log = "/var/log/outside.log"
    before = len(podlib.logged(outside, log))  # it may have started anew
    outside.start(podlib.server_argv("outside", outside.name, str(outside.spec.ip)), name="outside")
    podlib.wait_listening(outside, log, "the outside host", before)


def remember(cluster: Cluster) -> None:
    """Keep what later commands want to know of the cluster."""
    cluster.lab.remember(
        backend=cluster.flannel.backend.run,
        rules=cluster.flannel.rules,
        implementations={node.name: cluster.implementation(node.name) for node in cluster.members},
        bridge=cluster.flannel.bridge,
        tunnel=cluster.flannel.tunnel_device,
        tunnel6=cluster.flannel.tunnel_device6,
        port=cluster.flannel.port,
        subnet_file=cluster.flannel.subnet_file,
        pods={
            name: {
                "node": pod.node.name,
                "pod": pod.pod_name,
                "address": str(pod.address4 or pod.address6),
                "netns": pod.netns,
            }
            for name, pod in cluster.pods.items()
        },
    )


def with_pods(lab: AnyLab) -> Mapping[str, NetnsNode]:
    """Every place of a remembered lab by its endpoint: nodes, pods as `NODE/POD`, and VRFs as `LEAF/VRF`."""
    places = dict(lab.nodes)
    places |= {f"{node.name}/{node.spec.vrf}": node.in_vrf() for node in lab.nodes.values() if node.spec.vrf}
    for name, pod in lab.record.facts.get("pods", {}).items():
        places[name] = lab.node(pod["node"]).netns(pod["netns"], name)
    return places
