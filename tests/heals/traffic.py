"""Datagrams from one pod to another and back, one every few milliseconds, so that a gap shows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from testbed.labs import interpreter
from testbed.labs.base import Place
from tests.heals.heallab import HealLab

#: Seconds between two datagrams.
EVERY = 0.004

#: Runs in the pod until its standard input ends, then waits for the last answers.
_SENDER = """
import json, select, socket, struct, sys, time
target, every = sys.argv[1], float(sys.argv[2])
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
sock.connect((target, 7))
waiting, count, refused, began, end = {}, 0, 0, time.monotonic(), None
due = began
print("sending", flush=True)
while end is None or (waiting and time.monotonic() < end):
    now = time.monotonic()
    if end is None and now >= due:
        due = max(due + every, now - every)
        try:
            sock.send(struct.pack("=Q", count))
        except OSError:
            refused += 1
        waiting[count] = now - began
        count += 1
    watched = [sock] if end else [sock, sys.stdin]
    ready = select.select(watched, [], [], max(0.0, due - time.monotonic()) if end is None else 0.05)[0]
    if sock in ready:
        try:
            waiting.pop(struct.unpack("=Q", sock.recv(64))[0], None)
        except OSError:
            refused += 1
    if sys.stdin in ready:
        end = time.monotonic() + 2.0
print(json.dumps({"sent": count, "lost": sorted(waiting.values()), "refused": refused}))
"""


@dataclass
class Traffic:
    """What became of the datagrams, once it has ended: `lost` are the times at which those without an answer were
    sent, in seconds since the first."""

    sent: int = 0
    lost: tuple[float, ...] = ()
    refused: int = 0
    overrun: int = 0  # of the lost ones, how many reached a socket that was full

    @property
    def missing(self) -> int:
        """How many were lost on the way. One that found a full socket was not: a pod did not come to read it."""
        return max(0, len(self.lost) - self.overrun)

    @property
    def gap(self) -> float:
        """Seconds from the first lost one to the last."""
        return self.lost[-1] - self.lost[0] if self.lost else 0.0

    def __str__(self) -> str:
        first = ", ".join(f"{at:.3f}" for at in self.lost[:20])
        return (
            f"{len(self.lost)} of {self.sent} datagrams lost, sent after {first} s; {self.refused} refused, "
            f"{self.overrun} came to a full socket"
        )

    @staticmethod
    @contextmanager
    def between(lab: HealLab, name: str) -> Iterator[Traffic]:
        """Send from the client to a node's pod while this lasts."""
        made = Traffic()
        client, target = lab.cluster.pod(f"{lab.victim}/client"), lab.cluster.pod(f"{name}/testapp").address
        ends = (client, lab.cluster.pod(f"{name}/testapp"))
        before = sum(map(_overruns, ends))
        words = [interpreter(), "-I", "-S", "-c", _SENDER, str(target), str(EVERY)]
        process = client.spawn(words, stdin=True)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline().strip() == b"sending", process.stderr.read() if process.stderr else ""
            yield made
            process.stdin.close()
            found = json.loads(process.stdout.read())
        finally:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        made.sent, made.lost, made.refused = found["sent"], tuple(found["lost"]), found["refused"]
        made.overrun = sum(map(_overruns, ends)) - before
        assert made.sent > 10, "there was no traffic"


def _overruns(place: Place) -> int:
    """How many datagrams found a full socket in a pod."""
    lines = place.run(["grep", "^Udp:", "/proc/net/snmp"]).stdout.splitlines()
    names, values = (line.split() for line in lines)
    return int(dict(zip(names, values, strict=True))["RcvbufErrors"])
