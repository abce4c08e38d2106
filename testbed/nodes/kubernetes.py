"""The lab's Kubernetes API: etcd, API server and controller-manager on the control plane node, spoken to from there."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml

from testbed.deadline import Deadline
from testbed.errors import LabError
from testbed.flannelspec import FlannelSpec
from testbed.labs import interpreter
from testbed.labs.base import Node
from testbed.model import LabSpec
from testbed.nodes.controlplane import COMPONENTS, ControlPlane
from testbed.render import NAMESPACE, Images, render_flannel
from testbed.tools import build_tool

FOLDER, PROGRAMS, DATA = "/etc/kubernetes/lab", "/opt/kubernetes", "/var/lib/kubernetes-etcd"
PODS_FILES = "/var/run/secrets/kubernetes.io/serviceaccount"
POD_CIDR_SECONDS = 20.0
TOKEN_SECONDS = 30 * 86400
PREFIX = "flannel.alpha.coreos.com/"

MERGE, JSON = "application/merge-patch+json", "application/json"

#: Runs on the node, as the administrator: calls from standard input, one connection, their answers on standard output.
#: A call that finds nobody is tried again until the deadline, in seconds.
_CALLS = """
import http.client, json, ssl, sys, time
folder, address, port, seconds, calls = json.load(sys.stdin)
context = ssl.create_default_context(cafile=folder + "/ca.crt")
context.load_cert_chain(folder + "/admin.crt", folder + "/admin.key")
deadline = time.monotonic() + seconds
answers, connection = [], None
for method, path, body, kind in calls:
    while True:
        try:
            connection = connection or http.client.HTTPSConnection(address, port, timeout=10, context=context)
            connection.request(method, path, body, {"Content-Type": kind} if body is not None else {})
            answer = connection.getresponse()
            text = answer.read().decode()
            if answer.status == 200 or path != "/readyz":
                break
        except OSError as error:
            answer, connection, text = None, None, str(error)
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    answers.append([answer.status if answer else 0, text])
json.dump(answers, sys.stdout)
"""

_OBJECTS = {
    "Namespace": "/api/v1/namespaces",
    "ClusterRole": "/apis/rbac.authorization.k8s.io/v1/clusterroles",
    "ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
    "ServiceAccount": f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts",
    "ConfigMap": f"/api/v1/namespaces/{NAMESPACE}/configmaps",
}


class Call(NamedTuple):
    """A request to the API; `body` is what is sent as JSON."""

    method: str
    path: str
    body: Any = None
    kind: str = JSON


@dataclass(frozen=True)
class Kubernetes:
    """The API of a lab; `node` is the control plane."""

    node: Node
    lab: LabSpec
    flannel: FlannelSpec

    @property
    def plane(self) -> ControlPlane:
        """Its processes."""
        flannel, address = self.flannel, str(self.node.spec.ip)
        return ControlPlane(
            *(address, FOLDER, DATA, PROGRAMS),
            network=flannel.network if flannel.ipv4 else None,
            subnet_len=flannel.subnet_len,
            network6=flannel.network6,
        )

    def start(self) -> None:
        """Put program and certificates on the node, and start etcd and the API server, which answers seconds later.

        Raises ToolUnavailable where the program cannot be built here, LabError where openssl is missing.
        """
        program = build_tool("kubernetes")
        # Into the node's own memory, for the folder that it was built in may be closed to a lab.
        self.node.write(f"{PROGRAMS}/kubernetes", program.read_bytes(), mode=0o755)
        self.node.run(["tar", "-x", "-C", "/", "--no-same-owner"], stdin=self._archive())
        self.start_again()

    def start_again(self) -> None:
        """Start etcd and the API server on a node that has all of it on its disk."""
        self.node.start(self.plane.etcd_argv(), name="etcd")
        self.node.start(self.plane.apiserver_argv(), name="kube-apiserver")

    def _archive(self) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name, data in self.plane.files().items():
                info = tarfile.TarInfo(f"{FOLDER}/{name}".lstrip("/"))
                info.size, info.mode = len(data), 0o600
                archive.addfile(info, io.BytesIO(data))
            for name in COMPONENTS:
                info = tarfile.TarInfo(f"{PROGRAMS}/{name}".lstrip("/"))
                info.type, info.linkname = tarfile.SYMTYPE, "kubernetes"
                archive.addfile(info)
        return buffer.getvalue()

    def wait_ready(self, seconds: float) -> None:
        """Wait until the API serves, then start the controller-manager. Raises LabError with the end of a log."""
        status, text = self._ask([Call("GET", "/readyz")], seconds)[0]
        if status != 200:
            log = self.node.run(["tail", "-n", "15", "/var/log/kube-apiserver.log"], check=False).stdout
            raise LabError(
                f"the API server was not ready within {seconds:.0f} s: {text[:300]}\n{log}", where=self.node.name
            )
        self.node.start(self.plane.controllers_argv(), name="kube-controller-manager")

    def _ask(self, calls: Sequence[Call], seconds: float = 10.0) -> list[tuple[int, str]]:
        asked = [
            [call.method, call.path, None if call.body is None else json.dumps(call.body), call.kind] for call in calls
        ]
        plane = self.plane
        words = json.dumps([FOLDER, plane.address, plane.port, seconds, asked])
        argv = [interpreter(), "-I", "-S", "-c", _CALLS]
        answers = json.loads(self.node.run(argv, stdin=words, timeout=seconds + 20).stdout)
        return [(status, text) for status, text in answers]

    def ask(self, *calls: Call) -> list[dict[str, Any]]:
        """Make calls as the administrator; returns the objects they were answered with. Raises LabError."""
        found = []
        for call, (status, text) in zip(calls, self._ask(calls), strict=True):
            if not 200 <= status < 300:
                raise LabError(f"{call.method} {call.path}: {status} {text[:500]}", where=self.node.name)
            found.append(dict(json.loads(text)))
        return found

    def add_flannel(self) -> str:
        """Make the lab's nodes, and flannel's rights as its manifest has them; returns a token for flanneld."""
        manifest = render_flannel(self.flannel, Images(), interface="eth0")
        objects = [document for document in yaml.safe_load_all(manifest) if document["kind"] in _OBJECTS]
        calls = [Call("POST", _OBJECTS[document["kind"]], document) for document in objects]
        calls += [Call("POST", "/api/v1/nodes", self._node_object(node.name)) for node in self.lab.cluster_nodes]
        self.ask(*calls)
        self._wait_pod_cidrs()
        return self.token()

    def token(self) -> str:
        """A token for flanneld."""
        request = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"expirationSeconds": TOKEN_SECONDS},
        }
        answer = self.ask(Call("POST", f"{_OBJECTS['ServiceAccount']}/flannel/token", request))
        return str(answer[0]["status"]["token"])

    def _node_object(self, name: str) -> dict[str, Any]:
        """A node as a kubelet registers it where somebody else has to make its network."""
        address = str(self.lab.node(name).ip)
        # A kubelet always writes this annotation, and upstream's flanneld panics at a node that has none at all.
        annotations = {"volumes.kubernetes.io/controller-managed-attach-detach": "true"}
        labels = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux"}
        waiting = {"type": "NetworkUnavailable", "status": "True", "reason": "NodeInitialization", "message": ""}
        return {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name, "labels": labels, "annotations": annotations},
            "status": {
                "addresses": [{"type": "InternalIP", "address": address}, {"type": "Hostname", "address": name}],
                "conditions": [waiting],
            },
        }

    def _wait_pod_cidrs(self) -> None:
        def missing() -> list[str]:
            return [name for name, node in self.nodes().items() if not node["spec"].get("podCIDR")]

        if Deadline(POD_CIDR_SECONDS).poll(lambda: not missing() or None) is None:
            log = self.node.run(["tail", "-n", "15", "/var/log/kube-controller-manager.log"], check=False).stdout
            raise LabError(f"Kubernetes gave {', '.join(missing())} no podCIDR\n{log}", where=self.node.name)

    def nodes(self) -> dict[str, dict[str, Any]]:
        """The Node objects by name."""
        items = self.ask(Call("GET", "/api/v1/nodes"))[0]["items"]
        return {item["metadata"]["name"]: item for item in items}

    def serves(self) -> bool:
        """Whether the API answers, and is ready."""
        return self._ask([Call("GET", "/readyz")], 1.0)[0][0] == 200

    def try_delete(self, name: str) -> bool:
        """Delete a node, where the API serves; whether it did."""
        return self._ask([Call("DELETE", f"/api/v1/nodes/{name}")])[0][0] == 200

    def annotate(self, name: str, annotations: dict[str, str | None]) -> None:
        """Set annotations of a node; None removes one."""
        self.ask(Call("PATCH", f"/api/v1/nodes/{name}", {"metadata": {"annotations": annotations}}, MERGE))

    def ca(self) -> bytes:
        """The certificate authority's certificate."""
        return self.node.read(f"{FOLDER}/ca.crt")
