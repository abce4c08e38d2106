"""Pods in the network of their node, as hostNetwork makes them: CNI knows nothing of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from testbed.labs.base import Node
from testbed.nodes import pods as podlib

NAME = "host"
"""What such a pod says it is called."""
_DAEMON = f"pod-{NAME}"
_LOG = f"/var/log/{_DAEMON}.log"


@contextmanager
def host_pod(*nodes: Node) -> Iterator[None]:
    """The test application in these nodes' own networks for as long as the block lasts. Raises LabError."""
    with ExitStack() as stack:
        for node in nodes:
            node.run(["rm", "-f", _LOG], check=False)
            node.start(podlib.server_argv(NAME, node.name, str(node.spec.ip)), name=_DAEMON)
            stack.callback(_stop, node)
        for node in nodes:
            podlib.wait_listening(node, _LOG, f"{node.name}'s own pod")
        yield


def _stop(node: Node) -> None:
    node.run(["sh", "-c", 'kill "$(cat "$1")"', "stop", f"/run/{_DAEMON}.pid"], check=False)
