"""The lab's Kubernetes API, away for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from testbed.deadline import Deadline
from testbed.errors import LabError

if TYPE_CHECKING:
    from testbed.nodes.deploy import Cluster

SERVER = "kube-apiserver"
GONE_SECONDS, BACK_SECONDS = 10.0, 60.0


@contextmanager
def api_away(cluster: Cluster) -> Iterator[None]:
    """While the block lasts nothing answers where the API was; behind it the API serves again.

    Raises LabError where the lab's leases are elsewhere, or where it does not come back.
    """
    api = cluster.kubernetes
    node = api.node
    script = 'pid=$(cat "$1") && kill -KILL "$pid" && while kill -0 "$pid" 2>/dev/null; do sleep 0.02; done'
    node.run(["sh", "-c", script, "kill", f"/run/{SERVER}.pid"], timeout=GONE_SECONDS)
    try:
        yield
    finally:
        node.start(api.plane.apiserver_argv(), name=SERVER)
        if not Deadline(BACK_SECONDS).poll(api.serves, every=0.2):
            raise LabError(f"the API does not serve {BACK_SECONDS:.0f} s after it was started", where=node.name)
