"""A node that starts anew: flannel is well again, with the same subnet, and nobody keeps what is stale."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from testbed.deadline import Deadline
from testbed.nodes.deploy import Cluster, bring_up
from testbed.nodes.restart import restart_node
from testbed.options import RunOptions
from tests.labs.helpers import unique

WELL_SECONDS = 60.0
"""RES-07's bound, which counts from flannel's being ready."""

_ASK = """
import sys, urllib.request
print(urllib.request.urlopen(f"http://{sys.argv[1]}/", timeout=2).read().decode())
"""


@pytest.fixture(scope="module")
def cluster(kind: str) -> Iterator[Cluster]:
    """A whole cluster on a lab of each kind."""
    made = bring_up(RunOptions(backend="vxlan", name=unique("anew"), lab=kind))
    yield made
    made.lab.down()


def answers(cluster: Cluster, source: str, target: str) -> bool:
    """Whether a pod answers another one."""
    pod = cluster.pod(target)
    done = cluster.pod(source).run(["/usr/bin/python3", "-c", _ASK, str(pod.address)], check=False)
    return done.ok and json.loads(done.stdout)["pod"] == pod.pod_name


def stale(cluster: Cluster, name: str) -> list[str]:
    """What other nodes still have of a node's VTEP as it was before."""
    address, mac = str(cluster.lab.node(name).spec.ip), cluster.leases()[name]["value"]["BackendData"]["VtepMAC"]
    found = []
    for other in cluster.members:
        if other.name != name:
            lines = other.run(["bridge", "fdb", "show", "dev", "flannel.1"]).stdout.splitlines()
            found += [f"{other.name}: {line}" for line in lines if f"dst {address} " in line and mac not in line]
    return found


@pytest.mark.parametrize("name", ["worker3", "worker1", "master1", "leaf1"])
def test_flannel_is_well_after_a_node_has_started_anew(cluster: Cluster, name: str) -> None:
    subnets = {member.name: cluster.pod_cidr(member.name) for member in cluster.members}
    restart_node(cluster, name)
    assert {member.name: cluster.pod_cidr(member.name) for member in cluster.members} == subnets
    pairs = [("worker1/client", "worker3/testapp"), ("worker3/testapp", "worker1/client")]
    pairs += [("worker1/client", "master1/testapp"), ("worker2/testapp", "worker1/testapp")]
    waiting = Deadline(WELL_SECONDS)
    for source, target in pairs:
        reached = waiting.poll(lambda s=source, t=target: answers(cluster, s, t) or None)  # type: ignore[misc]
        assert reached, f"{source} does not reach {target}"
    if name != "leaf1":
        assert waiting.poll(lambda: not stale(cluster, name) or None), stale(cluster, name)
    assert set(cluster.pods) == {f"{m.name}/testapp" for m in cluster.members} | {"worker1/client"}
