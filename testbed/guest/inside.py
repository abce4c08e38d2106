"""The guest's first process: makes a root that may be written to, runs one command in it, and powers off.

This file is a program, not a module: the guest kernel starts it on a bare interpreter (`python -I -S`).  Its argument
is a plan (JSON).  The guest's root is the host's, read-only, by hostfs; the command sees it below an overlay in memory,
with the folders that the plan names as `writable` going through to the host's.

The command's standard output is the first serial line and its standard error the second; the third one brings signals
for it.  Its exit status is written to a file on the host: a guest without one died.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import termios
import traceback
from typing import Any

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
MNT_DETACH = 2
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
SYS_FINIT_MODULE = {"x86_64": 313, "aarch64": 273}
POWER_OFF = 0x4321FEDC
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
OPEN_FILES = 1 << 16
NEW_ROOT = "/tmp"

#: What a byte on the third serial line means.
SIGNALS = {ord("i"): signal.SIGINT, ord("t"): signal.SIGTERM, ord("h"): signal.SIGHUP}

libc = ctypes.CDLL(None, use_errno=True)


def check(ok: bool, what: str) -> None:
    if not ok:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(kind: str, target: str, flags: int = 0, data: str = "") -> None:
    done = libc.mount(kind.encode(), target.encode(), kind.encode(), flags, data.encode() or None)
    check(done == 0, f"mount {kind} on {target}")


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


# --- the root


#: What Debian's kernels have as modules and a lab may need; one that is missing closes a feature, no more.
#: First the algorithms that others ask for by name while they are loaded, when nothing would find them.
MODULES = tuple(
    """
    crc32c_generic crc32c_intel crypto_null hmac sha1_generic sha256_generic sha512_generic drbg
    aes_generic aesni_intel cbc ctr gcm
    ghash-generic chacha_generic poly1305_generic chacha20poly1305 authenc seqiv echainiv
    overlay veth bridge br_netfilter dummy tun vxlan ipip sit gre ip_gre vrf wireguard af_packet ipv6
    nf_conntrack nf_conntrack_netlink nf_nat nf_tables nft_compat nft_chain_nat nft_masq nft_nat nft_ct nft_counter
    nft_limit nft_log nft_reject_inet nft_fib_inet ip_tables iptable_filter iptable_nat iptable_mangle ip6_tables
    ip6table_filter ip6table_nat ip6table_mangle xt_comment xt_MASQUERADE xt_conntrack xt_addrtype xt_mark xt_nat
    xt_tcpudp xt_statistic xt_set ip_set ip_set_hash_net xfrm_user esp4 esp6 xfrm4_tunnel xfrm_algo sch_netem sch_tbf
    sch_htb packet_diag inet_diag tcp_diag udp_diag
    """.split()
)


def load_modules(modules: str) -> None:
    """Load all that a lab may need: nothing would find them once they are needed."""
    folder = f"{modules}/{os.uname().release}"
    needs: dict[str, list[str]] = {}
    places: dict[str, str] = {}
    with open(f"{folder}/modules.dep") as file:
        for line in file:
            path, _, before = line.partition(":")
            places[os.path.basename(path).partition(".")[0].replace("-", "_")] = path
            needs[path] = before.split()
    loaded: set[str] = set()

    def load(path: str) -> None:
        if path in loaded:
            return
        loaded.add(path)
        for before in reversed(needs.get(path, [])):
            load(before)
        program = os.open(f"{folder}/{path}", os.O_RDONLY)
        libc.syscall(SYS_FINIT_MODULE[os.uname().machine], program, b"", 0)
        os.close(program)

    for name in MODULES:
        if found := places.get(name.replace("-", "_")):
            load(found)


def show_modules(modules: str, new: str) -> None:
    """Put the kernel's modules where it has them looked for."""
    release = os.uname().release
    os.makedirs(f"{new}/lib/modules", exist_ok=True)
    os.symlink(f"{modules}/{release}", f"{new}/lib/modules/{release}")


