"""Starts a guest kernel with as little of the host as it needs, and ends it with whoever asked for it.

This file is a program, not a module: it is handed to a bare interpreter (`python -I -S`) with a plan (JSON) on its
standard input.  Where namespaces can be had, the guest's processes live in some of their own: nothing but the folders
named as writable can be written to, no network is there, and all of them die together.  Where not, the guest has the
rights of an ordinary user, and every process of it is told to die with its parent.

Real root is given up for an id that owns nothing; folders that only root may reach are shown to it as its own.
It exits as the guest kernel does, or with 99 after a line that says what it could not do.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import sys
from typing import Any

NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 1, 4, 24, 38, 47
PR_SET_CHILD_SUBREAPER = 36
PR_CAP_AMBIENT_CLEAR_ALL = 4
SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_MOUNT_SETATTR = 428, 429, 442  # the same numbers everywhere
AT_FDCWD, AT_RECURSIVE, AT_EMPTY_PATH = -100, 0x8000, 0x1000
OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC, MOVE_MOUNT_F_EMPTY_PATH = 1, 0o2000000, 4
MOUNT_ATTR_RDONLY, MOUNT_ATTR_IDMAP = 1, 0x100000
FAILED = 99

libc = ctypes.CDLL(None, use_errno=True)


def check(ok: bool, what: str) -> None:
    if not ok:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    done = libc.mount(source.encode(), target.encode(), kind.encode() or None, flags, data.encode() or None)
    check(done == 0, f"mount {kind or 'bind'} on {target}")


def set_attributes(
    folder: int, path: str, *, on: int = 0, off: int = 0, users: int = 0, recursive: bool = False
) -> None:
    attributes = (ctypes.c_uint64 * 4)(on, off, 0, users)
    flags = (AT_RECURSIVE if recursive else 0) | (0 if path else AT_EMPTY_PATH)
    size = ctypes.sizeof(attributes)
    done = libc.syscall(SYS_MOUNT_SETATTR, folder, path.encode(), flags, ctypes.byref(attributes), size)
    check(done == 0, f"mount attributes of {path or 'a folder'}")


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


# --- what the guest sees of the host


def shown_as(owner: int, group: int, becomes: int) -> int:
    """A user namespace in which the folder's owner is `becomes`, for a mount that shows it so."""
    said, saying = os.pipe()
    child = os.fork()
    if not child:
        os.close(saying)
        check(libc.unshare(NEWUSER) == 0, "a user namespace")
        os.read(said, 1)
        os._exit(0)
    os.close(said)
    try:
        # The child has made it once its own differs from ours.
        while os.stat(f"/proc/{child}/ns/user").st_ino == os.stat("/proc/self/ns/user").st_ino:
            if os.waitpid(child, os.WNOHANG)[0]:
                raise OSError(0, "no user namespace can be made")
        write(f"/proc/{child}/uid_map", f"{owner} {becomes} 1")
        write(f"/proc/{child}/gid_map", f"{group} {becomes} 1")
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(saying)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


class Window:
    """A folder of the host that the guest needs, as a mount of its own."""

    def __init__(self, path: str, *, writable: bool, becomes: int) -> None:
        self.path, self.writable = path, writable
        flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | (0 if writable else AT_RECURSIVE)
        self.tree: int = libc.syscall(SYS_OPEN_TREE, AT_FDCWD, path.encode(), flags)
        check(self.tree >= 0, path)
        facts = os.stat(path)
        if becomes and facts.st_uid != becomes:
            try:
                users = shown_as(facts.st_uid, facts.st_gid, becomes)
                set_attributes(self.tree, "", on=MOUNT_ATTR_IDMAP, users=users)
                os.close(users)
            except OSError as error:
                if writable:
                    raise OSError(
                        0,
                        f"{path} cannot be shown to the guest as its own ({error.strerror}); "
                        "choose a folder on ext4, xfs, btrfs or tmpfs, or run as an ordinary user",
                    ) from error

    def open(self) -> None:
        """Put the mount where the folder is."""
        done = libc.syscall(SYS_MOVE_MOUNT, self.tree, b"", AT_FDCWD, self.path.encode(), MOVE_MOUNT_F_EMPTY_PATH)
        check(done == 0, f"mounting {self.path}")
        os.close(self.tree)
        if self.writable:
            set_attributes(AT_FDCWD, self.path, off=MOUNT_ATTR_RDONLY)


def closed_door(path: str) -> str:
    """The first folder on the way to `path` that is closed to others; empty where there is none."""
    at = ""
    for part in path.strip("/").split("/")[:-1]:
        at = f"{at}/{part}"
        if not os.stat(at).st_mode & 0o001:
            return at
    return ""


def make_view(plan: dict[str, Any]) -> None:
    """Make everything read-only but what the guest may write, and put its memory on a file system of its own."""
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    becomes = plan["becomes"]
    windows = [Window(path, writable=True, becomes=becomes) for path in plan["writable"]]
    doors = set()
    if becomes:
        for path in plan["readable"]:
            if door := closed_door(path):
                doors.add(door)
                windows.append(Window(path, writable=False, becomes=becomes))
        doors |= {door for path in plan["writable"] if (door := closed_door(path))}
    for door in doors:
        mount("tmpfs", door, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=1m")
    windows.sort(key=lambda window: window.path)
    for path in (plan["memory_folder"], *(window.path for window in windows)):
        os.makedirs(path, exist_ok=True)  # behind a door there is nothing now
    set_attributes(AT_FDCWD, "/", on=MOUNT_ATTR_RDONLY, recursive=True)
    for window in windows:
        window.open()
    mount("tmpfs", plan["memory_folder"], "tmpfs", MS_NOSUID | MS_NODEV, f"mode=1777,size={plan['memory_bytes']}")


# --- rights


def give_up_rights(becomes: int) -> None:
    """Be an ordinary user who can never be more."""
    capability = 0
    while libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    if becomes:
        os.setgroups([])
        os.setresgid(becomes, becomes, becomes)
        os.setresuid(becomes, becomes, becomes)
    header, empty = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    check(libc.capset(header, empty) == 0, "giving up capabilities")
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "no_new_privs")
    libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def die_with(parent: int) -> None:
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(FAILED)


