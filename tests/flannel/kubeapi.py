"""A Kubernetes API that fits a screen, for unit tests alone; and a proxy that makes any API fail."""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

MANAGED = "flannel.alpha.coreos.com/kube-subnet-manager"


def annotations_of(number: int, **changed: str | None) -> dict[str, str]:
    """What node number N's flanneld wrote; keyword arguments, with underscores, change or (None) leave out some."""
    texts: dict[str, str | None] = {
        "kube_subnet_manager": "true",
        "backend_type": "vxlan",
        "backend_data": json.dumps({"VNI": 1, "VtepMAC": f"0a:00:00:00:{number // 256:02x}:{number % 256:02x}"}),
        "public_ip": f"192.0.{2 + number // 256}.{number % 256}",
        **changed,
    }
    return {
        f"flannel.alpha.coreos.com/{key.replace('_', '-')}": text for key, text in texts.items() if text is not None
    }


def node_object(number: int, **changed: Any) -> dict[str, Any]:
    """Node number N: `cidr` is its podCIDR, `cidr6` another, `annotations` replaces those that its flanneld wrote."""
    cidr = changed.get("cidr", f"10.244.{number}.0/24")
    spec = {"podCIDR": cidr, "podCIDRs": [cidr]} if cidr else {}
    if changed.get("cidr6"):
        spec["podCIDRs"].append(changed["cidr6"])
    annotations = changed.get("annotations", annotations_of(number))
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": changed.get("name", f"node{number}"), "annotations": annotations},
        "spec": spec,
    }


