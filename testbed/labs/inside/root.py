"""The root that everything in a lab sees: almost empty, and nothing of the host in it can be written.

With the system calls that it takes, for which Python has no function of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import os

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


def detach(target: str) -> None:
    """Unmount what is there with all that is below it, whoever still uses it."""
    _check(libc.umount2(target.encode(), MNT_DETACH) == 0, f"umount {target}")


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
