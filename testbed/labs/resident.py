"""Runs commands on a node for whoever brought the lab up: one process that is there already.

This file is a program, not a module: `python -I -S SOURCE DESCRIPTOR`, started inside a node.  Entering a node takes
four programs; this enters it once.  The descriptor is one end of a socket that keeps messages apart.  A message is
a JSON object, and the descriptors that go with it:

- `run`: a command, with standard input, output, error, and where to write its status (as waitpid() has it, decimal).
  As a `program` its text is run by a copy of this interpreter, which costs less than a new one.
- `start`: a daemon that outlives this process; its pid goes to `pidfile` and to the only descriptor.
- `read`, `write`: a file, from and to a descriptor; the second one gets 0 or an errno.
- `kill`: ends a command and what it started.

With `netns` (a path on the node) a command is in that network namespace.  Commands end with the socket, daemons do not.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import stat
import sys
from typing import Any

CLONE_NEWNET = 0x40000000
MESSAGE_BYTES, MOST_DESCRIPTORS = 1 << 18, 8
NOT_FOUND, NOT_EXECUTABLE = 127 << 8, 126 << 8  # as a shell exits, in the form of waitpid()

libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def in_netns(path: str) -> Any:
    """Be in a network namespace for a moment, in which children are made."""
    if not path:
        yield
        return
    own = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        enter(path)
        yield
    finally:
        libc.setns(own, CLONE_NEWNET)
        os.close(own)


def enter(path: str) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        if libc.setns(number, CLONE_NEWNET):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), path)
    finally:
        os.close(number)


def say(number: int, text: str) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        os.write(number, text.encode())


# --- commands


def spawn(order: dict[str, Any], standard: tuple[int, int, int], *, daemon: bool = False) -> int:
    actions = [(os.POSIX_SPAWN_DUP2, number, place) for place, number in enumerate(standard)]
    argv = order["argv"]
    with in_netns(order["netns"]):
        # A group of its own, by which all of it can be ended.
        group: dict[str, Any] = {"setsid": True} if daemon else {"setpgroup": 0}
        # What an interpreter ignores from its start on, no command expects to be ignored.
        heard = [signal.SIGPIPE, signal.SIGXFSZ]
        return os.posix_spawnp(argv[0], argv, order["env"], file_actions=actions, setsigdef=heard, **group)


def fork(order: dict[str, Any], standard: tuple[int, int, int]) -> int:
    """Run a program's text in a copy of this process."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        for place, number in enumerate(standard):
            os.dup2(number, place)
        os.closerange(3, 1024)
        if order["netns"]:
            enter(order["netns"])
        os.environ.clear()
        os.environ.update(order["env"])
        sys.argv = ["-c", *order["argv"][5:]]
        code = execute(order["argv"][4])
    finally:
        os._exit(code)


def execute(text: str) -> int:
    """What an interpreter does with `-c`; returns its exit code."""
    names: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
    sys.modules["__main__"].__dict__.update(names)
    try:
        exec(compile(text, "<string>", "exec", dont_inherit=True), names)
        code = 0
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            code = (error.code or 0) & 0xFF
        else:
            sys.stderr.write(f"{error.code}\n")
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    return code


def receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """A message and its descriptors, which no command inherits by chance (socket.recv_fds() forgets to ask for it)."""
    found = array.array("i")
    room = socket.CMSG_SPACE(MOST_DESCRIPTORS * found.itemsize)
    data, ancillary, _, _ = sock.recvmsg(MESSAGE_BYTES, room, socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(content[: len(content) // found.itemsize * found.itemsize])
    return data, found.tolist()


class Resident:
    """Serves one socket until its other end is closed."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.poll = select.poll()
        self.poll.register(sock, select.POLLIN)
        self.running: dict[int, tuple[int, int, int]] = {}  # pidfd → pid, where its status goes, the order's number
        self.nothing = os.open("/dev/null", os.O_RDWR)

    def serve(self) -> None:
        while True:
            for number, _ in self.poll.poll():
                if number in self.running:
                    self.reap(number)
                    continue
                data, descriptors = receive(self.sock)
                if not data:
                    return
                try:
                    self.obey(json.loads(data), descriptors)
                finally:
                    for descriptor in descriptors:
                        os.close(descriptor)

    def obey(self, order: dict[str, Any], descriptors: list[int]) -> None:
        what = order["what"]
        if what == "run":
            self.run(order, descriptors)
        elif what == "start":
            self.start(order, descriptors[0])
        elif what == "kill":
            self.end(order["number"])
        else:
            say(descriptors[1], str(transfer(order, descriptors[0])))

    def watch(self, pid: int, status: int, number: int) -> None:
        pidfd = os.pidfd_open(pid)
        self.running[pidfd] = pid, status, number
        self.poll.register(pidfd, select.POLLIN)

    def run(self, order: dict[str, Any], descriptors: list[int]) -> None:
        standard = (descriptors[0], descriptors[1], descriptors[2])
        try:
            pid = fork(order, standard) if order["program"] else spawn(order, standard)
        except OSError as error:
            say(standard[2], f"{error.filename or order['argv'][0]}: {error.strerror}\n")
            say(descriptors[3], str(NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE))
            return
        self.watch(pid, os.dup(descriptors[3]), order["number"])

    def start(self, order: dict[str, Any], answer: int) -> None:
        try:
            log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                pid = spawn(order, (self.nothing, log, log), daemon=True)
            finally:
                os.close(log)
            with open(order["pidfile"], "w") as file:
                file.write(f"{pid}\n")
        except OSError:
            return  # whoever gets no answer tries another way, which says why
        self.watch(pid, -1, -1)
        say(answer, str(pid))

    def reap(self, pidfd: int) -> None:
        pid, status, _ = self.running.pop(pidfd)
        self.poll.unregister(pidfd)
        os.close(pidfd)
        code = os.waitpid(pid, 0)[1]
        if status >= 0:
            say(status, str(code))
            os.close(status)

    def end(self, wanted: int | None = None) -> None:
        """Kill one command, or all that still run but the daemons."""
        for pid, _, number in list(self.running.values()):
            if number >= 0 and wanted in (None, number):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)


# --- files


def transfer(order: dict[str, Any], other: int) -> int:
    """Read or write a file; returns 0 or an errno."""
    try:
        if order["what"] == "read":
            send_file(order["path"], other)
        else:
            take_file(order["path"], other, order["mode"])
    except OSError as error:
        return error.errno or 5
    return 0


def send_file(path: str, other: int) -> None:
    source = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if stat.S_ISDIR(os.fstat(source).st_mode):
            raise IsADirectoryError(21, "is a directory")
        while data := os.read(source, 1 << 16):
            while data:
                data = data[os.write(other, data) :]
    finally:
        os.close(source)


def take_file(path: str, other: int, mode: int) -> None:
    """Whole or not at all."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.new", "wb") as file:
        while data := os.read(other, 1 << 16):
            file.write(data)
    os.chmod(f"{path}.new", mode)
    os.rename(f"{path}.new", path)


def main() -> None:
    """Serve, then end what was run."""
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        sock.set_inheritable(False)
        resident = Resident(sock)
        try:
            resident.serve()
        finally:
            resident.end()


main()
