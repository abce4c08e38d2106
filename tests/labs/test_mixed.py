"""The bundled flanneld and another one in one cluster, two nodes each: leases and traffic both ways.

`TESTBED_PEER=PATH` names the other flanneld, for example upstream's; without it these tests are skipped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import pytest

from testbed.deadline import Deadline
from testbed.doctor import probe_features
from testbed.flannelspec import BACKENDS
from testbed.nodes import deploy
from testbed.nodes.deploy import Cluster
from testbed.nodes.nodefiles import FLANNELD
from testbed.nodes.otherwise import restart_flanneld
from testbed.options import RunOptions
from testbed.probes.flows import http_get
from testbed.tools import ToolUnavailable, build_tool
from tests.labs.helpers import unique

PEER = os.environ.get("TESTBED_PEER", "")
THEIRS, OURS = ("worker2", "worker3"), ("master1", "worker1")
SECONDS = 20.0
CASES = [
    (run, store)
    for store in ("etcd", "kubernetes")
    for run in ("vxlan", "vxlan_direct", "host_gw", "udp", "ipip", "ipip_direct", "wireguard", "ipsec", "dual_stack")
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Four nodes, two of each; a pod that asks on every one."""
    if not PEER:
        pytest.skip("there is no other flanneld to run beside: TESTBED_PEER=PATH names one")
    run, store = request.param
    features = probe_features()
    lacks = [one for one in BACKENDS[run].kernel_features if not features[one]["ok"]]
    if lacks:
        pytest.skip(f"this kernel has no {', '.join(lacks)}: `testbed kernel run -- python -m pytest {__file__}` has")
    if store == "kubernetes":
        try:
            build_tool("kubernetes")
        except ToolUnavailable as error:
            pytest.skip(str(error))
    peer = Path(PEER).resolve()
    options = RunOptions(backend=run, name=unique("mixed"), store=store, flanneld=dict.fromkeys(THEIRS, peer))
    made = deploy.bring_up(options)
    try:
        for name in (*OURS, *THEIRS):
            if f"{name}/client" not in made.pods:
                made.add_pod(name, "client")
        yield made
    finally:
        made.lab.down()


def all_answer(cluster: Cluster) -> bool:
    """Whether every node's client gets an answer from every other node's pod."""
    pairs = permutations((*OURS, *THEIRS), 2)
    return all(
        not http_get(cluster.pod(f"{one}/client"), cluster.pod(f"{other}/testapp").address, wait=1.0).error
        for one, other in pairs
    )


def soon(cluster: Cluster) -> bool:
    """The same, by a deadline."""
    return bool(Deadline(SECONDS).poll(lambda: all_answer(cluster) or None))


def logs(cluster: Cluster) -> str:
    """The ends of all logs."""
    return "\n".join(f"-- {name}\n{cluster.flanneld_log(name, 8)}" for name in (*OURS, *THEIRS))


def test_every_pod_reaches_every_other(cluster: Cluster) -> None:
    assert {name: cluster.implementation(name) == "bundled" for name in (*OURS, *THEIRS)} == {
        **dict.fromkeys(OURS, True), **dict.fromkeys(THEIRS, False)
    }  # fmt: skip
    assert soon(cluster), logs(cluster)


def test_leases_are_of_one_form(cluster: Cluster) -> None:
    """Keys, fields and types are the same, whoever wrote them."""
    leases = cluster.leases()
    assert set(leases) == {*OURS, *THEIRS}

    def form(value: object) -> object:
        if isinstance(value, dict):
            return {key: form(item) for key, item in value.items()}
        return type(value).__name__

    forms = {json.dumps(form(lease["value"]), sort_keys=True) for lease in leases.values()}
    assert len(forms) == 1, forms
    assert len({lease["key"] for lease in leases.values()}) == 4


@pytest.mark.parametrize("name", ["worker1", "worker2"])
def test_a_restart_of_either_is_followed_by_the_other(cluster: Cluster, name: str) -> None:
    before = cluster.leases()[name]
    restart_flanneld(cluster, name)
    assert cluster.leases()[name]["key"] == before["key"]
    assert soon(cluster), logs(cluster)


@pytest.mark.parametrize(("before", "after"), [("bundled", "peer"), ("peer", "bundled")])
def test_one_takes_over_from_the_other(cluster: Cluster, before: str, after: str) -> None:
    """A rolling upgrade: the node keeps its subnet, and pods keep their network."""
    name = "worker1" if before == "bundled" else "worker2"
    lease = cluster.leases()[name]
    node = cluster.lab.node(name)
    other = "worker2" if before == "bundled" else "worker1"
    mine, theirs = (cluster.lab.node(one).read(FLANNELD) for one in (name, other))
    try:
        restart_flanneld(cluster, name, meanwhile=lambda _: node.write(FLANNELD, theirs, mode=0o755))
        assert cluster.leases()[name]["key"] == lease["key"]
        assert soon(cluster), logs(cluster)
    finally:
        restart_flanneld(cluster, name, meanwhile=lambda _: node.write(FLANNELD, mine, mode=0o755))
    assert soon(cluster), logs(cluster)
