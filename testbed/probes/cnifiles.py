"""What CNI plugins keep on a node's disk: host-local's reservations, and the configurations of flannel's delegate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from testbed.errors import LabError, ProductError
from testbed.labs.base import Node

NETWORKS = "/var/lib/cni/networks"
DELEGATES = "/var/lib/cni/flannel"


@dataclass(frozen=True, slots=True)
class CniFiles:
    """`reserved` maps an address to the container that has it, `delegates` a container to its delegate's conf."""

    reserved: Mapping[IPv4Address | IPv6Address, str]
    delegates: Mapping[str, Mapping[str, Any]]

    def of(self, container: str) -> tuple[IPv4Address | IPv6Address, ...]:
        """The addresses that a container has, in order."""
        return tuple(sorted((a for a, who in self.reserved.items() if who == container), key=str))


def read_cni_files(node: Node, network: str) -> CniFiles:
    """Read a node's files; `network` is the conflist's name. Raises LabError and ProductError."""
    done = node.run(["grep", "-rZ", "", f"{NETWORKS}/{network}", DELEGATES], check=False)
    if done.rc not in (0, 1, 2):
        raise LabError(f"cannot read CNI's files: {done.stderr.strip()}", where=node.name)
    return parse_cni_files(done.stdout, node.name)


def parse_cni_files(text: str, where: str) -> CniFiles:
    """Read what `grep -rZ ""` prints of the folders: name, NUL, and a line. Raises ProductError."""
    reserved: dict[IPv4Address | IPv6Address, str] = {}
    delegates: dict[str, Mapping[str, Any]] = {}
    files: dict[str, list[str]] = {}
    for line in text.split("\n"):
        path, nul, content = line.partition("\0")
        if nul:
            files.setdefault(path, []).append(content.strip("\r"))
    for path, lines in files.items():
        folder, _, name = path.rpartition("/")
        try:
            if folder == DELEGATES:
                delegates[name] = json.loads("\n".join(lines))
            elif name != "lock" and not name.startswith("last_reserved_ip"):
                reserved[ip_address(name)] = lines[0].strip()
        except ValueError as error:
            raise ProductError(f"{path}: {error}", where=where) from error
    return CniFiles(reserved, delegates)
