"""Reading topologies: what the shipped ones are, and that every fault of a file is told at once, where it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.errors import Exit, InputError
from testbed.model import LabSpec, Role
from testbed.topology import list_topologies, load_topology

GOOD = """\
mtu: 1500
spines: 1
outside: 203.0.113.8
racks:
  - leaf: leaf1
    subnet: 10.1.0.0/24
    nodes: [master1, worker1]
"""


def faults_of(tmp_path: Path, text: str, **options: object) -> list[tuple[int, str, str, str]]:
    path = tmp_path / "lab.yml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        load_topology(str(path), "t1", **options)  # type: ignore[arg-type]
    assert error.value.exit_code == Exit.INPUT
    assert all(fault.file in (str(path), "--set", "--mtu") for fault in error.value.faults)
    return [(fault.line, fault.key, fault.what, fault.hint) for fault in error.value.faults]


def addresses(lab: LabSpec) -> dict[str, str]:
    return {node.name: str(node.underlay.address) for node in lab.cluster_nodes}


def test_racks_is_the_first_seeds_fabric() -> None:
    lab = load_topology("racks", "t1")
    assert addresses(lab) == {
        "master1": "10.0.0.11/24",
        "worker1": "10.0.0.12/24",
        "worker2": "10.0.0.13/24",
        "worker3": "30.0.0.11/24",
    }
    assert (lab.mtu, lab.control_plane, str(lab.outside.ip)) == (9150, "master1", "203.0.113.8")
    assert [n.name for n in lab.of_role(Role.SPINE, Role.LEAF)] == ["leaf1", "leaf2", "spine1", "spine2"]
    assert not lab.same_subnet("worker1", "worker3")


def test_flat_has_one_subnet_no_spine_and_ordinary_frames() -> None:
    lab = load_topology("flat", "t1")
    assert {node.rack for node in lab.cluster_nodes} == {"leaf1"}
    assert (len(lab.cluster_nodes), lab.of_role(Role.SPINE), lab.mtu) == (4, (), 1500)


def test_clos_is_sized_by_its_options() -> None:
    lab = load_topology("clos", "t1", overrides={"racks": "8", "nodes": "4", "spines": "4", "mtu": "1400"})
    assert len(lab.of_role(Role.LEAF)) == 8
    assert len(lab.of_role(Role.SPINE)) == 4
    assert len(lab.cluster_nodes) == 32
    assert {link.mtu for link in lab.links} == {1400}
    assert len({node.underlay.address.network for node in lab.cluster_nodes if node.underlay.address}) == 8


def test_names_addresses_and_macs_of_a_large_fabric_are_unique() -> None:
    lab = load_topology("clos", "t1", overrides={"racks": "256", "nodes": "2", "spines": "64"})
    macs = [iface.mac for node in lab.nodes for iface in node.ifaces]
    names = [node.name for node in lab.nodes]
    ips = [node.ip for node in lab.nodes]
    assert len(set(macs)) == len(macs)
    assert len(set(names)) == len(names)
    assert len(set(ips)) == len(ips)


def test_the_same_lab_has_the_same_macs_and_another_lab_others() -> None:
    assert load_topology("racks", "t1") == load_topology("racks", "t1")
    one, other = load_topology("racks", "t1"), load_topology("racks", "t2")
    assert one.node("worker1").underlay.mac != other.node("worker1").underlay.mac


def test_mtu_on_the_command_line_wins() -> None:
    assert load_topology("racks", "t1", mtu=1400).mtu == 1400


@pytest.mark.parametrize("mtu", [1279, 9217, -1])
def test_mtu_out_of_range(mtu: int) -> None:
    with pytest.raises(InputError, match="1280 to 9216"):
        load_topology("racks", "t1", mtu=mtu)


def test_mtu_said_twice() -> None:
    with pytest.raises(InputError, match="--mtu says it too"):
        load_topology("clos", "t1", mtu=1500, overrides={"mtu": "1400"})


def test_an_unknown_topology_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"no topology called 'rack'(.|\n)*clos, flat, racks"):
        load_topology("rack", "t1")


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the topology: No such file"):
        load_topology(str(tmp_path / "lab.yml"), "t1")


def test_a_folder_and_a_binary_file_are_no_topologies(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Is a directory"):
        load_topology(f"{tmp_path}/", "t1")
    (tmp_path / "b.yml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        load_topology(str(tmp_path / "b.yml"), "t1")


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        ({"rack": "3"}, "did you mean racks?"),
        ({"racks": "0"}, "0 is not a number from 1 to 256"),
        ({"racks": "many"}, "'many' is not a number"),
        ({"mtu": "9999999999999999999999"}, "is not a number"),
    ],
)
def test_options_are_checked(overrides: dict[str, str], what: str) -> None:
    with pytest.raises(InputError) as error:
        load_topology("clos", "t1", overrides=overrides)
    assert what in str(error.value)
    assert {fault.file for fault in error.value.faults} == {"--set"}


def test_a_topology_without_options_says_so() -> None:
    with pytest.raises(InputError, match="it has no options"):
        load_topology("racks", "t1", overrides={"racks": "3"})


def test_every_fault_of_a_file_at_once_with_line_key_and_hint(tmp_path: Path) -> None:
    text = """\