def make_root(plan: dict[str, Any]) -> None:
    """Put an overlay over the host's root, fresh kernel file systems into it, and go there for good."""
    if plan["modules"]:
        load_modules(plan["modules"])
    mount("tmpfs", NEW_ROOT, 0, f"size={plan['overlay_bytes']},mode=0755")
    for name in ("upper", "work", "new"):
        os.mkdir(f"{NEW_ROOT}/{name}")
    os.chmod(f"{NEW_ROOT}/upper", 0o755)
    new = f"{NEW_ROOT}/new"
    # The host's root may be nobody in here: a program of its own that changes to its owner, as mount(8), would be, too.
    mount("overlay", new, MS_NOSUID, f"lowerdir=/,upperdir={NEW_ROOT}/upper,workdir={NEW_ROOT}/work")
    mount("proc", f"{new}/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("sysfs", f"{new}/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("cgroup2", f"{new}/sys/fs/cgroup", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("tmpfs", f"{new}/run", MS_NOSUID | MS_NODEV, "mode=0755,size=25%")
    os.mkdir(f"{new}/run/lock")
    make_devices(f"{new}/dev")
    if plan["modules"]:
        show_modules(plan["modules"], new)
    for path in plan["writable"]:
        os.makedirs(new + path, exist_ok=True)
        share(path, new + path, plan["shares"].get(path))
    os.chdir(new)
    # Not chroot: in a root that is not the mount namespace's own no user namespace can be made.
    check(libc.syscall(SYS_PIVOT_ROOT[os.uname().machine], b".", b".") == 0, "pivot_root")
    check(libc.umount2(b".", MNT_DETACH) == 0, "leaving the host's root")
    os.chdir("/")


def share(path: str, target: str, tag: str | None) -> None:
    """Let a folder of the host through: by user-mode-linux itself, or by the name that QEMU gave it."""
    if tag is None:
        mount("hostfs", target, MS_NOSUID | MS_NODEV, path)
        return
    options = b"trans=virtio,version=9p2000.L,msize=512000"
    done = libc.mount(tag.encode(), target.encode(), b"9p", MS_NOSUID | MS_NODEV, options)
    check(done == 0, f"mount {path}")


def make_devices(dev: str) -> None:
    mount("devtmpfs", dev, MS_NOSUID, "mode=0755")
    for name in ("pts", "shm", "mqueue"):
        os.makedirs(f"{dev}/{name}", exist_ok=True)
    mount("devpts", f"{dev}/pts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620")
    mount("tmpfs", f"{dev}/shm", MS_NOSUID | MS_NODEV, "mode=1777")
    with contextlib.suppress(OSError):
        mount("mqueue", f"{dev}/mqueue", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    for name, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        os.symlink(target, f"{dev}/{name}")
    if os.path.exists(f"{dev}/ptmx"):
        os.unlink(f"{dev}/ptmx")
    os.symlink("pts/ptmx", f"{dev}/ptmx")
    for name in ("null", "zero", "full", "random", "urandom", "tty", "net/tun"):
        with contextlib.suppress(FileNotFoundError):
            os.chmod(f"{dev}/{name}", 0o666)  # as udev does


def settle() -> None:
    """What a distribution's boot does besides, as far as a lab needs it."""
    os.environ.clear()
    socket.sethostname("guest")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        name = b"lo".ljust(16, b"\0")
        flags = struct.unpack("16sh", fcntl.ioctl(sock, SIOCGIFFLAGS, name + bytes(2)))[1]
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sh", name, flags | IFF_UP))
    for path, text in (("kernel/unprivileged_userns_clone", "1"), ("kernel/sysrq", "0")):
        with contextlib.suppress(OSError):
            write(f"/proc/sys/{path}", text)
    with contextlib.suppress(OSError):
        write("/sys/fs/cgroup/cgroup.subtree_control", "+cpu +memory +pids")
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o022)


# --- the command


def serial(name: str) -> int:
    """Open a serial line that changes nothing of what passes through it."""
    line = os.open(f"/dev/{name}", os.O_RDWR | os.O_NOCTTY)
    mode = termios.tcgetattr(line)
    mode[0] = mode[1] = mode[3] = 0  # nothing translated coming in or going out, no echo, no signals
    mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
    termios.tcsetattr(line, termios.TCSANOW, mode)
    return line


def fail(error: OSError, plan: dict[str, Any], code: int) -> None:
    name = plan["cwd"] if error.filename == plan["cwd"] else plan["argv"][0]
    os.write(2, f"{name}: {error.strerror}\n".encode())
    os._exit(code)


class Job:
    """The command: on the serial lines themselves where a terminal watches, else on pipes that end there."""

    def __init__(self, plan: dict[str, Any], lines: tuple[int, int]) -> None:
        self.terminal = plan["terminal"]
        self.relays: dict[int, int] = {}  # reading end of a pipe → serial line
        ends = list(lines)
        if self.terminal is None:
            for position, line in enumerate(lines):
                reader, ends[position] = os.pipe()
                os.set_inheritable(ends[position], True)
                self.relays[reader] = line
        else:
            rows, columns = self.terminal
            for line in lines:
                fcntl.ioctl(line, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
            # This process leads the session, not the command: a leader's end would cut its last output short.
            # Its part in the background is no reason to refuse it the line.
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)
            os.setsid()
            fcntl.ioctl(lines[0], termios.TIOCSCTTY, 0)
        self.pid = os.fork()
        if not self.pid:
            self._become(plan, ends)
        if self.terminal is None:
            for end in ends:
                os.close(end)

    def _become(self, plan: dict[str, Any], ends: list[int]) -> None:
        try:
            if self.terminal is None:
                os.setsid()
            else:
                os.setpgid(0, 0)
                os.tcsetpgrp(ends[0], os.getpid())
                signal.signal(signal.SIGTTOU, signal.SIG_DFL)
            os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
            os.dup2(ends[0], 1)
            os.dup2(ends[1], 2)
            for number in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)  # Python's own start-up ignores them
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.chdir(plan["cwd"])
            os.execvpe(plan["argv"][0], plan["argv"], plan["env"])
        except FileNotFoundError as error:
            fail(error, plan, 127)
        except OSError as error:
            # A folder of PATH that may not be looked into hides nothing: no such command, as a shell says.
            there = any(os.path.exists(os.path.join(path, plan["argv"][0])) for path in os.get_exec_path(plan["env"]))
            gone = FileNotFoundError(2, os.strerror(2), plan["argv"][0])
            fail(error if there else gone, plan, 126 if there else 127)

    def signal(self, number: int) -> None:
        """As a terminal would: to all of the command's group; without one, to the command alone."""
        with contextlib.suppress(ProcessLookupError):
            (os.kill if self.terminal is None else os.killpg)(self.pid, number)


def reaped(job: int) -> int | None:
    """Reap whatever has ended; returns the command's exit code once it is among them."""
    code = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == job:
                code = os.waitstatus_to_exitcode(ended[1])
    return code


def read(line: int) -> bytes:
    try:
        return os.read(line, 64)
    except OSError:
        return b""  # nobody at the other end any more


def send(line: int, data: bytes) -> None:
    while data:
        data = data[os.write(line, data) :]


def attend(job: Job, control: int, woken: int) -> int:
    """Pass on output and signals until the command has ended and its output with it; returns its exit code."""
    code: int | None = None
    told = [control]
    while True:
        patience = None if code is None else 0.2  # a daemon that it left may hold a pipe open
        ready = select.select([*told, woken, *job.relays], [], [], patience)[0]
        for reader in [number for number in ready if number in job.relays]:
            data = os.read(reader, 1 << 16)
            if data:
                send(job.relays[reader], data)
            else:
                del job.relays[reader]
        if control in ready:
            letters = read(control)
            for letter in letters:
                if letter in SIGNALS:
                    job.signal(SIGNALS[letter])
            if not letters:
                told.clear()
        if woken in ready:
            os.read(woken, 4096)
            ended = reaped(job.pid)
            code = ended if code is None else code
        if code is not None and (not job.relays or not set(ready) & set(job.relays)):
            return code


def run(plan: dict[str, Any]) -> int:
    out, err, control = (serial(f"{plan['lines']}{number}") for number in range(3))
    woken, waker = os.pipe()
    for number in (woken, waker):
        os.set_blocking(number, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    code = attend(Job(plan, (out, err)), control, woken)
    for line in (out, err):
        termios.tcdrain(line)
    return 128 - code if code < 0 else code


def main() -> None:
    with open(sys.argv[1]) as file:
        plan = json.load(file)
    try:
        make_root(plan)
        settle()
        code = run(plan)
        status = plan["status"]
        write(f"{status}.new", str(code))
        os.rename(f"{status}.new", status)
    except BaseException as error:  # said on the console, where whoever started the guest reads it
        text = str(error) if isinstance(error, OSError) else traceback.format_exc()
        os.write(2, f"the guest's first process: {text}\n".encode())
    finally:
        os.sync()
        libc.reboot(POWER_OFF)


if __name__ == "__main__":
    main()
