"""One long flow of datagrams and one of TCP between two pods, which shows whether anything broke it meanwhile."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from testbed.errors import LabError
from testbed.labs import interpreter
from testbed.labs.base import Place, Process
from testbed.probes.flows import ECHO_PORT, HTTP_PORT, Target

EVERY = 0.01
"""Seconds between two datagrams, and between two pieces on the TCP connection."""
END_SECONDS = 15.0

# Runs at the source until its standard input ends, then waits for the last answers.  The connection is a POST whose
# body comes in small pieces: the server answers how much of it has arrived once that is all.
_SENDER = r"""
import json, select, socket, struct, sys, time
target, echo, http = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
every, wait = float(sys.argv[4]), float(sys.argv[5])
family = socket.AF_INET6 if ":" in target else socket.AF_INET
udp, tcp, total = socket.socket(family, socket.SOCK_DGRAM), socket.socket(family), 1 << 20
said = {"sent": 0, "answered": 0, "received": 0, "total": total, "error": ""}
def answers(block):
    while select.select([udp], [], [], block)[0]:
        try:
            waiting.discard(udp.recv(64))
        except OSError as error:
            said["error"] = said["error"] or f"UDP: {error}"
        block = 0
waiting = set()
try:
    udp.connect((target, echo))
    tcp.settimeout(wait)
    tcp.connect((target, http))
    tcp.sendall(f"POST / HTTP/1.0\r\nContent-Length: {total}\r\n\r\n".encode())
    print("flowing", flush=True)
    written = 0
    due = time.monotonic()
    while not select.select([sys.stdin], [], [], 0)[0]:
        due = max(due + every, time.monotonic() - every)
        said["sent"] += 1
        data = struct.pack("=Q", said["sent"])
        waiting.add(data)
        try:
            udp.send(data)
        except OSError as error:
            said["error"] = said["error"] or f"UDP: {error}"
        if written + 8 < total:
            tcp.sendall(data)
            written += 8
        answers(max(0.0, due - time.monotonic()))
    tcp.sendall(bytes(total - written))
    answer = b""
    while piece := tcp.recv(65535):
        answer += piece
    said["received"] = json.loads(answer.partition(b"\r\n\r\n")[2])["received"]
    end = time.monotonic() + wait
    while waiting and time.monotonic() < end:
        answers(0.05)
except (OSError, ValueError, KeyError) as error:
    said["error"] = f"TCP: {error or type(error).__name__}"
said["answered"] = said["sent"] - len(waiting)
print(json.dumps(said))
"""


@dataclass
class Stream:
    """What became of the flows, once `end` was called: `error` says why the connection broke."""

    process: Process
    where: str
    sent: int = 0
    answered: int = 0
    received: int = 0
    total: int = 0
    error: str = ""

    @property
    def lost(self) -> int:
        """Datagrams without an answer."""
        return self.sent - self.answered

    def end(self) -> Stream:
        """Stop sending, wait for what is under way, and say what became of it. Raises LabError."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        text = self.process.stdout.read()
        try:
            found = json.loads(text)
            self.sent, self.answered = int(found["sent"]), int(found["answered"])
            self.received, self.total, self.error = int(found["received"]), int(found["total"]), str(found["error"])
        except (ValueError, KeyError, TypeError) as error:
            raise LabError(f"the sender ended without saying how: {text[-300:]!r}", where=self.where) from error
        return self


@contextmanager
def streaming(source: Place, target: Target) -> Iterator[Stream]:
    """Datagrams and a connection from a pod to another one's address, from now until `end` or the block's end.

    Raises LabError where they do not get under way.
    """
    words = [str(target), str(ECHO_PORT), str(HTTP_PORT), f"{EVERY:g}", f"{END_SECONDS:g}"]
    process = source.spawn([interpreter(), "-I", "-S", "-c", _SENDER, *words], stdin=True)
    assert process.stdout is not None
    try:
        first = process.stdout.readline()
        if first.strip() != b"flowing":
            raise LabError(f"no connection to {target}: {(first + process.stdout.read())[-300:]!r}", where=source.name)
        yield Stream(process, source.name)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(timeout=5)
