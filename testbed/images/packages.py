"""The self-contained image: the files of the Debian packages that a lab's machine needs, from dpkg's own lists."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from testbed.errors import LabError
from testbed.images.root import Tree, base

NEEDED = (
    *("bash", "coreutils", "dash", "findutils", "gawk", "mawk", "grep", "sed", "tar", "libc-bin", "netbase"),
    *("conntrack", "containernetworking-plugins", "etcd-server", "ethtool", "frr", "hostname", "iperf3", "iproute2"),
    *("iptables", "iputils-ping", "libpam-modules", "nftables", "openssl", "procps", "python3-minimal", "python3"),
    *("tcpdump", "util-linux", "wireguard-tools"),
    *("charon-systemd", "strongswan-swanctl", "libstrongswan-standard-plugins"),
)
"""Packages whose files a machine needs; one that is not installed here is not in the image."""

MUST = ("bash", "coreutils", "dash", "iproute2", "frr", "python3", "util-linux")
"""Without these no machine runs."""

LEFT_OUT = re.compile(
    r"/usr/share/(doc|man|info|locale|lintian|bug|perl|zoneinfo|bash-completion|gcc|gdb)(/|$)|/usr/games"
)
OUTSIDE = re.compile(r"/(bin|sbin|lib|lib32|lib64|libx32)/.")
"""Where older packages say that files are which are below /usr."""

LISTS = Path("/var/lib/dpkg/info")


@dataclass(frozen=True, slots=True)
class Package:
    """An installed package, as its dependants name it."""

    name: str
    architecture: str
    needs: tuple[tuple[str, ...], ...]  # each a choice

    def files(self) -> list[str]:
        """Every path that it put on this machine."""
        for name in (f"{self.name}:{self.architecture}.list", f"{self.name}.list"):
            if (LISTS / name).is_file():
                return (LISTS / name).read_text().splitlines()
        return []


def installed() -> dict[str, Package]:
    """The installed packages by name, and by what they provide. Raises LabError where there is no dpkg."""
    form = "${Package}\t${Architecture}\t${db:Status-Status}\t${Pre-Depends}, ${Depends}\t${Provides}\n"
    try:
        done = subprocess.run(["dpkg-query", "-W", "-f", form], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise LabError(
            "the self-contained image is made of Debian packages, and this machine has no dpkg",
            hint="use the host-root image, or import an image that was exported elsewhere",
        ) from error
    found: dict[str, Package] = {}
    provided: dict[str, Package] = {}
    for line in done.stdout.splitlines():
        name, architecture, status, needs, provides = line.split("\t")
        if status == "installed":
            found[name] = package = Package(name, architecture, _choices(needs))
            provided |= {choice[0]: package for choice in _choices(provides)}
    return provided | found


def _choices(text: str) -> tuple[tuple[str, ...], ...]:
    """A dependency field as tuples of package names, without versions and architectures."""
    fields = [tuple(re.sub(r"[ (:].*", "", word.strip()) for word in field.split("|")) for field in text.split(",")]
    return tuple(field for field in fields if field[0])


def closure(packages: Mapping[str, Package], wanted: Iterable[str]) -> list[Package]:
    """The wanted packages that are installed, with all that they need."""
    queue = [packages[name] for name in wanted if name in packages]
    found: dict[str, Package] = {}
    while queue:
        package = queue.pop()
        if package.name in found:
            continue
        found[package.name] = package
        for choice in package.needs:
            queue.extend(packages[name] for name in choice if name in packages)
    return [found[name] for name in sorted(found)]


def self_contained() -> bytes:
    """The self-contained image as an archive. Raises LabError where a package that it cannot do without is missing."""
    packages = installed()
    missing = [name for name in MUST if name not in packages]
    if missing:
        raise LabError(f"not installed here: {', '.join(missing)}", hint=f"apt-get install {' '.join(missing)}")
    tree = Tree()
    base(tree)
    for package in closure(packages, NEEDED):
        for path in package.files():
            _take(tree, path)
    _take_alternatives(tree)
    return tree.bytes()


def _take(tree: Tree, path: str) -> None:
    """Add a package's file as it stands below /usr; what is elsewhere is configuration."""
    if not path.startswith("/usr/") and not OUTSIDE.match(path):
        return
    inside = path if path.startswith("/usr/") else f"/usr{path}"
    source = Path(inside)
    # os.path, since Path.exists() raises for a file in a folder that is closed to this user.
    if LEFT_OUT.search(inside) or not os.path.exists(source):  # noqa: PTH110
        return
    if source.is_dir() and not source.is_symlink():
        tree.folder(inside.lstrip("/"))
        return
    tree.folder(str(source.parent).lstrip("/"))
    tree.copy(inside.lstrip("/"), inside)


def _take_alternatives(tree: Tree) -> None:
    """The links below /usr that the alternatives system made: no package lists them."""
    for link in Path("/etc/alternatives").glob("*"):
        for folder in ("/usr/bin", "/usr/sbin"):
            path = Path(folder) / link.name
            if path.is_symlink() and str(path.readlink()).startswith("/etc/alternatives/"):
                tree.copy(str(path).lstrip("/"), str(path))
