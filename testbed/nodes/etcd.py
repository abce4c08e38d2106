"""The lab's etcd: started on the control plane node, spoken to from there."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from testbed.errors import LabError
from testbed.labs import interpreter
from testbed.labs.base import Node

PREFIX = "/coreos.com/network"
PORT = 2379

#: Runs on the node: one request to etcd's JSON gateway, read from standard input, answered on standard output.
_REQUEST = """
import base64, http.client, json, sys
path, body = json.load(sys.stdin)
connection = http.client.HTTPConnection("127.0.0.1", 2379, timeout=10)
connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
answer = connection.getresponse()
text = answer.read()
if answer.status != 200:
    sys.exit(f"etcd answered {answer.status}: {text[:300]!r}")
sys.stdout.write(text.decode())
"""


def _code(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _decode(text: str) -> str:
    return base64.b64decode(text).decode()


@dataclass(frozen=True)
class Etcd:
    """The etcd of a lab."""

    node: Node

    @property
    def endpoint(self) -> str:
        """Client URL, as nodes reach it."""
        return f"http://{self.node.spec.ip}:{PORT}"

    def start(self) -> None:
        """Start the server; it answers a moment later."""
        address = self.node.spec.ip
        argv = [
            "etcd",
            "--name=lab",
            "--data-dir=/var/lib/etcd",
            f"--listen-client-urls=http://{address}:{PORT},http://127.0.0.1:{PORT}",
            f"--advertise-client-urls={self.endpoint}",
            "--listen-peer-urls=http://127.0.0.1:2380",
            "--initial-advertise-peer-urls=http://127.0.0.1:2380",
            "--initial-cluster=lab=http://127.0.0.1:2380",
            "--heartbeat-interval=50",
            "--election-timeout=250",
        ]
        self.node.start(argv, name="etcd")

    def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        argv = [interpreter(), "-I", "-S", "-c", _REQUEST]
        answer: dict[str, Any] = json.loads(self.node.run(argv, stdin=json.dumps([path, body])).stdout)
        return answer

    def put(self, key: str, value: str, *, ttl: int = 0) -> None:
        """Set a key, for `ttl` seconds where they are given. Raises CommandError where etcd does not answer."""
        lease = {"lease": self._ask("/v3/lease/grant", {"TTL": ttl})["ID"]} if ttl else {}
        self._ask("/v3/kv/put", {"key": _code(key), "value": _code(value), **lease})

    def ttl(self, key: str) -> tuple[int, int] | None:
        """For how many seconds a key was set, and how many are left; None where it stays or is not there."""
        kvs = self._ask("/v3/kv/range", {"key": _code(key)}).get("kvs", [])
        lease = int(kvs[0].get("lease", 0)) if kvs else 0
        if not lease:
            return None
        answer = self._ask("/v3/lease/timetolive", {"ID": lease})
        return int(answer.get("grantedTTL", 0)), int(answer.get("TTL", 0))

    def put_all(self, values: Mapping[str, str]) -> None:
        """Set many keys, a hundred in a request. Raises CommandError where etcd does not answer."""
        pairs = [{"requestPut": {"key": _code(key), "value": _code(value)}} for key, value in values.items()]
        for start in range(0, len(pairs), 100):
            self._ask("/v3/kv/txn", {"success": pairs[start : start + 100]})

    def delete_all(self, keys: Iterable[str]) -> None:
        """Remove many keys, a hundred in a request."""
        found = [{"requestDeleteRange": {"key": _code(key)}} for key in keys]
        for start in range(0, len(found), 100):
            self._ask("/v3/kv/txn", {"success": found[start : start + 100]})

    def under(self, prefix: str) -> dict[str, str]:
        """Every key below a prefix, with its value."""
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        answer = self._ask("/v3/kv/range", {"key": _code(prefix), "range_end": _code(end)})
        return {_decode(kv["key"]): _decode(kv.get("value", "")) for kv in answer.get("kvs", [])}

    def delete(self, key: str) -> None:
        """Remove a key."""
        self._ask("/v3/kv/deleterange", {"key": _code(key)})

    def wait_ready(self, seconds: float) -> None:
        """Wait until it serves. Raises LabError with the end of its log."""
        script = f"""
import http.client, time
deadline = time.monotonic() + {seconds}
while time.monotonic() < deadline:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", {PORT}, timeout=1)
        connection.request("GET", "/health")
        if b'"true"' in connection.getresponse().read():
            raise SystemExit(0)
    except OSError:
        pass
    time.sleep(0.02)
raise SystemExit(1)
"""
        done = self.node.run([interpreter(), "-I", "-S", "-c", script], check=False, timeout=seconds + 5)
        if done.rc:
            log = self.node.run(["tail", "-n", "15", "/var/log/etcd.log"], check=False).stdout
            raise LabError(f"etcd did not answer within {seconds:.0f} s\n{log}", where=self.node.name)
