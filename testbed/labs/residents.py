"""The caller's side of residents: processes that are on a lab's nodes already, and run commands there.

Entering a node anew takes four programs and several times as long as most commands, in a guest kernel tens of times.
So a run that will ask much of a node leaves a process there first (`settle`).  It ends with this process, and whatever
it runs with it, but for daemons.  Where there is none, or it has died, nodes are entered as ever.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import selectors
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, NoReturn, Protocol

from testbed.labs import interpreter

MESSAGE_BYTES = 100_000
"""The longest message that surely fits into a socket; longer ones go another way."""

END_SECONDS = 2.0

FILE_SECONDS = 60.0
"""How long a file, or a daemon's start, may take; what is on the node may have stopped its resident."""

PROGRAM = ("-I", "-S", "-c")
"""Python's options for a program that needs nothing but the interpreter: the resident's own will do."""


class Enterable(Protocol):
    """A node as far as residents need it."""

    @property
    def pid(self) -> int:
        """The pid by which it is entered."""
        ...

    @property
    def holder_pid(self) -> int:
        """The pid of its lab's first process."""
        ...

    def entering(self, *, stay: bool = False) -> list[str]:
        """The words that put a command there."""
        ...


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended; `code` is negative for a signal, None where it had to be killed for lack of time."""

    code: int | None
    out: bytes
    err: bytes


class Gone(Exception):
    """There is no resident any more, or this is nothing for one."""


class Resident:
    """One node's resident. Every method raises Gone where it cannot do it, and nothing was done then."""

    def __init__(self, node: Enterable, environment: Mapping[str, str]) -> None:
        self._numbers = itertools.count()
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        program = os.memfd_create("resident")  # the checkout may lie where a lab cannot read it
        os.write(program, resources.files("testbed.labs").joinpath("resident.py").read_bytes())
        source = f"/proc/self/fd/{program}"
        try:
            self._process = subprocess.Popen(
                [*node.entering(stay=True), interpreter(), *PROGRAM[:2], source, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), program],
                env=dict(environment),
                cwd="/",
                start_new_session=True,  # a terminal's Ctrl-C is not for it: it is needed to the end
            )
        except OSError:
            self._sock.close()
            raise
        finally:
            theirs.close()
            os.close(program)

    def close(self) -> None:
        """End it, and all that it runs but daemons."""
        self._sock.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            # Who entered the node stops with the resident that it is the parent of, and the lab could not end then.
            self._process.kill()
            self._process.wait()

    def _send(self, order: Mapping[str, Any], descriptors: Sequence[int]) -> None:
        data = json.dumps(order).encode()
        if len(data) > MESSAGE_BYTES:
            raise Gone
        try:
            socket.send_fds(self._sock, [data], descriptors)
        except OSError as error:
            raise Gone from error

    def _give_up(self) -> NoReturn:
        """Ask nothing of it any more."""
        self._sock.close()
        raise Gone

    def run(
        self, argv: Sequence[str], *, netns: str, env: Mapping[str, str], stdin: bytes | None, timeout: float
    ) -> Ended:
        """Run a command to its end."""
        number = next(self._numbers)
        program = argv[0] == interpreter() and tuple(argv[1:4]) == PROGRAM
        order = {"what": "run", "number": number, "argv": list(argv), "env": dict(env), "netns": netns}
        with _Pipes(writing=stdin is not None) as pipes:
            self._send(order | {"program": program}, pipes.theirs)
            pipes.let_go()
            try:
                if not pipes.communicate(stdin or b"", time.monotonic() + timeout):
                    return Ended(None, pipes.out, pipes.err)
            finally:
                if not pipes.status:
                    with contextlib.suppress(Gone):
                        self._send({"what": "kill", "number": number}, [])
            # Without a status the resident died, and with it what it ran.
            code = os.waitstatus_to_exitcode(int(pipes.status)) if pipes.status else -9
            return Ended(code, pipes.out, pipes.err)

    def start(self, argv: Sequence[str], *, netns: str, env: Mapping[str, str], log: str, pidfile: str) -> int:
        """Start a daemon; returns its pid on the node."""
        order = {"what": "start", "argv": list(argv), "env": dict(env), "netns": netns, "log": log, "pidfile": pidfile}
        reader, writer = os.pipe()
        with os.fdopen(reader, "rb") as answer:
            try:
                self._send(order, [writer])
            finally:
                os.close(writer)
            ready = select.select([answer], [], [], FILE_SECONDS)[0]
            text = answer.read() if ready else b""
        if not ready:
            self._give_up()
        if not text:
            raise Gone
        return int(text)

    def read(self, path: str) -> bytes:
        """Return a file. Raises OSError where it cannot be read."""
        with _Pipes(writing=False) as pipes:
            self._send({"what": "read", "path": path}, [pipes.theirs[1], pipes.theirs[3]])
            pipes.let_go()
            if not pipes.communicate(b"", time.monotonic() + FILE_SECONDS):
                self._give_up()
            _raise_for(pipes.status, path)
            return pipes.out

    def write(self, path: str, data: bytes, mode: int) -> None:
        """Write a file, making its folder where it is missing. Raises OSError."""
        with _Pipes(writing=True) as pipes:
            self._send({"what": "write", "path": path, "mode": mode}, [pipes.theirs[0], pipes.theirs[3]])
            pipes.let_go()
            if not pipes.communicate(data, time.monotonic() + FILE_SECONDS):
                self._give_up()
            _raise_for(pipes.status, path)


