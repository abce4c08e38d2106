"""Pods as a container runtime makes them: a network namespace, the conflist's plugins, and a server in it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, ip_interface
from typing import Any

from testbed.deadline import Deadline
from testbed.errors import LabError
from testbed.labs import interpreter
from testbed.labs.base import Node, Place, Process, Result
from testbed.nodes import cni

HTTP_PORT = 80
ECHO_PORT = 7
LISTEN_SECONDS = 10.0


@dataclass(frozen=True)
class Pod:
    """A pod on a node; a `Place` whose commands run in the pod's network. An address is None without its family."""

    node: Node
    pod_name: str
    address4: IPv4Address | None
    mac: str
    attachment: cni.Attachment
    result: Mapping[str, Any] = field(repr=False)
    address6: IPv6Address | None = None

    @property
    def address(self) -> IPv4Address:
        """Its IPv4 address; LabError where pods have IPv6 alone."""
        if self.address4 is None:
            raise LabError("this pod has no IPv4 address", where=self.name)
        return self.address4

    @property
    def name(self) -> str:
        """The pod as endpoints are written: `worker1/client`."""
        return f"{self.node.name}/{self.pod_name}"

    @property
    def container_id(self) -> str:
        """Its container id: 64 hexadecimal digits."""
        return self.attachment.container_id

    @property
    def netns(self) -> str:
        """Path of the pod's network namespace on its node."""
        return self.attachment.netns

    @property
    def place(self) -> Place:
        """Where its commands run."""
        return self.node.netns(self.netns, self.name)

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        timeout: float = 30.0,
        stdin: str | bytes | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Result:
        """Run a command in the pod's network; see `Place.run`."""
        return self.place.run(argv, check=check, timeout=timeout, stdin=stdin, env=env)

    def spawn(self, argv: Sequence[str], *, pass_fds: Sequence[int] = (), stdin: bool = False) -> Process:
        """Start a command in the pod's network; see `Place.spawn`."""
        return self.place.spawn(argv, pass_fds=pass_fds, stdin=stdin)


def container_id(lab_id: str, node: str, pod: str) -> str:
    """A container id as runtimes give them: 64 hexadecimal digits, the same for the same pod of the same lab."""
    return hashlib.sha256(f"{lab_id}/{node}/{pod}".encode()).hexdigest()


SERVER = "/opt/testbed/podserver.py"
"""Where the pods' server is on a node."""


def server_program() -> bytes:
    """The server's text."""
    return resources.files("testbed.nodes").joinpath("podserver.py").read_bytes()


def server_argv(pod: str, node: str, address: str) -> list[str]:
    """The command of the server that says who it is."""
    return [interpreter(), "-I", "-S", SERVER, pod, node, address]


def logged(node: Node, log: str, since: int = 0) -> bytes:
    """What a log says behind so many bytes."""
    try:
        return node.read(log)[since:]
    except FileNotFoundError:
        return b""


def wait_listening(node: Node, log: str, argv_name: str, since: int = 0) -> None:
    """Wait until a server has said that it listens, behind what an earlier one said. Raises LabError."""

    def said() -> bytes:
        return logged(node, log, since)

    if not Deadline(LISTEN_SECONDS).poll(lambda: b"listening\n" in said(), every=0.02):
        text = said().decode(errors="replace").strip()[-500:]
        raise LabError(f"the server of {argv_name} did not start: {text}", where=node.name)


def make_pod(
    node: Node, name: str, conflist: Mapping[str, Any], lab_id: str, runtime: Mapping[str, Any] | None = None
) -> Pod:
    """Make a pod and start its server. Raises CniError where a plugin refuses; nothing of the pod is left then."""
    identity = container_id(lab_id, node.name, name)
    netns = f"/run/netns/cni-{identity[:12]}"
    attachment = cni.Attachment(identity, netns)
    node.run(["ip", "netns", "add", f"cni-{identity[:12]}"])
    try:
        # What runtimes have a plugin for; a program of its own costs ten times as much.
        node.netns(netns, f"{node.name}/{name}").run(["ip", "link", "set", "lo", "up"])
        result = cni.add(node, conflist, attachment, runtime)
    except BaseException:
        node.run(["ip", "netns", "delete", f"cni-{identity[:12]}"], check=False)
        raise
    addresses = [ip_interface(ip["address"]) for ip in result["ips"]]
    address = next((one.ip for one in addresses if isinstance(one, IPv4Interface)), None)
    address6 = next((one.ip for one in addresses if isinstance(one, IPv6Interface)), None)
    mac = next(i["mac"] for i in result["interfaces"] if i.get("sandbox") and i["name"] == attachment.ifname)
    pod = Pod(node, name, address, mac, attachment, result, address6)
    server = ["nsenter", f"--net={netns}", "--", *server_argv(name, node.name, str(address or address6))]
    log = f"/var/log/pod-{name}.log"
    before = len(logged(node, log))  # one of that name may have been there before
    node.start(server, name=f"pod-{name}")
    wait_listening(node, log, pod.name, before)
    return pod


def remove_pod(pod: Pod, conflist: Mapping[str, Any]) -> None:
    """Stop a pod's server, detach it by CNI DEL, and remove its namespace. Raises CniError."""
    pod.node.run(["sh", "-c", 'kill "$(cat "$1")"', "stop", f"/run/pod-{pod.pod_name}.pid"], check=False)
    cni.delete(pod.node, conflist, pod.attachment, pod.result)
    pod.node.run(["ip", "netns", "delete", f"cni-{pod.container_id[:12]}"])
