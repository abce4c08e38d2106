"""Large transfers by TCP to and from the test application, and whether they arrived as they were sent."""

from __future__ import annotations

import json
from dataclasses import dataclass

from testbed.errors import LabError
from testbed.labs import interpreter
from testbed.labs.base import Place
from testbed.probes.flows import BULK_PORTS, HTTP_PORT, Target

MIB = 1 << 20
SLOWEST = 1 << 19
"""Bytes a second below which a transfer is given up."""

# Runs at the source.  The port is one of those that the always-on captures leave out.  With `up` it sends so many bytes
# and compares the digest that the server answers with its own, else it fetches `down` bytes, which are all one letter.
_SENDER = r"""
import hashlib, json, os, random, socket, sys, time
target, port, up, down, wait, segment, first, last = sys.argv[1], *map(int, sys.argv[2:])
said = {"error": "", "size": 0, "whole": False, "seconds": 0.0}
sock = socket.socket(socket.AF_INET6 if ":" in target else socket.AF_INET)
try:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    for local in random.sample(range(first, last), last - first):
        try:
            sock.bind(("", local))
            break
        except OSError:
            pass
    if segment:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, segment)
    sock.settimeout(wait)
    began = time.monotonic()
    sock.connect((target, port))
    ours = hashlib.sha256()
    host = f"[{target}]" if ":" in target else target
    if up:
        sock.sendall(f"POST / HTTP/1.0\r\nHost: {host}\r\nContent-Length: {up}\r\n\r\n".encode())
        block, left = os.urandom(1 << 18), up
        while left:
            piece = memoryview(block)[: min(left, len(block))]
            while piece:
                sent = sock.send(piece)
                ours.update(piece[:sent])
                said["size"] += sent
                piece, left = piece[sent:], left - sent
    else:
        sock.sendall(f"GET /bytes/{down} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
    answer, size, theirs = b"", 0, hashlib.sha256()
    while piece := sock.recv(1 << 18):
        if b"\r\n\r\n" not in answer or up:
            answer += piece
            piece = b"" if up or b"\r\n\r\n" not in answer else answer.partition(b"\r\n\r\n")[2]
        theirs.update(piece)
        size += len(piece)
    said["seconds"] = time.monotonic() - began
    if up:
        told = json.loads(answer.partition(b"\r\n\r\n")[2])
        said["whole"] = (told["received"], told["sha256"]) == (up, ours.hexdigest())
    else:
        for _ in range(down >> 16):
            ours.update(b"f" * (1 << 16))
        ours.update(b"f" * (down & 0xffff))
        said["size"], said["whole"] = size, (size, theirs.hexdigest()) == (down, ours.hexdigest())
except (OSError, ValueError, KeyError) as error:
    said["error"] = f"{error or type(error).__name__} after {said['size']} bytes"
print(json.dumps(said))
"""


@dataclass(frozen=True, slots=True)
class Transfer:
    """What became of a transfer. `error` says why it broke off, `size` is in bytes, `seconds` the whole time.

    `whole` says that both ends have the same SHA-256 of it.
    """

    error: str
    size: int
    whole: bool
    seconds: float

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.size / self.seconds if self.seconds else 0.0


def post(source: Place, target: Target, size: int, *, wait: int = 15, segment: int = 0) -> Transfer:
    """Send so many random bytes to the test application.

    It is given up where nothing moves for `wait` seconds.  `segment` is the most that one packet may carry, in bytes;
    0 for what the path allows.  Raises LabError where the sender cannot run.
    """
    return _transfer(source, target, up=size, wait=wait, segment=segment)


def fetch(source: Place, target: Target, size: int, *, wait: int = 15) -> Transfer:
    """Fetch so many bytes from the test application; see `post`."""
    return _transfer(source, target, down=size, wait=wait)


def _transfer(source: Place, target: Target, *, up: int = 0, down: int = 0, wait: int, segment: int = 0) -> Transfer:
    numbers = (HTTP_PORT, up, down, wait, segment, BULK_PORTS.start, BULK_PORTS.stop)
    argv = [interpreter(), "-I", "-S", "-c", _SENDER, str(target), *map(str, numbers)]
    result = source.run(argv, timeout=(up + down) / SLOWEST + wait + 20)
    try:
        return Transfer(**json.loads(result.stdout))
    except (ValueError, TypeError) as error:
        raise LabError(f"the sender printed no JSON: {result.stdout[:300]!r}", where=source.name) from error
