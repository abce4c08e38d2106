"""What Debian's kernel boots under QEMU before it has the host's files: busybox, a few modules, and a short script."""

from __future__ import annotations

import gzip
import lzma
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from testbed.guest.inside import MODULES
from testbed.guest.source import GuestUnavailable

BOOT = ("virtio_pci", "virtio_console", "9pnet_virtio", "9p")
"""The modules with which the host's files and the lines for output can be reached."""

SCRIPT = b"""#!/bin/busybox sh
for module in /modules/*; do
    /bin/busybox insmod "$module"
done
/bin/busybox mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=512000 root /root
exec /bin/busybox switch_root /root "$@"
"""


def _name(path: Path) -> str:
    return path.name.partition(".")[0].replace("-", "_")


def _content(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".gz":
        return gzip.decompress(data)
    if path.suffix != ".ko":
        raise GuestUnavailable(f"{path.name} is compressed in a way that is not known", hint="use another suite")
    return data


def _depends(module: bytes) -> list[str]:
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    return [name.replace("-", "_") for name in found[1].decode().split(",") if name] if found else []


def take_modules(unpacked: Path, folder: Path) -> Sequence[Path]:
    """Copy what a lab needs of a kernel's modules, and write which needs which; returns those of the boot, in order.

    Debian's package has no such list: it is made where a package is installed.
    """
    there = {_name(path): path for path in unpacked.rglob("*.ko*")}
    taken: dict[str, list[str]] = {}  # in an order in which they can be loaded

    def take(name: str) -> None:
        if name in taken or name not in there:
            return
        content = _content(there[name])
        needs = _depends(content)
        for before in needs:
            take(before)
        taken[name] = [before for before in needs if before in taken]
        (folder / f"{name}.ko").write_bytes(content)

    folder.mkdir(parents=True)
    for name in BOOT:
        take(name)
    boot = [folder / f"{name}.ko" for name in taken]
    for name in MODULES:
        take(name.replace("-", "_"))
    lines = (f"{name}.ko: {' '.join(f'{before}.ko' for before in needs)}\n" for name, needs in taken.items())
    (folder / "modules.dep").write_text("".join(lines))
    return boot


def archive(busybox: Path, modules: Sequence[Path]) -> bytes:
    """The initramfs, in the format `newc` of cpio, compressed."""
    folders = [(name, stat.S_IFDIR | 0o755, b"", (0, 0)) for name in ("bin", "dev", "modules", "root")]
    files = [
        ("init", stat.S_IFREG | 0o755, SCRIPT, (0, 0)),
        ("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes(), (0, 0)),
        ("dev/console", stat.S_IFCHR | 0o600, b"", (5, 1)),
        *(
            (f"modules/{number:03}-{path.name}", stat.S_IFREG | 0o644, path.read_bytes(), (0, 0))
            for number, path in enumerate(modules)
        ),
    ]
    return gzip.compress(_cpio([*folders, *files]), 6)


def _cpio(entries: Iterable[tuple[str, int, bytes, tuple[int, int]]]) -> bytes:
    out = bytearray()

    def pad() -> None:
        out.extend(bytes(-len(out) % 4))

    for inode, (name, mode, data, (major, minor)) in enumerate([*entries, ("TRAILER!!!", 0, b"", (0, 0))], start=1):
        fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(name) + 1, 0)
        out += b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
        pad()
        out += data
        pad()
    return bytes(out)
