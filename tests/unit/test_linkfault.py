"""Faults of links and VRFs of leaves: their units, what a file may say of them, and what is made of that."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.errors import InputError, LabError
from testbed.labs import plan, state
from testbed.labs.faults import present
from testbed.linkfault import LinkFault, problems, quantity
from testbed.model import LabSpec
from testbed.render import Images, render_clab
from testbed.rendered import check_clab
from testbed.report.drawing import draw
from testbed.topology import _links_of as links_of
from testbed.topology import _piece as piece
from testbed.topology import list_topologies, load_topology

RACKS = """\
mtu: 1500
spines: 2
outside: 203.0.113.8
racks:
  - {leaf: leaf1, subnet: 10.1.0.0/24, nodes: [master1, worker1]}
  - {leaf: leaf2, subnet: 10.2.0.0/24, nodes: [worker2]}
"""


def load(tmp_path: Path, links: str, base: str = RACKS) -> LabSpec:
    path = tmp_path / "lab.yml"
    path.write_text(f"{base}{links}")
    return load_topology(str(path), "t1")


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("time", "2ms", 2.0),
        ("time", "1.5 s", 1500.0),
        ("time", "250us", 0.25),
        ("percentage", "0.5%", 0.5),
        ("rate", "100mbit", 100.0),
        ("rate", "64kbit", 0.064),
        ("rate", "10gbit", 10_000.0),
    ],
)
def test_quantities(kind: str, text: str, value: float) -> None:
    assert quantity(kind, text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("kind", "value", "what"),
    [
        ("time", 2, "2 has no unit; such as 2ms"),
        ("time", "-2ms", "is no time"),
        ("time", "2mbit", "is no time"),
        ("percentage", "1", "1 has no unit; such as 1%"),
        ("percentage", None, "is no percentage"),
        ("rate", "1e9mbit", "is no rate"),
        ("rate", True, "is no rate"),
    ],
)
def test_what_is_no_quantity(kind: str, value: object, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        quantity(kind, value)


def test_the_links_of_a_file(tmp_path: Path) -> None:
    links = """
links:
  leaf1-spine1: {delay: 2ms, jitter: 1ms, loss: 1%, reorder: 5%, duplicate: 2%, corrupt: 0.1%, rate: 100mbit}
  spine2-leaf1: {loss: 0.5%, towards: leaf1}
"""
    lab = load(tmp_path, links)
    found = {link.name: link.fault for link in lab.links if link.fault}
    assert found == {
        "leaf1-spine1": LinkFault(2, 1, 1, 5, 2, 0.1, 100),
        "leaf1-spine2": LinkFault(loss=0.5, towards="leaf1"),
    }
    one_way = lab.link("spine2-leaf1")
    assert [str(end) for end in one_way.senders(found["leaf1-spine2"])] == ["spine2:swp1"]
    assert [str(end) for end in lab.link("leaf1-spine1").senders(found["leaf1-spine1"])] == [
        "leaf1:swp1",
        "spine1:swp1",
    ]
    assert lab.kernel_features == ("netem",)
    # What later commands read of a lab says it too.
    assert state._SPEC.validate_python(state._SPEC.dump_python(lab, mode="json")) == lab


def test_a_lab_without_faults_needs_nothing_more(tmp_path: Path) -> None:
    assert load(tmp_path, "").kernel_features == ()
    assert load(tmp_path, "links: {}\n").kernel_features == ()


def test_every_fault_of_the_links_at_once(tmp_path: Path) -> None:
    links = """\
links:
  leaf1-spine3: {delay: 2ms}
  leaf1-spine1: {delay: 2, jitter: 1kg, los: 1%}
  spine1-leaf1: {reorder: 3%}
  leaf2-spine1: {loss: 101%, towards: leaf1}
  leaf2-spine2: {}
  worker1-worker2: {delay: 20s}
  worker2-leaf2: 7
  outside-spine1: {rate: 200gbit}
  outside-spine2: {jitter: 1ms, loss: 1%}
