"""A lab whose leases are in a real Kubernetes API: rights, an API that is away, what a node remembers."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from testbed.deadline import Deadline
from testbed.labs import interpreter
from testbed.nodes import deploy
from testbed.nodes.deploy import Cluster
from testbed.nodes.kubernetes import FOLDER, PODS_FILES, Call
from testbed.options import RunOptions
from testbed.probes.flows import http_get
from testbed.tools import ToolUnavailable, build_tool
from tests.labs.helpers import unique

PREFIX = "flannel.alpha.coreos.com/"
NEW, SECONDS = "10.244.77.0/24", 30.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """vxlan on the smallest topology."""
    try:
        build_tool("kubernetes")
    except ToolUnavailable as error:
        pytest.skip(str(error))
    made = deploy.bring_up(RunOptions(backend="vxlan", name=unique("kube"), topology="flat", store="kubernetes"))
    yield made
    made.lab.down()


def stranger(cidr: str, mac: str = "0a:00:00:00:00:77") -> dict[str, object]:
    """A node of somebody else's, as its flanneld would annotate it."""
    texts = {
        "kube-subnet-manager": "true",
        "backend-type": "vxlan",
        "backend-data": json.dumps({"VNI": 1, "VtepMAC": mac}),
        "public-ip": "10.0.0.77",
    }
    annotations = {PREFIX + key: text for key, text in texts.items()}
    return {"metadata": {"name": "stranger", "annotations": annotations}, "spec": {"podCIDR": cidr, "podCIDRs": [cidr]}}


def routed(cluster: Cluster, subnet: str) -> bool:
    """Whether every node has a route to a subnet."""
    argv = ["ip", "-o", "route", "show", subnet]
    return all(node.run(argv).stdout.strip() for node in cluster.members)


def unrouted(cluster: Cluster, subnet: str) -> bool:
    """Whether no node has a route to a subnet."""
    argv = ["ip", "-o", "route", "show", subnet]
    return not any(node.run(argv).stdout.strip() for node in cluster.members)


def pods_reach_each_other(cluster: Cluster) -> bool:
    """Whether the client gets an answer from every pod."""
    client = next(pod for name, pod in cluster.pods.items() if name.endswith("/client"))
    return all(not http_get(client, pod.address).error for pod in cluster.pods.values() if pod is not client)


def test_flanneld_has_flannels_rights_and_no_others(cluster: Cluster) -> None:
    script = """
import http.client, json, ssl, sys
folder, ca, host = sys.argv[1:]
token = open(folder + "/token").read()
for method, path, body in json.load(sys.stdin):
    connection = http.client.HTTPSConnection(host, 6443, context=ssl.create_default_context(cafile=ca))
    headers = {"Authorization": "Bearer " + token, "Content-Type": "application/strategic-merge-patch+json"}
    connection.request(method, path, body, headers)
    print(connection.getresponse().status)
"""
    patch = json.dumps({"metadata": {"annotations": {"example.com/x": "y"}}})
    asked = [
        ("GET", "/api/v1/nodes", None),
        ("PATCH", "/api/v1/nodes/worker1/status", patch),
        ("PATCH", "/api/v1/nodes/worker1", patch),
        ("DELETE", "/api/v1/nodes/worker1", None),
        ("GET", "/api/v1/secrets", None),
    ]
    node = cluster.lab.node(cluster.lab.spec.control_plane)
    argv = [interpreter(), "-c", script, PODS_FILES, f"{FOLDER}/ca.crt", str(node.spec.ip)]
    assert node.run(argv, stdin=json.dumps(asked)).stdout.split() == ["200", "200", "403", "403", "403"]


def test_an_api_server_that_is_away_costs_nothing(cluster: Cluster) -> None:
    api, node = cluster.kubernetes, cluster.lab.node(cluster.lab.spec.control_plane)
    api.ask(Call("POST", "/api/v1/nodes", stranger(NEW)))
    assert Deadline(SECONDS).poll(lambda: routed(cluster, NEW) or None), "a new node is not routed"
    node.run(["sh", "-c", 'kill -KILL "$(cat "$1")"', "kill", "/run/kube-apiserver.pid"])
    assert Deadline(SECONDS).poll(lambda: "the store is away" in cluster.flanneld_log("worker1") or None)
    assert routed(cluster, NEW)
    assert pods_reach_each_other(cluster)
    node.start(api.plane.apiserver_argv(), name="kube-apiserver")
    # It has no memory of old versions: what is deleted before flanneld is back shows in a list alone.
    assert Deadline(60.0).poll(lambda: api.try_delete("stranger") or None), "the API server did not come back"
    assert Deadline(SECONDS).poll(lambda: unrouted(cluster, NEW) or None), "a deleted node is still routed"
    assert pods_reach_each_other(cluster)


def test_a_rebooted_node_has_its_mac_again(cluster: Cluster) -> None:
    """All of /run and the device are gone; peers know the MAC by the annotation."""
    node = cluster.lab.node("worker1")
    before = cluster.leases()["worker1"]
    cluster.stop_flanneld("worker1")
    node.run(["sh", "-c", "rm -rf /run/flannel && ip link delete flannel.1"])
    cluster.start_flanneld("worker1")
    cluster.wait_ready(["worker1"])
    assert cluster.leases()["worker1"] == before
    link = json.loads(node.run(["ip", "-j", "link", "show", "flannel.1"]).stdout)[0]
    assert link["address"] == before["value"]["BackendData"]["VtepMAC"]
    assert Deadline(SECONDS).poll(lambda: pods_reach_each_other(cluster) or None)


def test_changed_annotations_are_written_again(cluster: Cluster) -> None:
    before = cluster.leases()
    cluster.kubernetes.annotate("worker1", {PREFIX + "public-ip": "10.0.0.99", PREFIX + "backend-type": None})
    assert Deadline(SECONDS).poll(lambda: cluster.leases() == before or None), cluster.leases()
