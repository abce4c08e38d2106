"""An address that is a pod's by translation alone, as a Service's is, made by hand on one node."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address

from testbed.labs.base import Place

VIRTUAL = IPv4Address("198.51.100.77")
"""An address of the documentation's that no machine of a lab has."""

_TABLE = "testbed_translated"


@contextmanager
def translated(node: Place, target: IPv4Address, *, virtual: IPv4Address = VIRTUAL) -> Iterator[IPv4Address]:
    """While the block lasts, what comes to a node for `virtual` goes to `target`; gives the former."""
    rules = [
        f"add table ip {_TABLE}",
        f"add chain ip {_TABLE} arriving {{ type nat hook prerouting priority dstnat; }}",
        f"add rule ip {_TABLE} arriving ip daddr {virtual} dnat to {target}",
    ]
    try:
        node.run(["nft", "-f", "-"], stdin="\n".join(rules) + "\n")
        yield virtual
    finally:
        node.run(["nft", "delete", "table", "ip", _TABLE], check=False)
