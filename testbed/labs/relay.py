"""Carries a command's standard streams, further descriptors and signals over one stream each way, as `docker exec` has.

A program, not a module, and both sides of it:

- `outer WORDS… -- ARGV…` runs here, in place of the command.  Descriptors that it was started with are the command's.
  WORDS start the other side, with the program's text behind them.
- `inner` runs where the command is to run, and starts it.

From outer to inner go frames of a letter and a length: `r` what to run (JSON: descriptors, environment, argv), `d` data
for standard input, `c` its end, `s` a signal's number.  From inner to outer go frames of a descriptor's number and a
length; one of no length is the descriptor's end, and one for `ENDED` has the command's status as waitpid() has it.  The
command is killed where outer has gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import selectors
import signal
import struct
import subprocess
import sys
import threading

HEAD_IN, HEAD_OUT = struct.Struct("!cI"), struct.Struct("!II")
ENDED = 0xFFFFFFFF
PIECE = 1 << 16
HIGH = 200  # above every descriptor that a command is given


def write_all(number: int, data: bytes) -> None:
    while data:
        data = data[os.write(number, data) :]


class Frames:
    """Whole frames out of a stream."""

    def __init__(self, head: struct.Struct) -> None:
        self.head, self.data = head, b""

    def feed(self, data: bytes) -> list[tuple[bytes | int, bytes]]:
        self.data += data
        found = []
        while len(self.data) >= self.head.size:
            kind, length = self.head.unpack_from(self.data)
            end = self.head.size + length
            if len(self.data) < end:
                break
            found.append((kind, self.data[self.head.size : end]))
            self.data = self.data[end:]
        return found


# --- where the command runs


def high_pipe() -> tuple[int, int]:
    """A pipe whose ends are in nobody's way."""
    ends = os.pipe()
    reader, writer = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, HIGH) for end in ends)
    for end in ends:
        os.close(end)
    return reader, writer


def first_frame(frames: Frames) -> tuple[bytes, list[tuple[bytes | int, bytes]]]:
    """What to run, and whatever came with it."""
    found: list[tuple[bytes | int, bytes]] = []
    while not found:
        data = os.read(0, PIECE)
        if not data:
            os._exit(1)
        found = frames.feed(data)
    return found[0][1], found[1:]


def inner() -> None:
    frames = Frames(HEAD_IN)
    order, early = first_frame(frames)
    numbers, environment, argv = json.loads(order)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    ours: dict[int, int] = {}  # our end of each pipe → the descriptor that the command knows
    stdin, feed = high_pipe()
    actions, theirs = [(os.POSIX_SPAWN_DUP2, stdin, 0)], [stdin]
    for number in (1, 2, *numbers):
        reader, writer = high_pipe()
        ours[reader] = number
        theirs.append(writer)
        actions.append((os.POSIX_SPAWN_DUP2, writer, number))
    heard = [signal.SIGPIPE, signal.SIGXFSZ]
    try:
        pid = os.posix_spawnp(argv[0], argv, environment, file_actions=actions, setpgroup=0, setsigdef=heard)
    except OSError as error:
        text = f"{argv[0]}: {error.strerror}\n".encode()
        code = 127 if isinstance(error, FileNotFoundError) else 126
        write_all(1, HEAD_OUT.pack(2, len(text)) + text + HEAD_OUT.pack(ENDED, 4) + struct.pack("!I", code << 8))
        return
    for number in theirs:
        os.close(number)
    command = Inner(pid, ours, feed)
    for kind, content in early:
        command.obey(kind, content)
    command.serve(frames)