def _raise_for(status: bytes, path: str) -> None:
    if not status:
        raise Gone
    if int(status):
        raise OSError(int(status), os.strerror(int(status)), path)


class _Pipes:
    """A command's standard input, output and error, and where its status comes: our ends and theirs."""

    def __init__(self, *, writing: bool) -> None:
        self.out = self.err = self.status = b""
        self._open: set[int] = set()
        if writing:
            stdin, self._into = self._pipe()
        else:
            stdin, self._into = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), -1
            self._open.add(stdin)
        pairs = [self._pipe() for _ in range(3)]
        self._from = [reader for reader, _ in pairs]
        self.theirs = [stdin, *(writer for _, writer in pairs)]

    def _pipe(self) -> tuple[int, int]:
        reader, writer = os.pipe()
        self._open |= {reader, writer}
        return reader, writer

    def __enter__(self) -> _Pipes:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open:
            os.close(descriptor)

    def _close(self, descriptor: int) -> None:
        os.close(descriptor)
        self._open.discard(descriptor)

    def let_go(self) -> None:
        """Close the ends that somebody else has by now."""
        for descriptor in self.theirs:
            self._close(descriptor)

    def communicate(self, data: bytes, deadline: float | None) -> bool:
        """Write and read everything; False where the deadline passed before that."""
        gathered: dict[int, list[bytes]] = {descriptor: [] for descriptor in self._from}
        rest = memoryview(data)  # which is cut without being copied: a program of 50 MB goes this way
        try:
            with selectors.PollSelector() as selector:
                for descriptor in self._from:
                    selector.register(descriptor, selectors.EVENT_READ)
                if self._into >= 0:
                    os.set_blocking(self._into, False)
                    selector.register(self._into, selectors.EVENT_WRITE)
                while selector.get_map():
                    left = None if deadline is None else deadline - time.monotonic()
                    if left is not None and left <= 0:
                        return False
                    for key, _ in selector.select(left):
                        if key.fd == self._into:
                            rest = self._write(selector, rest)
                        elif piece := os.read(key.fd, 1 << 16):
                            gathered[key.fd].append(piece)
                        else:
                            selector.unregister(key.fd)
        finally:
            self.out, self.err, self.status = (b"".join(gathered[descriptor]) for descriptor in self._from)
        return True

    def _write(self, selector: selectors.BaseSelector, data: memoryview) -> memoryview:
        """Write what fits, and close at the end; returns what is left."""
        try:
            data = data[os.write(self._into, data[: 1 << 16]) :] if data else data
        except BrokenPipeError:
            data = data[:0]  # who does not want it all need not take it
        if not data:
            selector.unregister(self._into)
            self._close(self._into)
        return data


# --- who is where


_residents: dict[tuple[int, int], Resident] = {}
_lock = threading.Lock()


def _key(node: Enterable) -> tuple[int, int]:
    return node.holder_pid, node.pid


def settle(node: Enterable, environment: Mapping[str, str]) -> None:
    """Leave a resident on a node, unless there is one."""
    with _lock:
        if _key(node) not in _residents:
            _residents[_key(node)] = Resident(node, environment)


def resident_of(node: Enterable) -> Resident | None:
    """The node's resident; None where nobody left one."""
    return _residents.get(_key(node))


def leave(node: Enterable) -> None:
    """End a node's resident, if there is one."""
    with _lock:
        resident = _residents.pop(_key(node), None)
    if resident is not None:
        resident.close()
