"""The Clabernetes resource: the published shape, what a pod cannot have, and what the lab's model says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from testbed.clabernetes import BATCH, check_clabernetes, render_clabernetes
from testbed.errors import LabError
from testbed.flannelbuild import default_flannel
from testbed.ipv6 import with_ipv6
from testbed.model import LabSpec
from testbed.render import Images
from testbed.targets import render_target
from testbed.topology import load_topology

DATA = Path(__file__).parents[1] / "data"
SHAPE = yaml.safe_load((DATA / "clabernetes-topology.yml").read_text())
TYPES: dict[str, Any] = {"string": str, "boolean": bool, "object": dict, "map": dict, "list": list}
CONFIG_MAP_BYTES = 1 << 20
POD_NAME = 63


def misshapen(value: Any, shape: Mapping[str, Any], where: str = "") -> list[str]:
    """Where a value differs from a shape of tests/data."""
    if type(value) is not TYPES[shape["type"]]:
        return [f"{where} is no {shape['type']}"]
    faults = []
    if "enum" in shape and value not in shape["enum"]:
        faults.append(f"{where} is {value!r}")
    if "values" in shape:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in pairs:
            faults += misshapen(item, shape["values"], f"{where}.{key}")
    if "keys" in shape:
        faults += [f"{where}.{key} is not known" for key in value if key not in shape["keys"]]
        for key, inner in shape["keys"].items():
            if key in value:
                faults += misshapen(value[key], inner, f"{where}.{key}")
            elif inner.get("required"):
                faults.append(f"{where}.{key} is missing")
    return faults


WHOLE = {"type": "object", "keys": SHAPE}


def dual_stack() -> LabSpec:
    return with_ipv6(load_topology("racks", "t1"))


LABS = {
    "racks": lambda: load_topology("racks", "t1"),
    "flat": lambda: load_topology("flat", "t1"),
    "clos": lambda: load_topology("clos", "t1", overrides={"racks": "6"}),
    "faulty": lambda: load_topology(str(DATA / "faulty-vrf.yml"), "t1"),
    "dual_stack": dual_stack,
}


@pytest.fixture(params=LABS)
def lab(request: pytest.FixtureRequest) -> LabSpec:
    made: LabSpec = LABS[request.param]()
    return made


def documents(lab: LabSpec) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """The ConfigMaps, the resource, and the topology in it."""
    *maps, resource = yaml.safe_load_all(render_clabernetes(lab, Images()))
    return maps, resource, yaml.safe_load(resource["spec"]["definition"]["containerlab"])


def test_the_resource_has_the_published_shape(lab: LabSpec) -> None:
    _, resource, _ = documents(lab)
    assert misshapen(resource, WHOLE) == []


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        ("apiVersion", "v1", "apiVersion is 'v1'"),
        ("spec.expose.disableExpose", True, "disableExpose is not known"),
        ("spec.expose.exposeType", "none", "exposeType is 'none'"),
        ("spec.definition.containerlab", {}, "containerlab is no string"),
        ("spec.deployment.filesFromConfigMap.leaf1", [{"filePath": "/x"}], "configMapName is missing"),
        ("metadata.name", None, "name is no string"),
    ],
)
def test_another_shape_is_found(path: str, value: object, fault: str) -> None:
    _, resource, _ = documents(load_topology("racks", "t1"))
    *inner, last = path.split(".")
    place = resource
    for key in inner:
        place = place[key]
    place[last] = value
    assert any(fault in found for found in misshapen(resource, WHOLE))


def test_every_file_is_in_a_config_map_that_a_cluster_takes(lab: LabSpec) -> None:
    maps, resource, _ = documents(lab)
    data = {entry["metadata"]["name"]: entry["data"] for entry in maps}
    assert len(data) == len(maps)
    mounts = resource["spec"]["deployment"]["filesFromConfigMap"]
    assert set(mounts) == {node.name for node in lab.nodes}
    for node in lab.nodes:
        paths = {mount["filePath"]: data[mount["configMapName"]][mount["configMapPath"]] for mount in mounts[node.name]}
        assert BATCH in paths
        assert ("/etc/frr/frr.conf" in paths) is node.routes
    for name, files in data.items():
        assert sum(map(len, files.values())) < CONFIG_MAP_BYTES
        assert len(name) <= POD_NAME


def test_nothing_is_asked_that_a_pod_cannot_have(lab: LabSpec) -> None:
    """Clabernetes refuses binds and a restart policy of `no`; a pod's eth0 is the cluster's."""
    _, _, definition = documents(lab)
    topology = definition["topology"]
    assert topology["defaults"] == {"kind": "linux"}
    assert {key for node in topology["nodes"].values() for key in node} == {"image", "exec"}
    ends = [(end["node"], end["interface"]) for link in topology["links"] for end in link["endpoints"]]
    assert len(set(ends)) == len(ends)
    assert not [end for end in ends if end[1] == "eth0"]
    assert {(node.name, "eth1") for node in lab.cluster_nodes} <= set(ends)


def test_every_machine_addresses_the_interfaces_that_it_has(lab: LabSpec) -> None:
    maps, _, definition = documents(lab)
    topology = definition["topology"]
    for node, content in zip(lab.nodes, maps, strict=True):
        has = {e["interface"] for link in topology["links"] for e in link["endpoints"] if e["node"] == node.name}
        batch = content["data"]["addresses.batch"].splitlines()
        set_up = {line.split()[2] for line in batch if line.startswith("link set ") and line.endswith(" up")}
        assert has <= set_up
        assert not [line for line in batch if " default " in line or "eth0" in line.split()]
        named = [line.split() for line in content["data"].get("frr.conf", "").splitlines()]
        assert {words[1] for words in named if words[2:3] == ["interface"]} <= has
        assert any(BATCH in command for command in topology["nodes"][node.name]["exec"])


def test_a_node_reaches_every_other_network_through_its_leaf() -> None:
    lab = load_topology("racks", "t1")
    maps, _, _ = documents(lab)
    [batch] = [entry["data"]["addresses.batch"] for entry in maps if entry["metadata"]["name"] == "t1-worker1"]
    node = lab.node("worker1")
    for other in lab.nodes:
        if other.rack != node.rack and not (other.routes and other.bridge_address):
            assert any(
                line.startswith("route replace ") and line.split()[2].split("/")[0].rpartition(".")[0] in str(other.ip)
                for line in batch.splitlines()
            ), other.name
    assert f"via {node.gateway} dev eth1" in batch


def test_what_says_something_else_than_the_model_is_found(lab: LabSpec) -> None:
    text = render_clabernetes(lab, Images())
    check_clabernetes(text, lab)
    node = next(node for node in lab.nodes if node.routes)
    for old, new in (
        ("mtu: ", "mtu: 1"),
        (f"      {node.name}:\n", "      other:\n"),
        (f"-{node.name}\n        configMapPath", "-other\n        configMapPath"),
        ("link set lo up", "link set lo down"),
        ("mac: 02", "mac: 06"),
    ):
        assert old in text, old
        with pytest.raises(LabError, match="does not say what the lab's model says"):
            check_clabernetes(text.replace(old, new, 1), lab)
    other = replace(lab, links=lab.links[:-1])
    with pytest.raises(LabError):
        check_clabernetes(text, other)


def test_it_is_rendered_for_whoever_asks_for_it() -> None:
    lab, flannel = load_topology("racks", "t1"), default_flannel("vxlan")
    assert sorted(render_target(lab, flannel, "clabernetes")) == ["README.md", "clabernetes.yml"]
