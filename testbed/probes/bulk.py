"""Bulk flows between two places, for figures: TCP by one or many connections, datagrams at a steady pace.

A `Link` keeps a receiver and a sender running at its ends, so that flows of several links can take turns: on a machine
that has other work only figures of the same moments compare.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from testbed.errors import LabError
from testbed.labs import interpreter
from testbed.labs.base import Place, Process
from testbed.probes.flows import BULK_PORTS, Target

GIB = 1 << 30
TICK = 0.01

# Answers each connection: one that begins with B is read to its end, and told how much that was; one that begins with C
# asks how many datagrams of a flow have come, and is told so.  It ends with its standard input.
_RECEIVER = r"""
import os, resource, selectors, socket, sys
address, port = sys.argv[1], int(sys.argv[2])
family = socket.AF_INET6 if ":" in address else socket.AF_INET
tcp = socket.create_server((address, port), family=family, backlog=64)
tcp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 19)
udp = socket.socket(family, socket.SOCK_DGRAM)
udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
udp.bind((address, port))
print("listening", flush=True)
buffer, counted, open_ = bytearray(1 << 18), {}, {}
selector = selectors.DefaultSelector()
for one in (sys.stdin, tcp, udp):
    selector.register(one, selectors.EVENT_READ)
while True:
    for key, _ in selector.select():
        sock = key.fileobj
        if sock is sys.stdin:
            sys.exit()
        if sock is tcp:
            new = tcp.accept()[0]
            open_[new] = None
            selector.register(new, selectors.EVENT_READ)
        elif sock is udp:
            flow = udp.recv_into(buffer) and bytes(buffer[:8])
            counted[flow] = counted.get(flow, 0) + 1
        else:
            try:
                size = sock.recv_into(buffer)
            except OSError:
                size = 0
            if open_[sock] is None and size:
                open_[sock] = -1 if buffer[0] == 67 else 0
                if open_[sock] < 0:
                    sock.sendall(b"%d\n" % counted.get(bytes(buffer[1:9]), 0))
            if size and open_[sock] >= 0:
                open_[sock] += size
                continue
            if open_[sock] and open_[sock] > 0:
                used = resource.getrusage(resource.RUSAGE_SELF)
                try:
                    sock.sendall(b"%d %f\n" % (open_[sock], used.ru_utime + used.ru_stime))
                except OSError:
                    pass
            selector.unregister(sock)
            sock.close()
            del open_[sock]
"""

# Takes one order a line: {"streams", "seconds"} or {"datagrams", "size", "pace"}; answers in JSON.
_SENDER = r"""
import json, os, resource, selectors, socket, struct, sys, time
address, port = sys.argv[1], int(sys.argv[2])
family = socket.AF_INET6 if ":" in address else socket.AF_INET
data = b"B" * (1 << 17)
def used():
    own = resource.getrusage(resource.RUSAGE_SELF)
    return own.ru_utime + own.ru_stime
def connect():
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 19)  # what waits there when the time is over takes time
    sock.settimeout(20)
    sock.connect((address, port))
    return sock
def told(sock):
    text = b""
    while not text.endswith(b"\n"):
        piece = sock.recv(64)
        if not piece:
            raise OSError("the receiver says nothing")
        text += piece
    return text.split()
def tcp(order):
    socks, selector = [connect() for _ in range(order["streams"])], selectors.DefaultSelector()
    for sock in socks:
        sock.setblocking(False)
        selector.register(sock, selectors.EVENT_WRITE)
    before, began = used(), time.perf_counter()
    end = began + order["seconds"]
    while time.perf_counter() < end:
        for key, _ in selector.select(0.1):
            try:
                key.fileobj.send(data)
            except BlockingIOError:
                pass
    said, retransmits = [], 0
    for sock in socks:
        sock.setblocking(True)
        sock.settimeout(20)
        sock.shutdown(socket.SHUT_WR)
    for sock in socks:
        said.append(told(sock))
        retransmits += struct.unpack_from("I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 100)[0]
        sock.close()
    seconds = time.perf_counter() - began
    size = sum(int(one[0]) for one in said)
    return {"bytes": size, "seconds": seconds, "retransmits": retransmits, "cpu": used() - before,
            "theirs": max(float(one[1]) for one in said)}
def udp(order):
    flow, sock = os.urandom(8), socket.socket(family, socket.SOCK_DGRAM)
    sock.connect((address, port))
    payload, began = flow.ljust(order["size"], b"D"), time.perf_counter()
    failed = 0
    for number in range(order["datagrams"]):
        wait = began + number / order["pace"] - time.perf_counter()
        if wait > 0:
            time.sleep(wait)
        try:
            sock.send(payload)
        except OSError:
            failed += 1
    # What is still on its way counts: until nothing has come for a while.
    got, still = -1, 0
    while still < 4:
        with connect() as asking:
            asking.sendall(b"C" + flow)
            now = int(told(asking)[0])
        if now == order["datagrams"]:
            got = now
            break
        got, still = now, still + 1 if now == got else 0
        time.sleep(0.05)
    return {"sent": order["datagrams"], "received": got, "failed": failed}
for line in sys.stdin:
    order = json.loads(line)
    try:
        answer = tcp(order) if "streams" in order else udp(order)
    except OSError as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)
