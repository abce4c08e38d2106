"""Runs a command in a guest kernel: the same files, output, interrupts and exit code as outside."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import Any

from testbed.errors import LabError
from testbed.guest import qemu
from testbed.labs import interpreter
from testbed.labs.plan import ROOT_BECOMES

MEMORY = 2 << 30
"""The guest's memory, in bytes. The host gives only what is used of it."""

OVERLAY_SHARE = 2  # of the guest's memory, what the command may write outside of the writable folders: one half
CONSOLE_TAIL = 1 << 16  # bytes
SHOWN_TAIL = 4000

#: What is started with the guest, none of which a lab wants: fallback tunnels in each namespace, and spare devices.
QUIET_DEVICES = ("fb_tunnels=none", "bonding.max_bonds=0", "dummy.numdummies=0", "ifb.numifbs=0")

_LETTERS = {signal.SIGINT: b"i", signal.SIGTERM: b"t", signal.SIGHUP: b"h"}


def boot_line(memory: int, out: int, err: int, control: int) -> list[str]:
    """The kernel's command line but for its first process; the numbers are inherited file descriptors."""
    return [
        f"mem={memory >> 20}M",
        *("root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", "quiet", "panic=-1", "seccomp=on", "ncpus=1"),
        *QUIET_DEVICES,
        "rcupdate.rcu_expedited=1",  # namespaces end in milliseconds
        *("con=null", "con0=null,fd:1", f"ssl0=null,fd:{out}", f"ssl1=null,fd:{err}", f"ssl2=fd:{control},null"),
    ]


def _terminal() -> tuple[int, int] | None:
    """Rows and columns of the terminal that both outputs go to; None where one of them does not."""
    if not (os.isatty(1) and os.isatty(2)):
        return None
    with contextlib.suppress(OSError):
        rows, columns, _, _ = struct.unpack("HHHH", fcntl.ioctl(1, termios.TIOCGWINSZ, bytes(8)))
        return rows, columns
    return 24, 80


def _program(name: str) -> bytes:
    return resources.files("testbed.guest").joinpath(name).read_bytes()


def _needed_folders(more: Sequence[Path]) -> list[str]:
    """What of the host a command of this project reads besides /usr and /etc; of a file its folder."""
    package = Path(__file__).resolve().parents[2]
    own = [package, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()]
    found = {str(path if path.is_dir() else path.parent) for path in (*own, *more)}
    return sorted(found - {"/", "/usr"})


class _Relay:
    """Passes the guest's output on as it comes, and keeps the end of its console."""

    def __init__(self) -> None:
        self.console = b""
        self.selector = selectors.DefaultSelector()
        self.ends: list[int] = []

    def channel(self, target: int | None) -> int:
        """A pipe for the guest to write to; its bytes go to that descriptor, or, with None, to the console's tail."""
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        self.selector.register(reader, selectors.EVENT_READ, target)
        self.ends.append(reader)
        return writer

    def pump(self) -> None:
        """Pass everything on until the guest has closed all of its ends."""
        while self.selector.get_map():
            for key, _ in self.selector.select():
                try:
                    data = os.read(key.fd, 1 << 16)
                except BlockingIOError:
                    continue
                if not data:
                    self.selector.unregister(key.fd)
                elif key.data is None:
                    self.console = (self.console + data)[-CONSOLE_TAIL:]
                else:
                    _write_all(key.data, data)

    def close(self) -> None:
        """Let go of the pipes."""
        self.selector.close()
        for end in self.ends:
            os.close(end)


def _write_all(target: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(target, data) :]
        except BlockingIOError:
            selector = selectors.DefaultSelector()
            selector.register(target, selectors.EVENT_WRITE)
            selector.select()
            selector.close()


