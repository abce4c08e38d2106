"""The inside of a lab: one process that makes namespaces and holds them.

This file is a program, not a module: it is handed to a bare interpreter (`python -I -S`) and needs nothing of the
checkout.  It reads a plan (JSON) on standard input, and builds, from the outside in:

1. a user namespace of one id with a mount namespace whose root is an almost empty tmpfs: /usr and its kin bound
   read-only, nothing else of the host.  Everything mounted here is locked for what runs further in.
2. a second user namespace with PID, mount, UTS, IPC and network namespaces: the box.  Its first process holds the
   lab; when it dies, the kernel removes every node, link and process.
3. for each node its own network, mount, UTS, IPC and PID namespaces, with tmpfs where nodes write.

It answers with one JSON line: the holder's pid as the host sees it, and each node's pid inside the box.
A `lifeline` (a pipe from whoever started it) keeps the box alive until it is told to stay on its own.
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
import time
import traceback
from typing import Any

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_DUMPABLE = 4
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
SYS_MOUNT_SETATTR = 442  # the same number everywhere
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY = 1

libc = ctypes.CDLL(None, use_errno=True)


def _check(ok: bool, what: str) -> None:
    if not ok:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    _check(libc.unshare(flags) == 0, f"unshare({flags:#x})")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    done = libc.mount(source.encode(), target.encode(), kind.encode() or None, flags, data.encode() or None)
    _check(done == 0, f"mount {kind or 'bind'} {source} on {target}")


def tmpfs(target: str, mode: str = "0755", size: str = "256m", flags: int = MS_NOSUID | MS_NODEV) -> None:
    mount("tmpfs", target, "tmpfs", flags, f"mode={mode},size={size}")


def read_only(path: str, recursive: bool) -> None:
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    done = libc.syscall(
        SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, ctypes.byref(attributes), ctypes.sizeof(attributes)
    )
    _check(done == 0, f"making {path} read-only")


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def map_single_id(uid: int, gid: int) -> None:
    """Map this process's own ids to 0; the one map that needs no privilege."""
    write("/proc/self/setgroups", "deny")
    write("/proc/self/uid_map", f"0 {uid} 1")
    write("/proc/self/gid_map", f"0 {gid} 1")


# --- stage 1: the root that everything inside sees


def as_lab_user(uid: int) -> str:
    """Give up real root for an id that owns nothing; returns the tun device that the lab may open.

    Only root can make a device node that an ordinary id may open, so this is the moment for it.
    """
    device = "/dev/net/tun" if os.path.exists("/dev/net/tun") else ""
    with contextlib.suppress(OSError):  # a container's root may not mount, or make devices
        unshare(NEWNS)
        mount("none", "/", "", MS_REC | MS_PRIVATE)
        tmpfs("/mnt", flags=MS_NOSUID)
        os.mknod("/mnt/tun", 0o666 | 0o020000, os.stat("/dev/net/tun").st_rdev)
        os.chmod("/mnt/tun", 0o666)
        device = "/mnt/tun"
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # or /proc/self/uid_map would stay root's
    return device


def bind_tree(source: str, root: str) -> None:
    target = root + source
    os.makedirs(target, exist_ok=True)
    mount(source, target, "", MS_BIND | MS_REC)
    read_only(target, recursive=True)


def make_devices(root: str, tun: str) -> None:
    os.makedirs(f"{root}/dev/net")
    for name in ("null", "zero", "full", "random", "urandom", "tty"):
        bind_file(f"/dev/{name}", f"{root}/dev/{name}")
    if tun:
        bind_file(tun, f"{root}/dev/net/tun")
    for name, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        os.symlink(target, f"{root}/dev/{name}")
    os.symlink("pts/ptmx", f"{root}/dev/ptmx")
    os.makedirs(f"{root}/dev/pts")
    os.makedirs(f"{root}/dev/shm")


def bind_file(source: str, target: str) -> None:
    write(target, "")
    mount(source, target, "", MS_BIND)


