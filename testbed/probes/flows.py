"""Test traffic: pings, UDP flows and HTTP requests that carry a nonce, so that a capture can tell whose they are."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from testbed import journal
from testbed.errors import LabError
from testbed.labs import interpreter
from testbed.labs.base import Place

BULK_PORTS = range(5201, 5300)
"""Destination ports of bulk flows; the always-on captures leave them out."""

ECHO_PORT, HTTP_PORT = 7, 80
"""Where the lab's test application answers."""

ICMP_HEADERS = 28
"""Bytes of the IPv4 and ICMP headers in front of a ping's payload."""

ICMP6_HEADERS = 48
"""The same for IPv6."""

Target = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True)
class Nonce:
    """Eight random bytes that a check puts into its own packets, and into no others'."""

    value: bytes

    @classmethod
    def new(cls) -> Nonce:
        """A fresh one."""
        return cls(secrets.token_bytes(8))

    @property
    def hex(self) -> str:
        """The bytes as `ping -p` wants them."""
        return self.value.hex()


@dataclass(frozen=True, slots=True)
class Ping:
    """How a ping ended.

    `local_mtu` is what the sender's own kernel refused a packet with, `path_mtu` what a router on the way said; 0
    where none did. `errors` counts error messages of either sort.
    """

    sent: int
    received: int
    ttls: tuple[int, ...]
    errors: int
    local_mtu: int
    path_mtu: int
    seconds: float
    output: str

    @property
    def lost(self) -> int:
        """Requests without an answer."""
        return self.sent - self.received


_SUMMARY = re.compile(r"(\d+) packets transmitted, (\d+) received(?:, \+(\d+) errors)?")
_TTL = re.compile(r"\bttl=(\d+)")
_LOCAL_MTU = re.compile(r"local error: message too long, mtu[=:]\s?(\d+)")
_PATH_MTU = re.compile(r"Frag needed and DF set \(mtu = (\d+)\)|Packet too big: mtu=(\d+)")


def ping(
    source: Place,
    target: Target,
    *,
    nonce: Nonce | None = None,
    count: int = 1,
    interval: float = 0.05,
    size: int = 56,
    dont_fragment: bool | None = False,
    wait: int = 2,
    mark: int = 0,
) -> Ping:
    """Ping from a node or pod. `size` is the payload's in bytes; `wait` the seconds for an answer to come at all.

    `mark` is what the kernel marks the packets with, on their way out of that node or pod; 0 for no mark.

    With `dont_fragment` nobody may fragment it, with None everybody, else the sender alone (DF is set where it fits).

    Once there was one, ping waits for the last no longer than an `interval`, or twice the longest round trip: too
    short an interval makes late answers of a busy machine look lost.

    Losses are an answer, not an error. Raises LabError when ping itself cannot run.
    """
    argv = ["ping", "-n", "-c", str(count), "-i", f"{interval:g}", "-s", str(size), "-W", str(wait)]
    nonce = nonce or Nonce.new()  # the report says where every ping was seen, not only those that a check looks for
    argv += ["-p", nonce.hex]
    if mark:
        argv += ["-m", str(mark)]
    if dont_fragment is not False:
        argv += ["-M", "do" if dont_fragment else "dont"]
    flow = _noted(f"{count} × ping, {size} bytes", source, target, nonce.value)
    result = source.run([*argv, str(target)], check=False, timeout=count * interval + wait + 20)
    answer = parse_ping(result.stdout + result.stderr, source.name, result.seconds, count)
    flow.size, flow.dont_fragment, flow.lost = size, dont_fragment is True, answer.lost
    flow.answered = f"{answer.received} of {answer.sent}"
    return answer


def pinged(source: Place, target: Target, count: int = 1, *, size: int = 56, wait: int = 2) -> Nonce:
    """Ping, and have every request answered; a capture finds them by the nonce. Options as of `ping`.

    Raises AssertionError with what ping said where an answer is missing, LabError when ping itself cannot run.
    """
    nonce = Nonce.new()
    answer = ping(source, target, nonce=nonce, count=count, size=size, wait=wait)
    if answer.lost:
        raise AssertionError(answer.output)
    return nonce


def _noted(what: str, source: Place, target: Target, *marks: bytes) -> journal.Flow:
    """A flow about to be sent, in the journal of the check where one is followed."""
    flow = journal.Flow(what, source.name, str(target), tuple(filter(None, marks)))
    if notes := journal.current():
        notes.flow(flow)
    return flow


def parse_ping(text: str, where: str, seconds: float = 0.0, count: int = 1) -> Ping:
    """Read what iputils' ping prints when asked for so many requests. Raises LabError where there is no summary."""
    if "ping: connect: " in text:  # the kernel has no route: ping gives up before the first one, and all are lost
        return Ping(count, 0, (), 1, 0, 0, seconds, text)
    summary = _SUMMARY.search(text)
    if summary is None:
        raise LabError(f"ping did not run: {text.strip()[-300:]}", where=where)
    local_mtu, path_mtu = _LOCAL_MTU.search(text), _PATH_MTU.search(text)
    return Ping(
        sent=int(summary[1]),
        received=int(summary[2]),
        ttls=tuple(int(ttl) for ttl in _TTL.findall(text)),
        errors=int(summary[3] or 0),
        local_mtu=int(local_mtu[1]) if local_mtu else 0,
        path_mtu=int(path_mtu[1] or path_mtu[2]) if path_mtu else 0,
        seconds=seconds,
        output=text,
    )


