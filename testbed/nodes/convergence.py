"""How long a change of leases takes to reach the kernels of all nodes."""

from __future__ import annotations

import base64
import json
import os
import select
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import IPv4Network
from typing import TYPE_CHECKING, Any

from testbed.deadline import Deadline
from testbed.errors import LabError
from testbed.labs import interpreter
from testbed.labs.base import Place, Process
from testbed.nodes.etcd import PREFIX, Etcd
from testbed.nodes.madeup import Stranger, key_of

if TYPE_CHECKING:
    from testbed.nodes.deploy import Cluster

START_SECONDS = 20.0

# Prints when the kernel tells of a route to the subnet that it was given: whether it came or went, and the machine's
# clock.  rtnetlink: a header of 16 bytes, struct rtmsg of 12, attributes; RTA_DST 1, RTM_NEWROUTE 24, RTM_DELROUTE 25.
_WATCHER = r"""
import socket, struct, sys, time
wanted, length = socket.inet_aton(sys.argv[1]), int(sys.argv[2])
sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
sock.bind((0, 0x40))
print("watching", flush=True)
while True:
    data, now, at = sock.recv(1 << 16), time.monotonic(), 0
    while at + 16 <= len(data):
        size, kind = struct.unpack_from("IH", data, at)
        if kind in (24, 25) and data[at + 17] == length:
            where = at + 28
            while where + 4 <= at + size:
                long, name = struct.unpack_from("HH", data, where)
                if name == 1 and data[where + 4 : where + 8] == wanted:
                    print("come" if kind == 24 else "gone", now, flush=True)
                where += max(4, long + 3 & ~3)
        at += max(16, size + 3 & ~3)
"""

# Takes [path, body] lines for etcd's JSON gateway; answers with the time at which it asked.
_WRITER = r"""
import http.client, json, sys, time
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=10)
for line in sys.stdin:
    path, body = json.loads(line)
    now = time.monotonic()
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.read()
    print(now if answer.status == 200 else -1, flush=True)
"""


def route_times(
    cluster: Cluster, etcd: Etcd, stranger: Stranger, rounds: int, seconds: float
) -> tuple[list[float], list[float]]:
    """Write and delete a made-up lease so many times: seconds until every member has its route, and until none has.

    What takes longer than `seconds` (scaled) counts as infinite, and ends it. The machines have one clock, so this is
    for labs on one kernel. Raises LabError where etcd does not answer.
    """
    name, value = key_of(PREFIX, stranger.subnet), json.dumps(stranger.lease(cluster))
    added: list[float] = []
    removed: list[float] = []
    with ExitStack() as stack:
        watchers = [stack.enter_context(_watching(member, stranger.subnet)) for member in cluster.members]
        writer = stack.enter_context(_writing(etcd))
        stack.callback(etcd.delete, name)
        for _ in range(rounds):
            added.append(_slowest(watchers, "come", writer.put(name, value), seconds))
            removed.append(_slowest(watchers, "gone", writer.delete(name), seconds))
            if float("inf") in (added[-1], removed[-1]):
                break
    return added, removed


class _Writer:
    """Writes to etcd, and tells when."""

    def __init__(self, process: Process, where: str) -> None:
        self._process, self._where = process, where

    def put(self, key: str, value: str) -> float:
        """Write a key; when that was asked for."""
        return self._ask("/v3/kv/put", {"key": _code(key), "value": _code(value)})

    def delete(self, key: str) -> float:
        """Delete a key; when that was asked for."""
        return self._ask("/v3/kv/deleterange", {"key": _code(key)})

    def _ask(self, path: str, body: dict[str, Any]) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([path, body]).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer or float(answer) < 0:
            raise LabError("etcd does not take a lease", where=self._where)
        return float(answer)


def _code(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


class _Watcher:
    """Reads what one node's kernel tells of the routes to a subnet."""

    def __init__(self, process: Process, where: str) -> None:
        assert process.stdout is not None
        self._descriptor, self._where = process.stdout.fileno(), where
        self._held = b""

    def line(self, seconds: float) -> str:
        """The next line; empty where none comes in time. Raises LabError where the program has ended."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._held:
            if not select.select([self._descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return ""
            data = os.read(self._descriptor, 4096)
            if not data:
                raise LabError("a watcher of routes has ended", where=self._where)
            self._held += data
        line, _, self._held = self._held.partition(b"\n")
        return line.decode()


def _slowest(watchers: list[_Watcher], what: str, began: float, seconds: float) -> float:
    """Seconds until the last of them has said so; infinite where one does not in time."""
    deadline, last = Deadline(seconds), began
    for watcher in watchers:
        word, at = "", 0.0
        while word != what or at < began:
            line = watcher.line(deadline.left)
            if not line:
                return float("inf")
            word, at = line.split()[0], float(line.split()[1])
        last = max(last, at)
    return last - began


@contextmanager
def _watching(place: Place, subnet: IPv4Network) -> Iterator[_Watcher]:
    argv = [interpreter(), "-I", "-S", "-u", "-c", _WATCHER, str(subnet.network_address), str(subnet.prefixlen)]
    with _running(place, argv) as process:
        watcher = _Watcher(process, place.name)
        if watcher.line(START_SECONDS) != "watching":
            raise LabError("routes cannot be watched", where=place.name)
        yield watcher


@contextmanager
def _writing(etcd: Etcd) -> Iterator[_Writer]:
    port = etcd.endpoint.rpartition(":")[2]
    with _running(etcd.node, [interpreter(), "-I", "-S", "-c", _WRITER, port]) as process:
        yield _Writer(process, etcd.node.name)


@contextmanager
def _running(place: Place, argv: list[str]) -> Iterator[Process]:
    process = place.spawn(argv, stdin=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait(timeout=5)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