def make_root(tun: str) -> None:
    """Build the almost empty root and make it ours; what is read-only here can never be undone further in."""
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    root = "/tmp"
    tmpfs(root, size="16m")
    os.umask(0o022)
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        path = f"/{name}"
        if os.path.islink(path):
            os.symlink(os.readlink(path), root + path)
        elif os.path.isdir(path):
            bind_tree(path, root)
    bind_tree("/usr", root)
    for name in ("etc", "run", "var", "tmp", "root", "home", "opt", "mnt", "srv", "proc", "sys", ".old", ".base"):
        os.makedirs(f"{root}/{name}", exist_ok=True)
    make_base(f"{root}/.base")
    make_devices(root, tun)
    # Whole and writable as the host's own, or no fresh /proc and /sys could be mounted further in.
    mount("/proc", f"{root}/proc", "", MS_BIND | MS_REC)
    mount("/sys", f"{root}/sys", "", MS_BIND | MS_REC)
    number = SYS_PIVOT_ROOT[os.uname().machine]
    _check(libc.syscall(number, root.encode(), f"{root}/.old".encode()) == 0, "pivot_root")
    os.chdir("/")
    _check(libc.umount2(b"/.old", MNT_DETACH) == 0, "leaving the host's root")
    read_only("/", recursive=False)


#: What programs look for in /etc, beside what each node gets of its own.
BASE_FILES = (
    "ld.so.cache",
    "ld.so.conf",
    "nsswitch.conf",
    "services",
    "protocols",
    "localtime",
    "iproute2",
    "alternatives",
)


def make_base(base: str) -> None:
    """Copy the few things of the host's /etc that programs need."""
    os.makedirs(f"{base}/alternatives")
    for name in BASE_FILES:
        source = f"/etc/{name}"
        if os.path.isdir(source):
            os.makedirs(f"{base}/{name}", exist_ok=True)
            for entry in os.listdir(source):
                if not entry.endswith(".gz"):  # manual pages
                    copy(f"{source}/{entry}", f"{base}/{name}/{entry}")
        else:
            copy(source, f"{base}/{name}")


def copy(source: str, target: str) -> None:
    with contextlib.suppress(OSError):  # unreadable or a folder: not needed
        if os.path.islink(source):
            os.symlink(os.readlink(source), target)
        elif os.path.isfile(source):
            with open(source, "rb") as file, open(target, "wb") as out:
                out.write(file.read())


# --- stage 3: a node


def make_node_root(node: dict[str, Any]) -> None:
    """Give this mount namespace its own /proc, /sys, and tmpfs wherever a node writes."""
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    for path in ("/etc", "/run", "/var", "/root", "/opt"):
        tmpfs(path)
    tmpfs("/tmp", mode="1777")
    tmpfs("/dev/shm", mode="1777")
    mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620")
    for path in ("/run/lock", "/run/netns", "/run/frr", "/var/lib", "/var/log", "/var/tmp", "/var/cache", "/var/spool"):
        os.makedirs(path)
    os.symlink("/run", "/var/run")
    os.symlink("/run/lock", "/var/lock")
    for name in os.listdir("/.base"):
        if name != "alternatives":
            os.symlink(f"/.base/{name}", f"/etc/{name}")
    # A node's own: which iptables it has is chosen by node.
    os.makedirs("/etc/alternatives")
    for name in os.listdir("/.base/alternatives"):
        copy(f"/.base/alternatives/{name}", f"/etc/alternatives/{name}")
    for path, text in node["files"].items():
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write(path, text)


def set_sysctls(values: dict[str, str]) -> None:
    for key, value in values.items():
        path = "/proc/sys/" + key.lstrip("?")
        if key.startswith("?") and not os.path.exists(path):
            continue  # only there with a kernel module that not every machine has
        try:
            write(path, value)
        except OSError as error:
            raise OSError(error.errno, f"sysctl {key}={value}: {error.strerror}") from error


SIOCETHTOOL = 0x8946
#: set/get commands of the old ethtool interface, which every kernel still has
OFFLOADS = {"tx": (0x17, 0x16), "tso": (0x1F, 0x1E), "gso": (0x24, 0x23), "gro": (0x2C, 0x2B)}


