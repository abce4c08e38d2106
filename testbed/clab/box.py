"""Runs containerlab in a mount and a network namespace of its own, so that it changes nothing of this machine.

A program, not a module: `python -I -S box.py FOLDER COMMAND…`.  containerlab writes names into /etc/hosts, a file into
/etc/ssh/ssh_config.d and links into /run/netns; here these are in FOLDER.  It gives up where /proc has no `modules`, as
on a kernel without modules; here it sees a /proc that has an empty one.  It makes cables where it is and then moves
their ends to the containers, so cables that are on their way when it is killed go with its network.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys

NEWNS, NEWNET = 0x20000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
PIDS_AHEAD = 8192
"""How many processes may start, on this machine or in this engine, while containerlab runs."""

libc = ctypes.CDLL(None, use_errno=True)


def check(ok: bool, what: str) -> None:
    if not ok:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    done = libc.mount(source.encode(), target.encode(), kind.encode() or None, flags, data.encode() or None)
    check(done == 0, f"mount {kind or 'bind'} {source} on {target}")


def own_files(folder: str) -> None:
    """Put copies over what containerlab writes to; a folder that is not there has to be made by the caller."""
    hosts = f"{folder}/hosts"
    if not os.path.exists(hosts):
        shutil.copyfile("/etc/hosts", hosts)
    mount(hosts, "/etc/hosts", "", MS_BIND)
    if os.path.isdir("/etc/ssh/ssh_config.d"):
        configs = f"{folder}/ssh_config.d"
        os.makedirs(configs, exist_ok=True)
        mount(configs, "/etc/ssh/ssh_config.d", "", MS_BIND)
    os.makedirs("/run/netns", exist_ok=True)
    os.makedirs(f"{folder}/netns", exist_ok=True)
    mount(f"{folder}/netns", "/run/netns", "", MS_BIND)


def proc_with_modules(folder: str) -> None:
    """Put over /proc a folder of links into the real one, and an empty `modules`.

    procfs takes no new file and no overlay lies over it, so the links are made by hand: for what is there, and for
    the processes to come.
    """
    real = f"{folder}/proc"
    os.makedirs(real, exist_ok=True)
    mount("/proc", real, "", MS_BIND | MS_REC)
    mount("tmpfs", "/proc", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0555")
    with open(f"{real}/sys/kernel/pid_max") as file:
        limit = int(file.read())
    here = os.getpid()
    to_come = {str((here + ahead) % limit) for ahead in range(1, PIDS_AHEAD)}
    for name in {*os.listdir(real), *to_come}:
        os.symlink(f"{real}/{name}", f"/proc/{name}")
    with open("/proc/modules", "w"):
        pass


def main() -> None:
    folder, *command = sys.argv[1:]
    try:
        network = NEWNET if os.environ["DOCKER_HOST"].startswith("unix:") else 0  # any other engine is spoken to by it
        check(libc.unshare(NEWNS | network) == 0, "making namespaces")
        mount("none", "/", "", MS_REC | MS_PRIVATE)
        own_files(folder)
        if not os.path.exists("/proc/modules"):
            proc_with_modules(folder)
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"containerlab cannot be run apart: {error.strerror or error}")


main()
