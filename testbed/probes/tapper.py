"""Starts tcpdumps on a node, one an interface. A program, not a module: `python -I -S -c SOURCE FILTER KIB SPEC…`.

KIB is what the kernel may hold for each until it is taken.  A SPEC is `NETNS,IFACE,OUT,ERR`: the path of a network
namespace ("" for the node's own), the interface, and the numbers of the descriptors that its packets and its messages
go to.  A byte `s` on standard input asks every tcpdump for its statistics, `p` has them pause and `c` go on; the end
of standard input, or of this process, ends them all.

tcpdump gives up its privileges by setgroups(), which a user namespace of one id refuses; a seccomp filter answers it
with success, so that tcpdump runs the same for root and for an ordinary user.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import struct
import sys

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 1, 38, 22
CLONE_NEWNET = 0x40000000
SETGROUPS = {"x86_64": (0xC000003E, 116), "aarch64": (0xC00000B7, 159)}
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # BPF: ld [k], jeq, ret
# The kernel keeps a slot of this length for each packet that tcpdump has not taken yet, and tcpdump's own is 256 KiB:
# then 2 MiB hold 32 packets, fewer than one burst of a check. These are whole up to an MTU of 10 kB; longer ones are
# only the large segments of bulk flows, which nobody looks into.
SNAPSHOT_BYTES = 10240
LETTERS = {b"s": signal.SIGUSR1, b"p": signal.SIGSTOP, b"c": signal.SIGCONT}
ALLOW, ERRNO_0 = 0x7FFF0000, 0x00050000

libc = ctypes.CDLL(None, use_errno=True)


def answer_setgroups() -> None:
    """Let setgroups() succeed without doing anything, here and in every program started from here."""
    machine = os.uname().machine
    if machine not in SETGROUPS:
        return
    audit, number = SETGROUPS[machine]
    steps = [(LOAD, 0, 0, 4), (EQUAL, 0, 3, audit), (LOAD, 0, 0, 0), (EQUAL, 0, 1, number), (RETURN, 0, 0, ERRNO_0)]
    code = b"".join(struct.pack("HBBI", *step) for step in [*steps, (RETURN, 0, 0, ALLOW)])
    program = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(program))
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(PR_SET_SECCOMP, 2, header, 0, 0)


def start(spec: str, expression: str, room: str) -> int:
    """Start one tcpdump; returns its pid."""
    netns, iface, out, err = spec.split(",")
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
        os.dup2(int(err), 2)
        if netns and libc.setns(os.open(netns, os.O_RDONLY), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {netns}")
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        os.dup2(int(out), 1)
        argv = ["tcpdump", "-Z", "root", "-p", "-U", "--immediate-mode", "-n", "-w", "-", "-i", iface]
        argv += ["-s", str(SNAPSHOT_BYTES), "-B", room]
        os.execvp("tcpdump", [*argv, *([expression] if expression else [])])  # noqa: S606 (argv, by design)
    except OSError as error:
        os.write(2, f"tcpdump: {error}\n".encode())
    os._exit(127)


def main() -> None:
    """Start all, then serve standard input."""
    expression, room, *specs = sys.argv[1:]
    for spec in specs:
        for descriptor in spec.split(",")[2:]:
            os.set_inheritable(int(descriptor), False)  # or each tcpdump would hold its siblings' pipes open
    answer_setgroups()
    children = [start(spec, expression, room) for spec in specs]
    for spec in specs:
        for descriptor in spec.split(",")[2:]:
            os.close(int(descriptor))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while letter := os.read(0, 1):
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, LETTERS[letter])


main()