@contextmanager
def _interrupts(control: int, guest: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Hand signals to the command in the guest; a second Ctrl-C ends the guest at once. Yields those that came."""
    seen: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        seen.append(number)
        if seen.count(signal.SIGINT) > 1:
            guest.kill()
            return
        with contextlib.suppress(OSError):
            os.write(control, _LETTERS[signal.Signals(number)])

    if threading.current_thread() is not threading.main_thread():
        yield seen
        return
    before = {number: signal.signal(number, pass_on) for number in _LETTERS}
    try:
        yield seen
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _files_of(kernel: Path) -> list[Path]:
    """What a guest reads of its kernel's files while it runs."""
    modules = _modules(kernel)
    return [kernel] if kernel.is_dir() else [Path(modules)] if modules else []


def _modules(kernel: Path) -> str:
    """The folder of a packaged kernel's modules; empty for one that has everything built in."""
    if machine := qemu.of(kernel):
        return str(machine.modules)
    folder = kernel.parent.parent / "lib" / "uml" / "modules"
    return str(folder) if os.path.isdir(folder) else ""  # noqa: PTH112 (where nobody may look there is none)


def _status(folder: Path) -> int | None:
    try:
        return int((folder / "guest" / "status").read_text())
    except (FileNotFoundError, ValueError):
        return None


def _died(console: bytes, code: int) -> LabError:
    text = console.decode(errors="replace").replace("\r", "")
    shown = "\n".join(line for line in text[-SHOWN_TAIL:].splitlines() if line.strip())
    how = f"was killed by signal {-code}" if code < 0 else f"ended with {code} and no word of its command"
    return LabError(f"the guest kernel {how}\n{shown}".rstrip(), hint="`testbed kernel run -- true` tries it alone")


def run(
    argv: Sequence[str],
    *,
    kernel: Path,
    writable: Sequence[Path] = (),
    readable: Sequence[Path] = (),
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    memory: int = MEMORY,
    out: int = 1,
) -> int:
    """Run a command in a guest and return its exit code (128 and more: the signal that it died of).

    It sees the host's files, and its changes to them end with the guest, but for those in the `writable` folders,
    which exist.  It runs as the guest's root.  Output comes as it is made, its standard
    output on the descriptor `out`; signals to this process go to the command.
    Raises LabError where the guest cannot be started, or dies before its command ends.
    """
    cwd = (cwd or Path.cwd()).resolve()
    try:
        folder = Path(tempfile.mkdtemp(prefix="testbed-guest-")).resolve()
    except OSError as error:
        raise _no_room(error) from error
    try:
        seen = _needed_folders([cwd, *(path.resolve() for path in readable), *_files_of(kernel)])
        return _run_in(folder, argv, kernel, [path.resolve() for path in writable], seen, env, cwd, memory, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _becomes() -> int:
    """The id that real root gives itself up for; 0 for everybody else, and for root of a user namespace."""
    ids = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    mapped = any(int(first) <= ROOT_BECOMES < int(first) + int(count) for first, _, count in ids)
    return ROOT_BECOMES if os.getuid() == 0 and mapped else 0


def _no_room(error: OSError) -> LabError:
    return LabError(
        f"there is no place for the files of a guest: {error.strerror or error}",
        where=str(error.filename or os.environ.get("TMPDIR", "/tmp")),
        hint="free some space there, or set TMPDIR to a folder with more",
    )


def _prepare(folder: Path, plan: Mapping[str, Any]) -> None:
    """Lay out the folder that guest and host share; the part that the guest may write to is `guest`."""
    folder.chmod(0o755)  # QEMU lists what is on the way to a file
    (folder / "memory").mkdir()
    shared = folder / "guest"
    shared.mkdir(mode=0o700)
    (shared / "inside.py").write_bytes(_program("inside.py"))
    (shared / "plan.json").write_text(json.dumps(plan))
    if _becomes():
        for path in (shared, *shared.iterdir()):
            os.chown(path, ROOT_BECOMES, ROOT_BECOMES)


def _run_in(
    folder: Path,
    argv: Sequence[str],
    kernel: Path,
    writable: list[Path],
    readable: list[str],
    env: Mapping[str, str] | None,
    cwd: Path,
    memory: int,
    target: int,
) -> int:
    machine = qemu.of(kernel)  # None: the kernel is a program itself
    shared = folder / "guest"
    folders = [str(path) for path in (shared, *writable)]
    command = {
        "argv": list(argv),
        "env": dict(os.environ if env is None else env),
        "cwd": str(cwd),
        "writable": folders,
        "terminal": _terminal() if target == 1 else None,
        "status": str(shared / "status"),
        "overlay_bytes": memory // OVERLAY_SHARE,
        "modules": _modules(kernel),
        "shares": machine.shares(folders) if machine else {},
        "lines": "hvc" if machine else "ttyS",
    }
    try:
        _prepare(folder, command)
    except OSError as error:
        raise _no_room(error) from error
    try:
        program = os.open(machine.program if machine else kernel, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise LabError(f"the guest kernel cannot be read: {error.strerror}", where=str(kernel)) from error
    relay = _Relay()
    out, err, console = relay.channel(target), relay.channel(2), relay.channel(None)
    listening, control = _socket_pair() if machine else os.pipe()
    lifeline, held = os.pipe()  # its far end closes with this process, however that ends
    first = ["-I", "-S", str(shared / "inside.py"), str(shared / "plan.json")]
    if machine:
        boot = machine.arguments(memory, (out, err, listening), folders, [interpreter(), *first])
    else:
        boot = [*boot_line(memory, out, err, listening), f"uml_dir={shared}/uml", "umid=guest"]
        boot += [f"init={interpreter()}", "--", *first]
    plan = {
        "parent": os.getpid(),
        "namespaces": True,
        "becomes": _becomes(),
        "writable": folders,
        "readable": readable,
        "memory_folder": str(folder / "memory"),
        "memory_bytes": memory + (64 << 20),
        "memory_candidates": [path for path in (os.environ.get("TMPDIR"), "/dev/shm", "/tmp", "/var/tmp") if path],
        "kernel": program,
        "argv": ["testbed-guest", *boot],
        "env": {
            "HOME": str(shared),
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            **(machine.environment if machine else {}),
        },
        "pass": [out, err, listening],
        "lifeline": lifeline,
    }
    passed = [out, err, listening, program, lifeline]
    try:
        launcher = _memory_file("launch.py")
        try:
            guest = subprocess.Popen(
                [interpreter(), "-I", "-S", f"/proc/self/fd/{launcher}"],
                stdin=subprocess.PIPE,
                stdout=console,
                stderr=console,
                pass_fds=[*passed, launcher],
                start_new_session=True,  # a terminal's Ctrl-C is the command's alone
            )
        finally:
            os.close(launcher)
            for number in (*passed, console):
                os.close(number)
        with _interrupts(control, guest) as interrupts:
            try:
                _tell(guest, plan)
                relay.pump()
            finally:
                if relay.selector.get_map():
                    guest.kill()
                code = guest.wait()
    finally:
        os.close(control)
        os.close(held)
        relay.close()
    status = _status(folder)
    if status is None and interrupts.count(signal.SIGINT) > 1:
        raise KeyboardInterrupt
    if status is None:
        raise _died(relay.console, code)
    return status


def _socket_pair() -> tuple[int, int]:
    """QEMU listens on nothing less."""
    ends = socket.socketpair()
    return ends[0].detach(), ends[1].detach()


def _tell(guest: subprocess.Popen[bytes], plan: Mapping[str, Any]) -> None:
    assert guest.stdin
    with contextlib.suppress(BrokenPipeError):
        guest.stdin.write(json.dumps(plan).encode())
        guest.stdin.close()


def _memory_file(name: str) -> int:
    """A program in memory: the checkout may lie where its interpreter cannot read it."""
    number = os.memfd_create(name)
    os.write(number, _program(name))
    return number