# Runs on the node, in whatever interpreter is there: one datagram from each of many sockets, no more than 32 of them
# unanswered at a time, so that none is lost for want of room in the receiver's queue.
_UDP_SENDER = r"""
import json, select, socket, sys, time
target, port, count, wait = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[5])
payload = bytes.fromhex(sys.argv[4])
flows, poller, waiting, answered = {}, select.poll(), 0, 0
def take(block):
    global waiting, answered
    for fd, _ in poller.poll(block):
        waiting -= 1
        answered += 1
        sock, flow = flows[fd]
        try:
            flow["reply"] = sock.recv(65535).decode("latin-1")
        except OSError as error:
            flow["error"] = error.strerror
        poller.unregister(fd)
for number in range(count):
    sock = socket.socket(socket.AF_INET6 if ":" in target else socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect((target, port))
    flows[sock.fileno()] = sock, {"sport": sock.getsockname()[1], "reply": None, "error": None}
    poller.register(sock, select.POLLIN)
    sock.send(payload + number.to_bytes(2, "big"))
    waiting += 1
    if waiting >= 32:
        take(50)
        waiting = min(waiting, 24) if waiting >= 32 else waiting
end = time.monotonic() + wait
while (left := len(flows) - answered) and time.monotonic() < end:
    take(max(1, int(1000 * (end - time.monotonic()))))
    if len(flows) - answered < left:  # as long as there are answers the others may be on their way
        end = time.monotonic() + wait
print(json.dumps([flow for _, flow in flows.values()]))
"""

_HTTP_CLIENT = r"""
import json, socket, sys
target, port, path, wait = sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
sock = socket.socket(socket.AF_INET6 if ":" in target else socket.AF_INET)
sock.bind(("", 0))
sport = sock.getsockname()[1]
try:
    sock.settimeout(wait)
    sock.connect((target, port))
    host = f"[{target}]" if ":" in target else target
    sock.sendall(f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
    answer = b""
    while piece := sock.recv(65535):
        answer += piece
except OSError as error:
    print(json.dumps({"error": str(error), "sport": sport}))
else:
    print(json.dumps({"sport": sport, "answer": answer.decode("latin-1")}))
"""


@dataclass(frozen=True, slots=True)
class UdpFlow:
    """One datagram from a port of its own, and its answer (None: there was none)."""

    sport: int
    reply: str | None
    error: str | None


def udp_flows(
    source: Place,
    target: Target,
    *,
    count: int,
    nonce: Nonce,
    port: int = ECHO_PORT,
    wait: float = 2.0,
) -> tuple[UdpFlow, ...]:
    """Send one datagram from each of `count` sockets; wait for the answers until for `wait` seconds none came.

    Raises LabError when the sender cannot run.
    """
    noted = _noted(f"{count} × UDP to port {port}", source, target, nonce.value)
    noted.protocol, noted.port = "udp", port
    answer = _script(source, _UDP_SENDER, str(target), str(port), str(count), nonce.hex, f"{wait:g}", wait=wait)
    try:
        flows = tuple(UdpFlow(flow["sport"], flow["reply"], flow["error"]) for flow in answer)
        answered = sum(flow.reply is not None for flow in flows)
        noted.answered, noted.lost = f"{answered} of {count}", count - answered
        return flows
    except (TypeError, KeyError) as error:
        raise LabError(f"the UDP sender answered in another form: {answer!r}", where=source.name) from error


@dataclass(frozen=True, slots=True)
class HttpReply:
    """An answer of the test application. `error` says why there is none; `peer` is the client as it was seen."""

    error: str
    status: int
    sport: int
    facts: Mapping[str, Any]

    @property
    def pod(self) -> str:
        """Which pod answered."""
        return str(self.facts.get("pod", ""))

    @property
    def peer(self) -> Target | None:
        """The client's address as the server saw it."""
        text = str(self.facts.get("peer", ""))
        return ip_address(text if text.count(":") > 1 else text.partition(":")[0]) if text else None


def http_get(source: Place, target: Target, *, port: int = HTTP_PORT, path: str = "/", wait: float = 3.0) -> HttpReply:
    """Ask the test application who it is. A refused or lost connection is an answer; raises LabError for garbage."""
    noted = _noted(f"HTTP to port {port}", source, target)
    noted.protocol, noted.port = "tcp", port
    answer = _script(source, _HTTP_CLIENT, str(target), str(port), path, f"{wait:g}", wait=wait)
    if sport := answer.get("sport"):
        # No byte of a segment's payload is ours until the connection stands: its ports tell, one way and the other.
        here, there = sport.to_bytes(2, "big"), port.to_bytes(2, "big")
        noted.marks = here + there, there + here
    noted.answered, noted.lost = answer.get("error") or "1 of 1", int("error" in answer)
    if "error" in answer:
        return HttpReply(answer["error"], 0, 0, {})
    try:
        head, _, body = answer["answer"].partition("\r\n\r\n")
        return HttpReply("", int(head.split()[1]), answer["sport"], json.loads(body))
    except (KeyError, IndexError, ValueError) as error:
        raise LabError(f"the answer is no HTTP with JSON: {str(answer)[:300]}", where=source.name) from error


def _script(source: Place, script: str, *argv: str, wait: float) -> Any:
    result = source.run([interpreter(), "-I", "-S", "-c", script, *argv], timeout=wait + 20)
    try:
        return json.loads(result.stdout)
    except ValueError as error:
        raise LabError(f"the sender printed no JSON: {result.stdout[:300]!r}", where=source.name) from error
