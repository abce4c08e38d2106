"""Where a lab's flannel keeps its leases: etcd, or the Kubernetes API."""

from __future__ import annotations

import json
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any, Protocol

from testbed.errors import ProductError
from testbed.flannelspec import FlannelSpec
from testbed.labs.base import Lab
from testbed.nodes.etcd import PREFIX, Etcd
from testbed.nodes.kubernetes import PODS_FILES, Kubernetes
from testbed.nodes.kubernetes import PREFIX as ANNOTATIONS
from testbed.render import NAMESPACE

ETCD_SECONDS = 15.0
API_SECONDS = 60.0


class LeaseStore(Protocol):
    """A lab's store."""

    @property
    def title(self) -> str:
        """What it is called: `etcd`, `the Kubernetes API`."""

    def start(self) -> None:
        """Start it; it serves some time later. Raises LabError."""

    def configure(self) -> None:
        """Wait until it serves, and put flannel's configuration into it. Raises LabError."""

    def resume(self, node: str) -> None:
        """Bring back what a node that started anew had of it, and wait until it serves. Raises LabError."""

    def flags(self) -> list[str]:
        """The flags by which flanneld finds it."""

    def environment(self, node: str) -> dict[str, str]:
        """What flanneld's environment on a node has to say."""

    def leases(self) -> dict[str, dict[str, Any]]:
        """Every lease by node: `key`, which ends in the subnet (`10.244.1.0-24`, `10.244.1.0-24&fd00:1::-64`), and
        `value`, as etcd has them."""


def store_of(kind: str, lab: Lab, flannel: FlannelSpec) -> LeaseStore:
    """The store of that kind on a lab's control plane node."""
    return EtcdLeases(lab, flannel) if kind == "etcd" else KubernetesLeases(lab, flannel)


@dataclass(frozen=True)
class EtcdLeases:
    """Leases in etcd."""

    lab: Lab
    flannel: FlannelSpec
    title = "etcd"

    @property
    def etcd(self) -> Etcd:
        """The server."""
        return Etcd(self.lab.node(self.lab.spec.control_plane))

    def start(self) -> None:
        """Start etcd."""
        self.etcd.start()

    def configure(self) -> None:
        """Wait for etcd, and write net-conf.json to its key."""
        self.etcd.wait_ready(ETCD_SECONDS)
        self.etcd.put(f"{PREFIX}/config", json.dumps(self.flannel.net_conf))

    def resume(self, node: str) -> None:
        """Start etcd where that was its node."""
        if node == self.lab.spec.control_plane:
            self.etcd.start()
            self.etcd.wait_ready(ETCD_SECONDS)

    def flags(self) -> list[str]:
        """Endpoint and prefix."""
        return [f"--etcd-endpoints={self.etcd.endpoint}", f"--etcd-prefix={PREFIX}"]

    def environment(self, node: str) -> dict[str, str]:
        """Nothing: the flags say it all."""
        return {}

    def leases(self) -> dict[str, dict[str, Any]]:
        """Every lease by node, as its PublicIP says."""
        by_address = {str(n.ip): n.name for n in self.lab.spec.cluster_nodes}
        found = {}
        for key, text in self.etcd.under(f"{PREFIX}/subnets/").items():
            try:
                value = json.loads(text)
                address = str(IPv4Address(value["PublicIP"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ProductError(f"the lease {key} cannot be read: {text[:200]}") from error
            found[by_address.get(address, address)] = {"key": key, "value": value}
        return found


@dataclass(frozen=True)
class KubernetesLeases:
    """Leases in the Kubernetes API. On every node flanneld finds what it would find in a pod."""

    lab: Lab
    flannel: FlannelSpec
    title = "the Kubernetes API"

    @property
    def api(self) -> Kubernetes:
        """The API."""
        return Kubernetes(self.lab.node(self.lab.spec.control_plane), self.lab.spec, self.flannel)

    def start(self) -> None:
        """Build the program, unless it was built before, and start etcd and the API server."""
        self.api.start()

    def configure(self) -> None:
        """Wait for the API, make nodes and flannel's rights, and give every node a token."""
        self.api.wait_ready(API_SECONDS)
        token = self.api.add_flannel()
        for member in self.lab.spec.cluster_nodes:
            self._give_token(member.name, token)

    def _give_token(self, name: str, token: str) -> None:
        node = self.lab.node(name)
        node.write(f"{PODS_FILES}/token", token, mode=0o600)
        node.write(f"{PODS_FILES}/ca.crt", self.api.ca())
        node.write(f"{PODS_FILES}/namespace", NAMESPACE)

    def resume(self, node: str) -> None:
        """Start the servers where that was their node, and give flanneld a token, which is in memory alone."""
        if node == self.lab.spec.control_plane:
            self.api.start_again()
            self.api.wait_ready(API_SECONDS)
        self._give_token(node, self.api.token())

    def flags(self) -> list[str]:
        """The store alone: all else is where a pod has it."""
        return ["--kube-subnet-mgr"]

    def environment(self, node: str) -> dict[str, str]:
        """Where a pod finds the API, and which node it is on."""
        plane = self.api.plane
        return {
            "KUBERNETES_SERVICE_HOST": plane.address,
            "KUBERNETES_SERVICE_PORT": str(plane.port),
            "NODE_NAME": node,
        }

    def leases(self) -> dict[str, dict[str, Any]]:
        """Every node that flanneld has annotated."""
        found = {}
        for name, node in self.api.nodes().items():
            annotations = node["metadata"].get("annotations", {})
            if annotations.get(f"{ANNOTATIONS}kube-subnet-manager") == "true":
                value = {
                    "PublicIP": annotations.get(f"{ANNOTATIONS}public-ip"),
                    "PublicIPv6": annotations.get(f"{ANNOTATIONS}public-ipv6"),
                    "BackendType": annotations.get(f"{ANNOTATIONS}backend-type"),
                    "BackendData": json.loads(annotations.get(f"{ANNOTATIONS}backend-data") or "null"),
                    "BackendV6Data": json.loads(annotations.get(f"{ANNOTATIONS}backend-v6-data") or "null"),
                }
                cidrs = "&".join(node["spec"].get("podCIDRs", ())).replace("/", "-")
                found[name] = {"key": f"{name}/{cidrs}", "value": value}
        return found