def set_offloads(iface: str, on: bool) -> dict[str, bool]:
    """Switch offloads of an interface, and return what they are afterwards."""
    state = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for name, (setter, getter) in OFFLOADS.items():
            value = ctypes.create_string_buffer(struct.pack("II", setter, int(on)))
            request = struct.pack("16sP", iface.encode(), ctypes.addressof(value))
            fcntl.ioctl(sock, SIOCETHTOOL, request)
            value = ctypes.create_string_buffer(struct.pack("II", getter, 0))
            fcntl.ioctl(sock, SIOCETHTOOL, struct.pack("16sP", iface.encode(), ctypes.addressof(value)))
            state[name] = bool(struct.unpack("II", value.raw[:8])[1])
    return state


def tool(argv: list[str], text: str = "") -> str:
    done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(0, f"{' '.join(argv)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def node_facts(node: dict[str, Any]) -> dict[str, Any]:
    """Wire this node from inside, then read everything back."""
    addresses = tool(["ip", "-j", "-d", "-batch", "-"], node["batch"] + "addr show\n")
    offloads = {iface: set_offloads(iface, on) for iface, on in node["offloads"].items()}
    if node["faults"]:
        tool(["tc", "-batch", "-"], node["faults"])
    return {"addresses": json.loads(addresses), "offloads": offloads}


def start_daemons(node: dict[str, Any], folder: str) -> None:
    """Start this node's routing daemons, each as soon as the one before answers."""
    for daemon in node["daemons"]:
        name = daemon["name"]
        with open(f"/var/log/{name}.log", "ab") as log:
            argv = [f"{folder}/{name}", "-f", "/etc/frr/frr.conf", "--log", "stdout"]
            try:
                process = subprocess.Popen(
                    argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            except OSError as error:
                log.write(f"{argv[0]}: {error.strerror}\n".encode())
                continue
        write(f"/run/{name}.pid", str(process.pid))
        deadline = time.monotonic() + 10
        while not os.path.exists(daemon["ready"]) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)


def reap_for_ever() -> None:
    """The first process of a PID namespace inherits every orphan of it."""
    while True:
        try:
            os.wait()
        except ChildProcessError:
            signal.pause()


def run_node(node: dict[str, Any], folder: str, start: int, answer: int) -> None:
    """Be the first process of a node: set up, wait for the links, wire, report, reap."""
    try:
        make_node_root(node)
        socket.sethostname(node["name"])
        set_sysctls(node["sysctls"])
        os.write(answer, b"\n")
        if os.read(start, 1) != b"w":
            os._exit(0)
        send(answer, node_facts(node))
    except BaseException as error:  # reported to the holder, which passes it on
        with contextlib.suppress(OSError):
            send(answer, {"error": describe(error)})
        os._exit(1)
    close_all_but_standard()
    start_daemons(node, folder)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # wakes pause()
    reap_for_ever()


def close_all_but_standard() -> None:
    os.closerange(3, 4096)
    quiet = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(quiet, number)


def describe(error: BaseException) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return "".join(traceback.format_exception_only(type(error), error)).strip()


def send(number: int, answer: dict[str, Any]) -> None:
    data = json.dumps(answer).encode() + b"\n"
    while data:
        data = data[os.write(number, data) :]


# --- stage 2: the holder


class NodeChild:
    """A node's first process as the holder sees it: its pid in the box, and the pipes to it."""

    def __init__(self, node: dict[str, Any], folder: str) -> None:
        self.name: str = node["name"]
        start_read, self.start = os.pipe()
        answer_read, answer = os.pipe()
        self.pid_read, pid_write = os.pipe()
        self.middle = os.fork()
        if not self.middle:
            unshare(NEWNS | NEWNET | NEWUTS | NEWIPC | NEWPID)
            child = os.fork()
            if not child:
                os.close(answer_read)
                os.close(self.start)
                run_node(node, folder, start_read, answer)
            os.write(pid_write, str(child).encode())
            os._exit(0)
        for number in (start_read, answer, pid_write):
            os.close(number)
        self.pid = 0
        self.answer = os.fdopen(answer_read, "r")

    def made(self) -> None:
        """Learn the node's pid; the others are being made meanwhile."""
        text = os.read(self.pid_read, 32)
        os.close(self.pid_read)
        os.waitpid(self.middle, 0)
        if not text:
            raise OSError(0, f"{self.name}: its namespaces could not be made (limit of this user reached?)")
        self.pid = int(text)

    def line(self) -> str:
        text = self.answer.readline()
        if not text:
            raise OSError(0, f"{self.name}: its first process died")
        return text

    def facts(self, text: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(text)
        if "error" in answer:
            raise OSError(0, f"{self.name}: {answer['error']}")
        return answer


def make_nodes(plan: dict[str, Any]) -> dict[str, Any]:
    """Make all nodes, lay the cables between them, and let each wire itself."""
    children = [NodeChild(node, plan["frr_folder"]) for node in plan["nodes"]]
    for child in children:
        child.made()
        text = child.line()
        if text.strip():
            child.facts(text)
    links = plan["links"]
    for child in children:
        links = links.replace(f"@{child.name}@", str(child.pid))
    tool(["ip", "-batch", "-"], links)
    for child in children:
        os.write(child.start, b"w")
    facts = {}
    for child in children:
        facts[child.name] = {"pid": child.pid, **child.facts(child.line())}
        child.answer.close()
        os.close(child.start)
    return facts


def hold(lifeline: int) -> None:
    """Keep the box alive: for as long as the lifeline is open, or for ever once told to stay."""
    woken, waker = os.pipe()
    for number in (woken, waker):
        os.set_blocking(number, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    watched = [lifeline, woken]
    while True:
        ready, _, _ = select.select(watched, [], [])
        if woken in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(woken, 4096)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if lifeline in ready:
            if os.read(lifeline, 1) != b"s":
                os._exit(0)
            watched.remove(lifeline)


def run_box(plan: dict[str, Any], lifeline: int, answer: int) -> None:
    """Be the first process of the box."""
    try:
        os.setsid()
        mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
        tmpfs("/run")
        tmpfs("/tmp", mode="1777")
        socket.sethostname(plan["id"][:60])
        facts = make_nodes(plan)
        write("/run/lab.json", json.dumps({"id": plan["id"], "nodes": {name: f["pid"] for name, f in facts.items()}}))
        send(answer, {"nodes": facts})
    except BaseException as error:
        with contextlib.suppress(OSError):
            send(answer, {"error": describe(error)})
        os._exit(1)
    os.close(answer)
    quiet = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(quiet, number)
    hold(lifeline)


def wire() -> None:
    """Wire one machine that somebody else made, a container, from inside; its plan is on standard input."""
    node = json.load(sys.stdin)
    try:
        for path, text in node["files"].items():
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write(path, text)
        set_sysctls(node["sysctls"])
        send(1, node_facts(node))
    except OSError as error:
        send(1, {"error": describe(error)})


def main() -> None:
    """Read the plan, make the box, answer on standard output."""
    if sys.argv[1] == "wire":
        wire()
        return
    lifeline = int(sys.argv[1])
    plan = json.load(sys.stdin)
    answer = os.dup(1)
    uid, gid = os.getuid(), os.getgid()
    try:
        tun = "/dev/net/tun" if os.path.exists("/dev/net/tun") else ""
        if plan["root_becomes"]:
            uid = gid = int(plan["root_becomes"])
            tun = as_lab_user(uid)
        unshare(NEWUSER | NEWNS)
        map_single_id(uid, gid)
        make_root(tun)
        unshare(NEWUSER | NEWNS | NEWPID | NEWNET | NEWUTS | NEWIPC)
        map_single_id(0, 0)
        said, saying = os.pipe()
        child = os.fork()
    except BaseException as error:
        send(answer, {"error": describe(error)})
        sys.exit(1)
    if not child:
        os.close(saying)
        os.read(said, 1)  # so that the two answers come one after the other
        run_box(plan, lifeline, answer)
    send(answer, {"pid": child})


main()