"""


@dataclass(frozen=True, slots=True)
class Bulk:
    """What became of a bulk flow: `cpu` is the processor's seconds of the two processes at its ends."""

    size: int
    seconds: float
    retransmits: int
    cpu: float

    @property
    def rate(self) -> float:
        """Bits a second."""
        return 8 * self.size / self.seconds


@dataclass
class Link:
    """Two places, and the programs at both ends."""

    source: Place
    target: Place
    receiver: Process
    sender: Process
    theirs: float = 0.0  # the receiver's processor time so far

    def _order(self, **order: Any) -> dict[str, Any]:
        assert self.sender.stdin is not None
        assert self.sender.stdout is not None
        where = f"{self.source.name} to {self.target.name}"
        try:
            self.sender.stdin.write(json.dumps(order).encode() + b"\n")
            self.sender.stdin.flush()
            answer: dict[str, Any] = json.loads(self.sender.stdout.readline() or b'{"error": "the sender has ended"}')
        except (OSError, ValueError) as error:
            raise LabError(f"the sender cannot be asked: {error}", where=where) from error
        if "error" in answer:
            raise AssertionError(f"a bulk flow from {where} broke: {answer['error']}")
        return answer

    def tcp(self, *, streams: int, seconds: float) -> Bulk:
        """Send by so many connections for so many seconds. Raises AssertionError where one breaks."""
        answer = self._order(streams=streams, seconds=seconds)
        theirs, self.theirs = answer["theirs"] - self.theirs, answer["theirs"]
        return Bulk(answer["bytes"], answer["seconds"], answer["retransmits"], answer["cpu"] + theirs)

    def lost(self, *, datagrams: int, size: int, pace: int) -> float:
        """Send datagrams of so many bytes of payload, `pace` a second; the share that did not arrive, 0 to 1."""
        answer = self._order(datagrams=datagrams, size=size, pace=pace)
        return 1 - int(answer["received"]) / int(answer["sent"])


@contextmanager
def linked(source: Place, target: Place, address: Target, port: int = BULK_PORTS.start) -> Iterator[Link]:
    """A link from a place to another one, which has that address; its programs end with the block. Raises LabError."""
    words = [str(address), str(port)]
    started: list[Process] = []
    try:
        receiver = target.spawn([interpreter(), "-I", "-S", "-c", _RECEIVER, *words], stdin=True)
        started.append(receiver)
        assert receiver.stdout is not None
        if receiver.stdout.readline() != b"listening\n":
            said = receiver.stderr.read()[-300:] if receiver.stderr else b""
            raise LabError(f"nothing listens for bulk flows: {said!r}", where=target.name)
        started.append(source.spawn([interpreter(), "-I", "-S", "-c", _SENDER, *words], stdin=True))
        yield Link(source, target, receiver, started[1])
    finally:
        for process in reversed(started):
            process.kill()
            process.wait(timeout=5)
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    with suppress(BrokenPipeError):  # an order that nobody has taken
                        stream.close()


def quantile(values: list[float], share: float) -> float:
    """The value below which that share of them lies, 0 to 1."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def best_share(ours: list[Bulk], others: list[Bulk]) -> tuple[float, float]:
    """Throughput and CPU a GiB in proportion to those of others, measured in turn.

    The throughput is that of the best turn, for whatever else a machine does only makes it worse.
    """
    rate = max(one.rate for one in ours) / max(one.rate for one in others)
    return rate, _cpu_per_gib(ours) / _cpu_per_gib(others)


def _cpu_per_gib(flows: list[Bulk]) -> float:
    """The processor's seconds a GiB of them all; some kernels count no less than a tick."""
    return max(TICK, sum(one.cpu for one in flows)) * GIB / sum(one.size for one in flows)
