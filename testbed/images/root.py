"""The root of a machine's image: what programs look for outside /usr, and the first process.

Everything that a lab's machine runs (FRR, etcd, iptables, tcpdump, Python, …) is this host's, below /usr.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

from testbed.errors import LabError
from testbed.labs.plan import GROUP, PASSWD

INIT = "/etc/testbed-init"
FOLDERS = (
    *("dev", "etc/frr", "etc/pam.d", "home", "mnt", "opt", "proc", "root", "run/frr", "run/lock", "run/netns", "srv"),
    *("sys", "tmp", "var/cache", "var/lib", "var/log", "var/spool", "var/tmp"),
)
#: What programs look for in /etc.
BASE_FILES = (
    *("ld.so.cache", "ld.so.conf", "nsswitch.conf", "services", "protocols", "localtime", "iproute2", "alternatives"),
    *("strongswan.conf", "strongswan.d"),
)
MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")

#: A machine's first process reaps, and starts FRR where the machine has a configuration for it: once the ports to its
#: neighbours are there, or sessions take half a minute; and zebra first, since bgpd asks it for everything and asks
#: again only after seconds.
INIT_PROGRAM = r"""#!/bin/bash
trap 'exit 0' TERM INT
folder=/usr/lib/frr
[ -x "$folder/zebra" ] || folder=/usr/libexec/frr
begin() { # NAME READY
    setsid "$folder/$1" -f /etc/frr/frr.conf --log stdout </dev/null >>"/var/log/$1.log" 2>&1 &
    echo "$!" >"/run/$1.pid"
    for _ in {1..500}; do [ -e "$2" ] && return; sleep 0.02; done
}
rm -rf /run/* /tmp/*  # as it is where a machine starts anew
mkdir -p /run/frr /run/netns /run/lock
if [ -e /etc/frr/frr.conf ]; then
    ports=$(sed -n 's/^ *neighbor \([^ ]*\) interface .*/\1/p' /etc/frr/frr.conf | sort -u)
    for _ in {1..1500}; do
        missing=''
        for port in $ports; do [ "$(cat "/sys/class/net/$port/operstate" 2>/dev/null)" = up ] || missing=$port; done
        [ -z "$missing" ] && break
        sleep 0.02
    done
    # zebra may miss an address that is set while it starts; whoever sets them by hand leaves no such file.
    for _ in {1..100}; do [ -e /run/wired ] && break; sleep 0.02; done
    begin zebra /run/frr/zserv.api
    begin bgpd /run/frr/bgpd.vty
fi
while :; do sleep infinity & wait "$!"; done
"""


class Tree:
    """A file system tree on its way into a tar archive; what is the same on every machine is the same in the bytes."""

    def __init__(self) -> None:
        self.buffer = io.BytesIO()
        self.tar = tarfile.open(fileobj=self.buffer, mode="w")  # noqa: SIM115 (closed by `bytes`)
        self.seen: set[str] = set()

    def folder(self, path: str, mode: int = 0o755) -> None:
        """Add a folder and those that it is in."""
        parent = os.path.dirname(path)
        if parent:
            self.folder(parent)
        if path not in self.seen:
            self._add(tarfile.TarInfo(path), tarfile.DIRTYPE, mode)

    def file(self, path: str, data: bytes | str, mode: int = 0o644) -> None:
        """Add a file."""
        content = data.encode() if isinstance(data, str) else data
        info = tarfile.TarInfo(path)
        info.size = len(content)
        self._add(info, tarfile.REGTYPE, mode, content)

    def link(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        info = tarfile.TarInfo(path)
        info.linkname = target
        self._add(info, tarfile.SYMTYPE, 0o777)

    def copy(self, path: str, source: str) -> None:
        """Add a file, link or folder (with its files, not deeper) of this machine; one that is unreadable is left."""
        try:
            if os.path.islink(source):
                self.link(path, os.readlink(source))
            elif os.path.isdir(source):
                self.folder(path)
                for name in sorted(os.listdir(source)):
                    if not name.endswith(".gz"):  # manual pages
                        self.copy(f"{path}/{name}", f"{source}/{name}")
            elif os.path.isfile(source):
                self.file(path, Path(source).read_bytes(), os.stat(source).st_mode & 0o755)
        except PermissionError:
            return

    def _add(self, info: tarfile.TarInfo, kind: bytes, mode: int, content: bytes = b"") -> None:
        if info.name in self.seen:
            return
        self.seen.add(info.name)
        info.type, info.mode, info.mtime = kind, mode, 0
        self.tar.addfile(info, io.BytesIO(content) if kind == tarfile.REGTYPE else None)

    def bytes(self) -> bytes:
        """The archive."""
        self.tar.close()
        return self.buffer.getvalue()


def base(tree: Tree, folders: Iterable[str] = FOLDERS) -> None:
    """Put everything outside /usr into the tree. Raises LabError on a system whose /bin is not in /usr."""
    for name in MERGED:
        if os.path.islink(f"/{name}"):
            tree.link(name, os.readlink(f"/{name}"))
        elif os.path.isdir(f"/{name}"):
            raise LabError(
                f"/{name} is a folder of its own on this machine, so no image can be made of its files",
                hint="images need a system with /usr merged, as every Debian since 12 is",
            )
    for name in folders:
        tree.folder(name, 0o1777 if name in ("tmp", "var/tmp") else 0o755)
    tree.link("var/run", "/run")
    tree.link("var/lock", "/run/lock")
    tree.file("etc/passwd", PASSWD)
    tree.file("etc/group", GROUP)
    # Without it vtysh drops a configuration, and says nothing.
    tree.file("etc/pam.d/frr", "auth sufficient pam_permit.so\naccount sufficient pam_permit.so\n")
    tree.file(INIT.lstrip("/"), INIT_PROGRAM, 0o755)
    for name in BASE_FILES:
        tree.copy(f"etc/{name}", f"/etc/{name}")


def host_root() -> bytes:
    """The host-root image as an archive: almost empty, since its machines see this host's /usr, read-only."""
    tree = Tree()
    tree.folder("usr")
    base(tree)
    return tree.bytes()
