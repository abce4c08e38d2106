"""A real Kubernetes API server on the loopback, with an etcd of its own, spoken to as tests speak to the small one."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import subprocess
from pathlib import Path
from typing import Any

from testbed.nodes.controlplane import COMPONENTS, ControlPlane
from testbed.tools import build_tool
from tests.flannel.conftest import eventually, free_ports


class RealApi:
    """etcd and kube-apiserver in a folder. Raises ToolUnavailable where they cannot be built."""

    def __init__(self, folder: Path) -> None:
        program = build_tool("kubernetes")
        self._folder = folder
        port, etcd, peer = free_ports(3)
        self.plane = ControlPlane(
            "127.0.0.1", str(folder / "pki"), str(folder / "data"), str(folder), port, etcd, peer
        )  # fmt: skip
        for name in COMPONENTS:
            (folder / name).symlink_to(program)
        (folder / "pki").mkdir()
        for name, data in self.plane.files().items():
            (folder / "pki" / name).write_bytes(data)
        self.tls: ssl.SSLContext | None = ssl.create_default_context(cafile=str(folder / "pki/ca.crt"))
        self.tls.load_cert_chain(folder / "pki/admin.crt", folder / "pki/admin.key")
        self.port = port
        self._running = [self._start(self.plane.etcd_argv()), self._start(self.plane.apiserver_argv())]

    def _start(self, argv: list[str]) -> subprocess.Popen[bytes]:
        with (self._folder / f"{Path(argv[0]).name}.log").open("ab") as log:
            environment = {"PATH": os.environ["PATH"], "HOME": "/"}
            return subprocess.Popen(argv, stdout=log, stderr=log, env=environment)

    def restart_server(self) -> None:
        """Kill the API server, and start it again."""
        self._running[1].kill()
        self._running[1].wait()
        self._running[1] = self._start(self.plane.apiserver_argv())
        self.wait_ready()

    def wait_ready(self) -> None:
        """Wait until it serves."""

        def ready() -> bool:
            assert self._running[1].poll() is None, (self._folder / "kube-apiserver.log").read_text()[-2000:]
            try:
                return self.ask("GET", "/readyz")[0] == 200
            except OSError:
                return False

        eventually(ready, f"the API server is ready: see {self._folder}/kube-apiserver.log", 90)

    def ask(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> tuple[int, Any]:
        """Make a call as the administrator; returns the status and what was said."""
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, context=self.tls, timeout=30)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), {"Content-Type": kind})
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        return answer.status, json.loads(text) if text.startswith(b"{") else text.decode()

    def _do(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> Any:
        status, answer = self.ask(method, path, body, kind)
        assert 200 <= status < 300, (method, path, status, answer)
        return answer

    # -- the same for every API that tests use ----------------------------------------------------------------------

    def put(self, node: dict[str, Any]) -> None:
        """Create a node, or give it these annotations and no others."""
        name = node["metadata"]["name"]
        status, found = self.ask("GET", f"/api/v1/nodes/{name}")
        if status == 404:
            self._do("POST", "/api/v1/nodes", node)
            return
        wanted = node["metadata"]["annotations"]
        gone = dict.fromkeys(set(found["metadata"].get("annotations", {})) - set(wanted))
        patch: dict[str, Any] = {"metadata": {"annotations": {**gone, **wanted}}}
        if not found["spec"].get("podCIDR"):
            patch["spec"] = node["spec"]
        self._do("PATCH", f"/api/v1/nodes/{name}", patch, "application/merge-patch+json")

    def delete(self, name: str) -> None:
        """Delete a node."""
        self._do("DELETE", f"/api/v1/nodes/{name}")

    def delete_all(self) -> None:
        """Delete every node."""
        self._do("DELETE", "/api/v1/nodes")

    def get(self, name: str) -> dict[str, Any]:
        """Return a node."""
        node: dict[str, Any] = self._do("GET", f"/api/v1/nodes/{name}")
        return node

    def close(self) -> None:
        """End both, the API server first: without etcd it would wait for it."""
        for process in reversed(self._running):
            process.kill()
            process.wait()
