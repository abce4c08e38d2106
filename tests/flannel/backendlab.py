"""What the tests of backends share: a configuration, an external interface, facts, and kernels that lack a device."""

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest

from flannel.backends.base import Facts
from flannel.interface import External
from flannel.kernel.values import Link
from flannel.lease import Lease, LeaseAttrs
from flannel.netconf import NetConf, parse
from tests.flannel.corelab import Node

EXTERNAL = External(2, "eth0", 1500, IPv4Address("192.168.50.1"), IPv4Address("192.168.50.1"))


def conf(**backend: Any) -> NetConf:
    """A network configuration with this backend."""
    return parse(json.dumps({"Network": "10.244.0.0/16", "Backend": backend}))


def facts(tunnel: str = "", *direct: str, ifindex: int = 7) -> Facts:
    """The external interface, a tunnel device of that name, and peers that are reached directly."""
    link = Link(ifindex, tunnel, 1480, b"", 1, "", None) if tunnel else None
    return Facts(EXTERNAL, link, {IPv4Address(one): EXTERNAL.ifindex for one in direct})


def lease(number: int, kind: str, data: Any = None) -> Lease:
    """The lease of another node: 10.244.N.0/24 at 192.168.50.N."""
    return Lease(
        IPv4Network(f"10.244.{number}.0/24"), LeaseAttrs(IPv4Address(f"192.168.50.{number}"), kind, data)
    )  # fmt: skip


def need_link(node: Node, *kind: str) -> None:
    """Skip where this kernel has no such device."""
    if node.run("sh", "-c", f"ip link add probe0 type {' '.join(kind)} && ip link del probe0 && echo yes", check=False):
        return
    pytest.skip(f"this kernel has no {kind[0]}; the guest kernel has")