class Inner:
    """A command that was started, and the streams to it."""

    def __init__(self, pid: int, ours: dict[int, int], feed: int) -> None:
        self.pid, self.ours, self.feed = pid, ours, feed
        self.waiting, self.ending = b"", False  # what standard input has yet to be given, and whether its end follows
        self.selector = selectors.DefaultSelector()
        os.set_blocking(feed, False)

    def serve(self, frames: Frames) -> None:
        for number in (0, *self.ours):
            self.selector.register(number, selectors.EVENT_READ)
        pidfd = os.pidfd_open(self.pid)
        self.selector.register(pidfd, selectors.EVENT_READ)
        outputs, status = set(self.ours), None
        while status is None or outputs:
            for key, _ in self.selector.select():
                number = int(key.fd)
                if number == pidfd:
                    status = os.waitpid(self.pid, 0)[1]
                    self.selector.unregister(pidfd)
                elif number == self.feed:
                    self.give()
                elif number:
                    data = os.read(number, PIECE)
                    write_all(1, HEAD_OUT.pack(self.ours[number], len(data)) + data)
                    if not data:
                        self.selector.unregister(number)
                        outputs.discard(number)
                elif data := os.read(0, PIECE):
                    for kind, content in frames.feed(data):
                        self.obey(kind, content)
                else:  # nobody waits for it any more
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(self.pid, signal.SIGKILL)
                    os._exit(1)
        write_all(1, HEAD_OUT.pack(ENDED, 4) + struct.pack("!I", status))

    def obey(self, kind: bytes | int, content: bytes) -> None:
        if kind == b"s":
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, int(content))
            return
        if self.feed >= 0 and not self.waiting and not self.ending:
            self.selector.register(self.feed, selectors.EVENT_WRITE)
        self.waiting += content
        self.ending = self.ending or kind == b"c"

    def give(self) -> None:
        try:
            while self.waiting:
                self.waiting = self.waiting[os.write(self.feed, self.waiting[:PIECE]) :]
        except BlockingIOError:
            return
        except OSError:  # who does not want it all need not take it
            self.waiting, self.ending = b"", True
        self.selector.unregister(self.feed)
        if self.ending:
            os.close(self.feed)
            self.feed = -1


# --- where the caller is


def outer(words: list[str], argv: list[str]) -> None:
    text = open(__file__).read()
    numbers = sorted(int(name) for name in os.listdir("/proc/self/fd"))
    numbers = [number for number in numbers if number > 2 and is_open(number)]
    for number in numbers:
        os.set_inheritable(number, False)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it may end itself by the command's signal
    far = subprocess.Popen([*words, text, "inner"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert far.stdin
    assert far.stdout
    to, back = far.stdin.fileno(), far.stdout.fileno()

    say(to, b"r", json.dumps([numbers, dict(os.environ), argv]).encode())

    def pass_on(number: int, _: object) -> None:
        say(to, b"s", str(number).encode())

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, pass_on)
    finish(carry(to, back), far)


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def say(to: int, kind: bytes, content: bytes = b"") -> None:
    with contextlib.suppress(OSError):
        write_all(to, HEAD_IN.pack(kind, len(content)) + content)


def carry(to: int, back: int) -> int | None:
    """Carry everything both ways; returns the command's status, None where it never came."""
    threading.Thread(target=carry_there, args=(to,), daemon=True).start()
    frames = Frames(HEAD_OUT)
    while data := os.read(back, PIECE):
        for number, content in frames.feed(data):
            if number == ENDED:
                return int(struct.unpack("!I", content)[0])
            with contextlib.suppress(OSError):  # nobody reads it any more
                if content:
                    write_all(int(number), content)
                else:
                    os.close(int(number))
    return None


def carry_there(to: int) -> None:
    while data := os.read(0, PIECE):
        say(to, b"d", data)
    say(to, b"c")


def finish(status: int | None, far: subprocess.Popen[bytes]) -> None:
    """End as the command did."""
    if status is None:
        sys.exit(far.wait() or 125)
    if os.WIFSIGNALED(status):
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL) if os.WTERMSIG(status) != signal.SIGKILL else None
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status))


def main() -> None:
    if sys.argv[1] == "inner":
        inner()
    else:
        end = sys.argv.index("--")
        outer(sys.argv[2:end], sys.argv[end + 1 :])


main()
