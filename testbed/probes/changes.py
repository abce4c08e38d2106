"""What changes in a node's kernel, in the order in which the kernel tells it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from testbed.deadline import Deadline
from testbed.errors import LabError
from testbed.labs.base import Node, Place

LISTENS_SECONDS = 5.0
_LOG = "/var/log/monitor.log"


@contextmanager
def recorded_changes(node: Node) -> Iterator[Callable[[], list[str]]]:
    """While the block runs, record routes, neighbours and forwarding entries that come and go.

    Yields what returns the lines so far, as `ip -o monitor` writes them. Raises LabError where it does not start.
    """
    node.write(_LOG, "")  # what was recorded before is not of this block
    before = _listeners(node)
    pid = node.start(["ip", "-o", "monitor", "neigh", "route"], name="monitor")
    try:
        if not Deadline(LISTENS_SECONDS).poll(lambda: _listeners(node) > before, every=0.02):
            raise LabError("`ip monitor` does not listen", where=node.name)
        yield lambda: node.read(_LOG).decode(errors="replace").splitlines()
    finally:
        node.run(["kill", str(pid)], check=False)


def _listeners(place: Place) -> int:
    """How many sockets of this network the kernel tells of routes and neighbours."""
    lines = place.run(["cat", "/proc/net/netlink"]).stdout.splitlines()[1:]
    return sum(1 for line in lines if line.split()[1] == "0" and int(line.split()[3], 16))