"""
    with pytest.raises(InputError) as error:
        load(tmp_path, links)
    first = RACKS.count("\n") + 1
    assert [(fault.line - first, fault.key, fault.what, fault.hint) for fault in error.value.faults] == [
        (1, "links.leaf1-spine3", "there is no such link", "did you mean leaf1-spine2?"),
        (2, "links.leaf1-spine1.delay", "2 has no unit", "such as 2ms; units: us, ms, s"),
        (2, "links.leaf1-spine1.jitter", "'1kg' is no time", "such as 2ms; units: us, ms, s"),
        (2, "links.leaf1-spine1.los", "unknown key", "did you mean loss?"),
        (3, "links.spine1-leaf1", "is leaf1-spine1, which is here already", "say all of a link in one place"),
        (
            3,
            "links.spine1-leaf1.reorder",
            "reorder lets some packets go without the delay of the others, and there is none",
            "give a delay too",
        ),
        (4, "links.leaf2-spine1.loss", "101 % is not from 0 to 100", ""),
        (4, "links.leaf2-spine1.towards", "leaf1 is no end of this link", "leaf2 or spine1"),
        (5, "links.leaf2-spine2", "no fault", "give one of delay, loss, duplicate, corrupt, rate"),
        (6, "links.worker1-worker2", "there is no such link", "did you mean worker1-leaf1?"),
        (6, "links.worker1-worker2.delay", "20000 ms is not from 0 to 10000", ""),
        (7, "links.worker2-leaf2", "has to be a mapping, not 7", ""),
        (8, "links.outside-spine1.rate", "200000 Mbit/s is not from 0.001 to 100000", ""),
        (9, "links.outside-spine2.jitter", "jitter varies a delay, and there is none", "give a delay too"),
    ]


def test_an_unknown_link_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"links: master1-leaf1, worker1-leaf1, worker2-leaf2, leaf1-spine1, leaf1-spi"
    ):
        load(tmp_path, "links: {x: {delay: 2ms}}\n")


@pytest.mark.parametrize("name", ["leaf1-spine1-leaf1", "leaf1-leaf1-spine1", "leaf1", "leaf1-leaf1", "-leaf1"])
def test_what_is_nearly_a_link_is_none(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"links.{name}: there is no such link"):
        load(tmp_path, f"links: {{{name}: {{delay: 2ms}}}}\n")


def test_what_is_wrong_with_the_racks_does_not_show_again_in_the_links(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        load(
            tmp_path,
            "links: {worker1-leaf1: {delay: 2ms}}\n",
            RACKS.replace("[master1, worker1]", "[master1, worker_1]"),
        )
    assert [fault.key for fault in error.value.faults] == ["racks[0].nodes[1]"]


@pytest.mark.parametrize("name", [topology.name for topology in list_topologies()])
def test_the_links_that_a_file_may_name_are_the_lab_s(name: str) -> None:
    lab = load_topology(name, "t1")
    leaves = {leaf: [node.name for node in lab.cluster_nodes if node.rack == leaf] for leaf in
              dict.fromkeys(node.rack for node in lab.cluster_nodes)}  # fmt: skip
    racks = [piece(("racks", 0), {"leaf": leaf, "nodes": nodes}) for leaf, nodes in leaves.items()]
    spines = sum(node.name.startswith("spine") for node in lab.nodes)
    assert ["-".join(pair) for pair in links_of(racks, {"spines": spines}).values()] == [x.name for x in lab.links]


def test_the_words_for_tc_and_for_people() -> None:
    fault = LinkFault(2.5, 0.0001, 1, 5, 2, 0.01, 0.064)
    assert " ".join(fault.netem()) == (
        "netem limit 10000 delay 2.5ms 0.0001ms loss 1% reorder 5% duplicate 2% corrupt 0.01% rate 64kbit"
    )
    assert str(fault) == (
        "delay 2.5 ms ± 0.0001 ms, loss 1 %, reorder 5 %, duplicate 2 %, corrupt 0.01 %, rate 0.064 Mbit/s"
    )
    assert str(LinkFault(loss=10, towards="leaf1")) == "loss 10 % towards leaf1"
    assert (str(LinkFault(down=True)), LinkFault(down=True).netem()) == ("down", ())


def test_two_faults_at_once() -> None:
    assert LinkFault(loss=10).over(LinkFault(delay=5, loss=1)) == LinkFault(delay=5, loss=10)


def test_a_fault_that_makes_no_sense() -> None:
    assert [key for key, _, _ in problems(LinkFault(down=True, towards="leaf1"), ("leaf1", "spine1"))] == ["towards"]
    assert [what for _, what, _ in problems(LinkFault())] == ["no fault"]
    assert [key for key, _, _ in problems(LinkFault(delay=-1, loss=-1))] == ["loss", "delay"]
    assert not list(problems(LinkFault(down=True)))


# --- leaves with a VRF


def test_leaves_with_a_vrf_and_nobody_else(tmp_path: Path) -> None:
    lab = load(tmp_path, "leaf_vrf: fabric\n")
    assert {node.name: node.vrf for node in lab.nodes if node.vrf} == {"leaf1": "fabric", "leaf2": "fabric"}
    assert lab.kernel_features == ("vrf",)
    both = load(tmp_path, "leaf_vrf: fabric\nlinks: {leaf1-spine1: {loss: 1%}}\n")
    assert both.kernel_features == ("netem", "vrf")
    assert state._SPEC.validate_python(state._SPEC.dump_python(both, mode="json")) == both


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("default", "default is the name of something else"),
        ("swp1", "swp1 is the name of something else"),
        ("br0", "br0 is the name of something else"),
        ("Fabric", "'Fabric' is no name"),
        ("averylongname", "'averylongname' is no name"),
        ("7", "has to be a name"),
    ],
)
def test_what_a_vrf_cannot_be_called(name: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"leaf_vrf: {what}"):
        load(tmp_path, f"leaf_vrf: {name}\n")


def test_everything_of_a_leaf_is_in_its_vrf(tmp_path: Path) -> None:
    lab = load(tmp_path, "leaf_vrf: fabric\n")
    leaf = plan.node_plan(lab, lab.node("leaf1"))
    lines = leaf["batch"].splitlines()
    assert lines[1] == "link add fabric type vrf table 1001"
    for device in ("br0", "swp1", "swp2"):
        assert lines.index(f"link set {device} master fabric") < lines.index(f"link set {device} up")
    assert "addr replace 172.31.1.1/32 dev fabric" in lines
    config = leaf["files"]["/etc/frr/frr.conf"]
    assert "\nrouter bgp 65101 vrf fabric\n" in config
    assert "\ninterface fabric\n ip address 172.31.1.1/32\n" in config
    assert plan.VRF_EXEC in leaf["files"]
    spine = plan.node_plan(lab, lab.node("spine1"))
    assert "vrf" not in spine["batch"] + spine["files"]["/etc/frr/frr.conf"]
    assert plan.VRF_EXEC not in spine["files"]


def test_a_port_that_is_not_in_the_vrf_is_a_fault_of_the_wiring(tmp_path: Path) -> None:
    lab = load(tmp_path, "leaf_vrf: fabric\n")
    leaf = lab.node("leaf1")
    ports = [
        {"ifname": port.name, "mtu": port.mtu, "address": port.mac, "flags": ["UP"], "addr_info": [],
         "master": port.bridge or "fabric"} for port in leaf.ifaces
    ]  # fmt: skip
    gateway = {"local": "10.1.0.1", "prefixlen": 24, "family": "inet", "scope": "global"}
    bridge = {"ifname": "br0", "addr_info": [gateway], "master": "fabric"}
    facts = {"addresses": [*ports, bridge], "offloads": {}}
    assert plan._node_faults(leaf, facts) == []
    wrong = {**facts, "addresses": [*ports[:-1], {**ports[-1], "master": None}, {**bridge, "master": None}]}
    assert plan._node_faults(leaf, wrong) == [
        "leaf1:swp2: belongs to None, not fabric",
        "leaf1:br0: belongs to None, not fabric",
    ]


def test_a_machine_runs_the_faults_of_what_it_sends(tmp_path: Path) -> None:
    lab = load(tmp_path, "links: {leaf1-spine1: {loss: 1%}, worker2-leaf2: {delay: 2ms, towards: worker2}}\n")
    batches = {node.name: plan.fault_batch(lab, node) for node in lab.nodes}
    assert {name: batch for name, batch in batches.items() if batch} == {
        "leaf1": "qdisc replace dev swp1 root netem limit 10000 loss 1%\n",
        "spine1": "qdisc replace dev swp1 root netem limit 10000 loss 1%\n",
        "leaf2": "qdisc replace dev node1 root netem limit 10000 delay 2ms\n",
    }


# --- where they are shown


def test_a_faulty_link_is_drawn_as_one(tmp_path: Path) -> None:
    lab = load(tmp_path, "links: {leaf1-spine1: {loss: 1%}}\n")
    svg = draw(lab, faults=present(lab, {}))
    assert svg.count('class="link faulty"') == 1
    assert ">loss 1 %</text>" in svg
    assert 'class="link faulty"' not in draw(lab, faults=present(lab, {"faults": {}})), "what is remembered counts"
    assert present(lab, {"faults": {"leaf1-spine1": "down"}}) == {"leaf1-spine1": "down"}


def test_what_containerlab_is_told_of_faults_is_compared_with_the_model() -> None:
    spec = load_topology(str(Path(__file__).parents[1] / "data" / "faulty-vrf.yml"), "t1")
    text = render_clab(spec, Images())
    check_clab(text, spec, {}, "eth0")
    with pytest.raises(LabError, match="faults of links"):
        check_clab(text.replace("loss 0.5%", "loss 5%"), spec, {}, "eth0")
