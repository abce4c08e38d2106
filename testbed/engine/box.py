"""The inside of a private Docker engine: one process that makes namespaces, starts dockerd in them, and holds them.

This file is a program, not a module: it is handed to a bare interpreter (`python -I -S`).  It reads a plan (JSON) on
standard input, makes mount, network, PID, UTS and IPC namespaces, and answers with the pid of their first process as
the host sees it.  When that process dies the kernel removes dockerd, its containers and every device of theirs.

A `lifeline` (a pipe from whoever started it) keeps the engine alive until it is told to stay on its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from typing import Any

NEWNS, NEWUTS, NEWIPC, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1

libc = ctypes.CDLL(None, use_errno=True)


def _check(ok: bool, what: str) -> None:
    if not ok:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    done = libc.mount(source.encode(), target.encode(), kind.encode() or None, flags, data.encode() or None)
    _check(done == 0, f"mount {kind or 'bind'} {source} on {target}")


def bind_back(handle: int, target: str) -> None:
    """Show again what a fresh mount has covered, by the handle that was taken before."""
    os.makedirs(target, exist_ok=True)
    mount(f"/proc/self/fd/{handle}", target, "", MS_BIND | MS_REC)
    os.close(handle)


def make_mounts(state: str) -> None:
    """A fresh /proc, /sys and /run; of the host's /run only the folder of the test-bed's state."""
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    groups = os.open("/sys/fs/cgroup", os.O_PATH)
    mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    bind_back(groups, "/sys/fs/cgroup")
    folder = os.open(state, os.O_PATH)
    mount("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=256m")
    bind_back(folder, state)
    os.makedirs("/run/lock", exist_ok=True)


def loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        name = b"lo".ljust(16, b"\0")
        flags = struct.unpack("16sh", fcntl.ioctl(sock, SIOCGIFFLAGS, name + bytes(2)))[1]
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sh", name, flags | IFF_UP))


def start(plan: dict[str, Any]) -> subprocess.Popen[bytes]:
    with open(plan["log"], "ab") as log:
        return subprocess.Popen(
            plan["argv"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=plan["env"], start_new_session=True
        )


def hold(lifeline: int, engine: subprocess.Popen[bytes]) -> None:
    """Reap, and end with dockerd, or with the lifeline unless told to stay."""
    woken, waker = os.pipe()
    for number in (woken, waker):
        os.set_blocking(number, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    watched = [lifeline, woken]
    while True:
        ended = 0
        with contextlib.suppress(ChildProcessError):
            while ended := os.waitpid(-1, os.WNOHANG)[0]:
                if ended == engine.pid:
                    os._exit(1)
        ready = select.select(watched, [], [])[0]
        if woken in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(woken, 4096)
        if lifeline in ready:
            if os.read(lifeline, 1) != b"s":
                os._exit(0)
            watched.remove(lifeline)


def run(plan: dict[str, Any], lifeline: int, answer: int) -> None:
    """Be the first process of the engine's namespaces."""
    try:
        os.setsid()
        make_mounts(plan["state"])
        socket.sethostname("testbed-engine")
        loopback_up()
        engine = start(plan)
    except OSError as error:
        os.write(answer, json.dumps({"error": error.strerror or str(error)}).encode())
        os._exit(1)
    quiet = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2, answer):
        os.dup2(quiet, number)
    hold(lifeline, engine)


def main() -> None:
    lifeline = int(sys.argv[1])
    plan = json.load(sys.stdin)
    answer = os.dup(1)
    # dockerd and containerd each hold one of these; a shell's usual limit is too small for a hundred containers.
    try:
        _check(libc.unshare(NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET) == 0, "making the engine's namespaces")
        child = os.fork()
    except OSError as error:
        os.write(answer, json.dumps({"error": error.strerror or str(error)}).encode())
        sys.exit(1)
    if not child:
        run(plan, lifeline, answer)
    os.write(answer, json.dumps({"pid": child}).encode() + b"\n")


main()