class SmallApi:
    """Nodes: get, list in pages, watch, create, replace, delete, and patch of the status."""

    def __init__(self) -> None:
        self.nodes: dict[str, dict[str, Any]] = {}
        self.events: list[tuple[int, str, dict[str, Any]]] = []
        self.version = 100
        self.changed = threading.Condition()
        self.patches: list[dict[str, Any]] = []
        self.authorizations: list[str] = []
        api = self

        class Handler(_Handler):
            def answer(self, body: bytes) -> None:
                api.authorizations.append(self.headers.get("Authorization", ""))
                api.handle(self, body)

        self._server = _serve(Handler)
        self.port = self._server.server_address[1]
        self.tls: ssl.SSLContext | None = None

    def handle(self, handler: _Handler, body: bytes) -> None:
        parts = urlsplit(handler.path)
        query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        name = parts.path.removeprefix("/api/v1/nodes").strip("/").removesuffix("/status")
        if parts.path.startswith("/api/v1/namespaces/"):
            handler.send_json(200, {"spec": {"nodeName": "node1"}})
        elif "watch" in query:
            self._watch(handler, int(query["resourceVersion"]), float(query["timeoutSeconds"]))
        elif not name and handler.command == "GET":
            self._list(handler, int(query.get("limit", 500)), query.get("continue", ""))
        elif name not in self.nodes:
            handler.send_json(404, {"kind": "Status", "code": 404, "message": f'nodes "{name}" not found'})
        else:
            if handler.command == "PATCH":
                self._patch(name, json.loads(body))
            handler.send_json(200, self.nodes[name])

    def _list(self, handler: _Handler, limit: int, token: str) -> None:
        with self.changed:
            start = int(token.partition("/")[2] or 0)
            version = token.partition("/")[0] or str(self.version)
            items = list(self.nodes.values())
        metadata = {"resourceVersion": version}
        if start + limit < len(items):
            metadata["continue"] = f"{version}/{start + limit}"
        handler.send_json(200, {"kind": "NodeList", "metadata": metadata, "items": items[start : start + limit]})

    def _watch(self, handler: _Handler, version: int, seconds: float) -> None:
        handler.start_stream()
        until = time.monotonic() + seconds
        at = 0
        while (left := until - time.monotonic()) > 0:
            with self.changed:
                self.changed.wait_for(lambda at=at: len(self.events) > at, min(left, 0.2))  # type: ignore[misc]
                new, at = self.events[at:], len(self.events)
            for number, kind, value in new:
                if number > version:
                    handler.send_line({"type": kind, "object": value})
            bookmark = {"kind": "Node", "metadata": {"resourceVersion": str(self.version)}}
            handler.send_line({"type": "BOOKMARK", "object": bookmark})
        handler.end_stream()

    def _change(self, kind: str, value: dict[str, Any]) -> None:
        with self.changed:
            self.version += 1
            value = json.loads(json.dumps(value))
            value["metadata"].update(resourceVersion=str(self.version), creationTimestamp="2026-01-01T00:00:00Z")
            name = value["metadata"]["name"]
            if kind == "DELETED":
                self.nodes.pop(name, None)
            else:
                self.nodes[name] = value
            self.events.append((self.version, kind, value))
            self.changed.notify_all()

    def _patch(self, name: str, patch: dict[str, Any]) -> None:
        self.patches.append(patch)
        node = json.loads(json.dumps(self.nodes[name]))
        annotations = node["metadata"].setdefault("annotations", {})
        annotations.update(patch.get("metadata", {}).get("annotations", {}))
        for condition in patch.get("status", {}).get("conditions", []):
            conditions = node.setdefault("status", {}).setdefault("conditions", [])
            conditions[:] = [one for one in conditions if one["type"] != condition["type"]] + [condition]
        self._change("MODIFIED", node)

    # -- the same for every API that tests use ----------------------------------------------------------------------

    def put(self, node: dict[str, Any]) -> None:
        """Create a node, or replace it."""
        self._change("MODIFIED" if node["metadata"]["name"] in self.nodes else "ADDED", node)

    def delete(self, name: str) -> None:
        """Delete a node."""
        self._change("DELETED", self.nodes[name])

    def get(self, name: str) -> dict[str, Any]:
        """Return a node."""
        return self.nodes[name]

    def close(self) -> None:
        """End it."""
        _stop(self._server)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, body: bytes) -> None:
        raise NotImplementedError

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with contextlib.suppress(ConnectionError):
            self.answer(body)

    do_PATCH = do_GET  # noqa: N815 - what http.server calls

    def log_message(self, *args: Any) -> None:
        pass

    def send_json(self, status: int, value: Any, headers: dict[str, str] = {}) -> None:  # noqa: B006 - only read
        self.send_bytes(status, json.dumps(value).encode(), headers)

    def send_bytes(self, status: int, body: bytes, headers: dict[str, str] = {}) -> None:  # noqa: B006 - only read
        self.send_response(status)
        for key, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, text)
        self.end_headers()
        self.wfile.write(body)

    def start_stream(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def send_line(self, value: Any) -> None:
        self.send_piece(json.dumps(value).encode() + b"\n")

    def send_piece(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def end_stream(self) -> None:
        self.wfile.write(b"0\r\n\r\n")


def _serve(handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # clients go away in the middle of things here

    server = Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return server


def _stop(server: ThreadingHTTPServer) -> None:
    server.shutdown()
    server.server_close()


@dataclass
class Fault:
    """What to do with the next `times` requests that `matches`: `status` answers so; `half` cuts the answer, or a
    watch's next line, in the middle; `hang` never answers, or sends nothing more of a watch; `drop` closes."""

    kind: str
    matches: str  # a piece of `VERB PATH?QUERY`
    times: int = 1
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    reason: str = "made to fail"


class FaultProxy:
    """A plain HTTP proxy in front of an API at a port of the loopback."""

    def __init__(self, port: int, *, tls: ssl.SSLContext | None = None) -> None:
        self._upstream, self._tls = port, tls
        self.faults: list[Fault] = []
        self.requests: list[tuple[float, str]] = []
        self.away = False
        self.released = threading.Event()
        proxy = self

        class Handler(_Handler):
            def answer(self, body: bytes) -> None:
                proxy.handle(self, body)

        self._server = _serve(Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def add(self, kind: str, matches: str, **more: Any) -> Fault:
        """Have requests fail from now on."""
        fault = Fault(kind, matches, **more)
        self.faults.append(fault)
        return fault

    def count(self, piece: str) -> int:
        """How many requests so far had that piece in `VERB PATH?QUERY`."""
        return sum(piece in text for _, text in list(self.requests))

    def _fault(self, text: str, kinds: tuple[str, ...]) -> Fault | None:
        for fault in list(self.faults):
            if fault.times > 0 and fault.kind in kinds and fault.matches in text:
                fault.times -= 1
                return fault
        return None

    def handle(self, handler: _Handler, body: bytes) -> None:
        text = f"{handler.command} {handler.path}"
        self.requests.append((time.monotonic(), text))
        handler.close_connection = True
        streaming = "watch=1" in text
        if self.away or self._fault(text, ("drop",)):
            return
        fault = self._fault(text, ("status",) if streaming else ("status", "hang"))
        if fault is not None and fault.kind == "hang":
            self.released.wait()
        elif fault is not None:
            value = {"kind": "Status", "code": fault.status, "message": fault.reason, "reason": "Made"}
            handler.send_json(fault.status, value, {"Connection": "close", **fault.headers})
        else:
            self._forward(handler, text, body, streaming=streaming)

    def _forward(self, handler: _Handler, text: str, body: bytes, *, streaming: bool) -> None:
        connection: http.client.HTTPConnection
        if self._tls:
            connection = http.client.HTTPSConnection("127.0.0.1", self._upstream, context=self._tls, timeout=60)
        else:
            connection = http.client.HTTPConnection("127.0.0.1", self._upstream, timeout=60)
        headers = {key: value for key, value in handler.headers.items() if key not in ("Host", "Content-Length")}
        with contextlib.closing(connection):
            connection.request(handler.command, handler.path, body or None, headers)
            response = connection.getresponse()
            if streaming and response.status == 200:
                self._stream(handler, text, response)
                return
            data = response.read()
            if self._fault(text, ("half",)):
                handler.send_bytes(response.status, data[: len(data) // 2], {"Content-Length": str(len(data))})
            else:
                handler.send_bytes(response.status, data, {"Connection": "close"})

    def _stream(self, handler: _Handler, text: str, response: http.client.HTTPResponse) -> None:
        handler.start_stream()
        while line := response.readline():
            if self.away:
                return
            bookmark = b'"BOOKMARK"' in line
            fault = None if bookmark else self._fault(text, ("half", "hang", "error"))
            if fault is None:
                handler.send_piece(line)
            elif fault.kind == "half":
                handler.send_piece(line[: len(line) // 2])
                return
            elif fault.kind == "error":
                handler.send_line({"type": "ERROR", "object": {"code": fault.status, "message": fault.reason}})
                return
            else:
                self.released.wait()
                return
        handler.end_stream()

    def close(self) -> None:
        """End it, and all that hangs."""
        self.released.set()
        _stop(self._server)