# --- the guest


def namespaces() -> bool:
    """Make the namespaces that the guest's processes live in; False where this user may not."""
    flags = NEWNS | NEWNET | NEWIPC
    if not os.getuid():
        return bool(libc.unshare(flags) == 0)
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(NEWUSER | flags):
        return False
    write("/proc/self/setgroups", "deny")
    write("/proc/self/uid_map", f"{uid} {uid} 1")
    write("/proc/self/gid_map", f"{gid} {gid} 1")
    return True


def memory_folder(candidates: list[str], needed: int) -> str:
    """The first folder that can hold the guest's memory: a file that is executed from."""
    faults = []
    for path in candidates:
        try:
            facts = os.statvfs(path)
        except OSError as error:
            faults.append(f"{path}: {error.strerror}")
            continue
        free = facts.f_bavail * facts.f_frsize
        if facts.f_flag & os.ST_NOEXEC:
            faults.append(f"{path} is mounted noexec")
        elif free < needed:
            faults.append(f"{path} has {free >> 20} MiB free of the {needed >> 20} that it takes")
        elif not os.access(path, os.W_OK | os.X_OK):
            faults.append(f"{path} may not be written to")
        else:
            return path
    raise OSError(
        0,
        f"no folder can hold its memory: {'; '.join(faults)}. Set TMPDIR to one that can, mounted exec and with "
        f"{needed >> 20} MiB free (in a container: --shm-size={needed >> 20}m)",
    )


def start_kernel(plan: dict[str, Any]) -> None:
    with open("/dev/null") as nothing:
        os.dup2(nothing.fileno(), 0)
    for number in plan["pass"]:
        os.set_inheritable(number, True)
    os.chdir("/")
    os.execve(plan["kernel"], plan["argv"], plan["env"])


def be_first(plan: dict[str, Any], alive: int) -> int:
    """The first process of the guest's PID namespace: start the kernel, reap, end with it."""
    with contextlib.suppress(OSError):  # a masked /proc; the guest needs little of it
        mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    give_up_rights(plan["becomes"])
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if not os.read(alive, 1):
        return FAILED  # whoever started this died before the line above
    kernel = os.fork()
    if not kernel:
        try:
            start_kernel(plan)
        except OSError as error:
            os._exit(complain(error))
    while True:
        pid, status = os.wait()
        if pid == kernel:
            return exit_code(status)


def exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


def complain(error: OSError) -> int:
    os.write(2, f"the guest cannot be started: {error.strerror or error}\n".encode())
    return FAILED


def in_namespaces(plan: dict[str, Any]) -> int:
    """Run the guest where nothing of it can stay."""
    make_view(plan)
    check(libc.unshare(NEWPID) == 0, "a PID namespace")  # last: the next child is its first process
    alive, living = os.pipe()
    first = os.fork()
    if not first:
        os.close(living)
        try:
            os._exit(be_first(plan, alive))
        except OSError as error:
            os._exit(complain(error))
    give_up_rights(plan["becomes"])
    die_with(plan["parent"])
    os.write(living, b"a")
    return exit_code(os.waitpid(first, 0)[1])


def children() -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError), open(f"/proc/{int(name)}/stat") as stat:
            if int(stat.read().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(name))
    return found


def end_all() -> None:
    """Kill all descendants: as each dies, its own children become this process's."""
    while left := children():
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def without_namespaces(plan: dict[str, Any]) -> int:
    """Run the guest as an ordinary program, and end all of its processes with it or with whoever asked for it."""
    plan["env"]["TMPDIR"] = memory_folder(plan["memory_candidates"], plan["memory_bytes"])
    give_up_rights(0)
    # Not by a signal at the parent's death: this process has to outlive it for a moment.
    libc.prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)
    check(libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0, "becoming the reaper")
    me = os.getpid()
    kernel = os.fork()
    if not kernel:
        try:
            die_with(me)
            start_kernel(plan)
        except OSError as error:
            os._exit(complain(error))
    ended = os.pidfd_open(kernel)
    ready = select.select([ended, plan["lifeline"]], [], [])[0]
    code = exit_code(os.waitpid(kernel, 0)[1]) if ended in ready else FAILED
    end_all()
    return code


def main() -> int:
    plan: dict[str, Any] = json.load(sys.stdin)
    try:
        die_with(plan["parent"])
        if plan["namespaces"] and namespaces():
            plan["env"]["TMPDIR"] = plan["memory_folder"]
            return in_namespaces(plan)
        if not os.getuid():
            raise OSError(0, "as root it needs namespaces, which are refused here; run it as an ordinary user")
        return without_namespaces(plan)
    except OSError as error:
        return complain(error)


if __name__ == "__main__":
    sys.exit(main())