mtu: "no"
spines: 0
outsid: 1
mtu: 5
outside: 10.0.0.5
control_plane: zz
racks:
  - leaf: leaf1
    subnet: 10.0.0.1/24
    nodes: [master1, worker1, master1, no, 5]
  - {leaf: leaf1, subnet: 10.0.0.0/28, nodes: [a, b, c, d, e, f], foo: 1}
  - {leaf: leaf3, subnet: 10.0.0.0/28, nodes: [a1, outside]}
"""
    found = {(line, key): (what, hint) for line, key, what, hint in faults_of(tmp_path, text, overrides={"a": "b"})}
    assert found[1, "mtu"][0] == "has to be a number, not 'no'"
    assert "spine" in found[2, "spines"][0]
    assert found[3, "outsid"] == ("unknown key", "did you mean outside?")
    assert found[4, "mtu"][0] == "given twice, first on line 1"
    assert found[5, "outside"][0].startswith("10.0.0.5 is inside 10.0.0.0/28")
    assert found[6, "control_plane"][0] == "there is no node zz"
    assert found[9, "racks[0].subnet"] == ("10.0.0.1/24 has host bits set", "did you mean 10.0.0.0/24?")
    assert found[10, "racks[0].nodes[2]"][0] == "master1 is already a node of leaf1"
    assert found[10, "racks[0].nodes[4]"][0] == "has to be a name"
    assert found[11, "racks[1].foo"][0] == "unknown key"
    assert found[11, "racks[1].leaf"][0] == "leaf1 is already a leaf"
    assert found[11, "racks[1].subnet"][0] == "10.0.0.0/28 has room for 4 nodes, not 6"
    assert found[12, "racks[2].subnet"][0] == "10.0.0.0/28 overlaps 10.0.0.0/28 of leaf1"
    assert found[12, "racks[2].nodes[1]"][0].startswith("outside is already")
    assert (0, "a") in found


def test_no_is_a_name_and_not_false(tmp_path: Path) -> None:
    path = tmp_path / "lab.yml"
    path.write_text(GOOD.replace("worker1", "no"))
    assert [node.name for node in load_topology(str(path), "t1").cluster_nodes] == ["master1", "no"]


@pytest.mark.parametrize(
    ("old", "new", "key", "what"),
    [
        ("1500", "1279", "mtu", "1279 is too small"),
        ("1500", "9217", "mtu", "9217 is too large"),
        ("1500", "true", "mtu", "has to be a number, not True"),
        ("1500", "1500.5", "mtu", "has to be a number, not 1500.5"),
        ("1500", "0x5dc", "mtu", "has to be a number, not '0x5dc'"),
        ("mtu: 1500\n", "", "mtu", "missing"),
        ("spines: 1", "spines: 65", "spines", "65 is too large"),
        ("203.0.113.8", "203.0.113", "outside", "no IPv4 address"),
        ("203.0.113.8", "172.31.0.9", "outside", "172.31.0.9 is inside 172.31.0.0/16"),
        ("10.1.0.0/24", "10.1.0.0", "racks[0].subnet", "no IPv4 subnet"),
        ("10.1.0.0/24", "172.31.4.0/24", "racks[0].subnet", "overlaps 172.31.0.0/16"),
        ("10.1.0.0/24", "127.0.0.0/24", "racks[0].subnet", "overlaps 127.0.0.0/8"),
        ("10.1.0.0/24", "10.1.0.0/29", "racks[0].subnet", "room for 0 nodes"),
        ("worker1", "Worker1", "racks[0].nodes[1]", "no name"),
        ("worker1", "w-1", "racks[0].nodes[1]", "no name"),
        ("worker1", "workerworker1", "racks[0].nodes[1]", "no name"),
        ("worker1", "spine1", "racks[0].nodes[1]", "spine1 is already a spine"),
        ("[master1, worker1]", "[]", "racks[0].nodes", "has to hold at least one"),
        ("[master1, worker1]", "5", "racks[0].nodes", "has to be a list"),
        ("spines: 1", "spines: $many", "spines", "there is no option many"),
        ("spines: 1", "options: {x: $x}\nspines: 1", "options.x", "has to be a mapping, not '$x'"),
        ("spines: 1", "cables: {}\nspines: 1", "cables", "unknown key"),
        ("racks:", "clos: {racks: 1, nodes: 1, subnets: 10.2.0.0/16, prefix: 24}\nracks:", "clos", "not both"),
    ],
)
def test_one_fault(tmp_path: Path, old: str, new: str, key: str, what: str) -> None:
    found = faults_of(tmp_path, GOOD.replace(old, new, 1))
    assert [k for _, k, _, _ in found] == [key]
    assert what in found[0][2]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "has to be a mapping"),
        ("- a\n", "has to be a mapping"),
        ("mtu: [\n", "not YAML"),
        ("mtu:\t5\n\t- a\n", "not YAML"),
        (GOOD + "---\n" + GOOD, "a second document"),
        ("a: &a [1]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a]\n" + "".join(
            f"c{i}: &c{i} [{', '.join(['*' + ('b' if i == 0 else f'c{i - 1}')] * 9)}]\n" for i in range(8)
        ), "values"),
        ("a: " + "[" * 200 + "]" * 200, "nested deeper"),
        ("a: &a [*a]\n", "levels once aliases"),
        ("a: !!python/object:os.system x\n", "tag"),
        ("a: \x00\n", "not YAML"),
        ("a: " + "x" * 600_000, "larger than 512 KiB"),
    ],
)  # fmt: skip
def test_what_is_no_topology_at_all(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "lab.yml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        load_topology(str(path), "t1")
    assert what in str(error.value)


@pytest.mark.parametrize(
    ("racks", "said"),
    [
        ("", "{file}:1: no racks\n  hint: describe them under racks, or a whole fabric under clos"),
        ("racks: 5", "{file}:7: racks: has to be a list, not 5"),
        ("racks: []", "{file}:7: racks: has to hold at least one, not []"),
        ("clos: {racks: 2, nodes: 1, prefix: 24}", "{file}:7: clos.subnets: missing"),
    ],
)
def test_without_racks_nothing_is_said_of_links(tmp_path: Path, racks: str, said: str) -> None:
    path = tmp_path / "lab.yml"
    links = "links:\n  leaf1-spine1: {delay: 1ms}\n  worker1-leaf1: {loss: 1%}\n"
    path.write_text(f"mtu: 1500\nspines: 1\noutside: 203.0.113.8\n{links}{racks}\n")
    with pytest.raises(InputError) as error:
        load_topology(str(path), "t1")
    assert str(error.value) == said.format(file=path)


def test_a_clos_that_does_not_fit(tmp_path: Path) -> None:
    text = "mtu: 1500\nspines: 1\noutside: 203.0.113.8\nclos: {racks: 5, nodes: 1, subnets: 10.2.0.0/22, prefix: 24}\n"
    assert faults_of(tmp_path, text)[0][1:3] == ("clos.subnets", "10.2.0.0/22 has no 5 subnets of /24")


def test_an_option_with_a_wrong_default_is_a_fault_of_the_file(tmp_path: Path) -> None:
    text = "options:\n  a: {type: integer, default: 5, max: 4}\n" + GOOD
    assert faults_of(tmp_path, text)[0][1] == "options.a"


def test_every_shipped_topology_loads() -> None:
    for topology in list_topologies():
        assert topology.description
        assert load_topology(topology.name, "t1").cluster_nodes


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["10.0.0.0/8", "$x", "leaf1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["mtu", "spines", "racks", "clos", "leaf", "subnet", "nodes", "options", "default", "type", "x"]
    ), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(key=st.sampled_from(["mtu", "spines", "racks", "clos", "outside", "control_plane", "options"]), value=values)
def test_no_value_anywhere_makes_a_traceback(tmp_path_factory: pytest.TempPathFactory, key: str, value: object) -> None:
    content = yaml.safe_load(GOOD)
    content[key] = value
    path = tmp_path_factory.getbasetemp() / "fuzz.yml"
    path.write_text(yaml.safe_dump(content))
    faults: tuple[object, ...] = ()
    lab = None
    try:
        lab = load_topology(str(path), "t1")
    except InputError as error:
        faults = error.faults
    assert faults or (lab and lab.cluster_nodes)
