"""Faults of links in a lab that is up: what is measured with them, beside and after them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from testbed import cli
from testbed.deadline import Deadline
from testbed.doctor import probe_features
from testbed.errors import InputError, LabError
from testbed.labs import netns, state
from testbed.labs.fabric import missing_paths, wait_converged
from testbed.labs.netns import NetnsLab
from testbed.topology import load_topology
from tests.labs.helpers import unique

TWO_RACKS = """\
mtu: 1500
spines: 2
outside: 203.0.113.8
racks:
  - {leaf: leaf1, subnet: 10.1.0.0/24, nodes: [master1, worker1]}
  - {leaf: leaf2, subnet: 10.2.0.0/24, nodes: [worker2]}
"""
DECLARED = "links: {worker2-leaf2: {delay: 30ms}}\n"
SENT = 100


def bring_up(folder: Path, links: str = "") -> NetnsLab:
    path = folder / "lab.yml"
    path.write_text(TWO_RACKS + links)
    lab = netns.bring_up(load_topology(str(path), unique("faults")))
    wait_converged(lab)
    return lab


@pytest.fixture(scope="module")
def fabric(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NetnsLab]:
    lab = bring_up(tmp_path_factory.mktemp("fabric"))
    yield lab
    lab.down()


@pytest.fixture(scope="module")
def netem() -> None:
    """Skip, and say why, where the kernel has no netem; in a guest it has: see tests/guest."""
    if not probe_features()["netem"]["ok"]:
        pytest.skip("this machine's kernel has no netem")


def remembered(lab: NetnsLab) -> object:
    """The faults as later commands find them."""
    record = state.read_record(lab.spec.id)
    assert record
    return record.facts["faults"]


def shown(*words: str) -> str:
    """What a command prints."""
    done = CliRunner().invoke(cli.cli, words)
    assert done.exit_code == 0, done.output
    return done.output


def answered(lab: NetnsLab, source: str, target: str, *, count: int = SENT, interval: str = "0.002") -> int:
    """How many of so many pings come back."""
    argv = ["ping", "-q", "-i", interval, "-c", str(count), "-W", "1", str(lab.node(target).spec.ip)]
    said = lab.node(source).run(argv, check=False).stdout
    found = re.search(r"(\d+) received", said)
    assert found, said
    return int(found[1])


def comes_back(lab: NetnsLab, source: str, target: str) -> bool | None:
    """Whether pings are answered again soon: who was asked for an address in vain is asked again after a second."""
    return Deadline(5).poll(lambda: answered(lab, source, target, count=1) == 1 or None)


def round_trip(lab: NetnsLab, source: str, target: str) -> float:
    """The shortest round trip of some pings, in milliseconds."""
    said = lab.node(source).run(["ping", "-q", "-i", "0.01", "-c", "5", str(lab.node(target).spec.ip)]).stdout
    return float(said.rpartition("=")[2].split("/")[0])


def qdiscs(lab: NetnsLab) -> list[str]:
    """Every interface with netem, as `leaf1:swp1`."""
    return [
        f"{node.name}:{found['dev']}"
        for node in lab.nodes.values()
        for found in json.loads(node.run(["tc", "-j", "qdisc", "show"]).stdout)
        if found["kind"] == "netem"
    ]


def test_a_link_that_is_down_has_no_carrier_and_comes_back(fabric: NetnsLab) -> None:
    assert answered(fabric, "worker1", "worker2", count=5) == 5
    with fabric.fault("leaf2-worker2", down=True) as link:
        assert link.name == "worker2-leaf2"
        assert "NO-CARRIER" in fabric.node("worker2").run(["ip", "link", "show", "eth0"]).stdout
        assert answered(fabric, "worker1", "worker2", count=5) == 0
        assert answered(fabric, "worker1", "master1", count=5) == 5, "only that link is down"
    assert comes_back(fabric, "worker1", "worker2")


@pytest.mark.parametrize("at_once", [True, False])
def test_routing_goes_round_a_link_that_is_down_and_is_whole_again_afterwards(
    fabric: NetnsLab, *, at_once: bool
) -> None:
    leaf, other = fabric.spec.node("leaf1"), fabric.spec.node("leaf2")
    with fabric.fault("leaf1-spine1", down=True):
        if not at_once:
            assert Deadline(20).poll(lambda: len(missing_paths(fabric, leaf)) == 2 or None), "leaf1 goes on using it"
            # The answers come back the other way, as soon as the spine has told the other leaf.
            assert Deadline(20).poll(lambda: missing_paths(fabric, other) or None), "leaf2 goes on using it"
            assert answered(fabric, "worker1", "worker2", count=5) == 5
    routers = (leaf, fabric.spec.node("spine1"))
    fallen = Deadline(2).poll(lambda: [line for router in routers for line in missing_paths(fabric, router)] or None)
    assert fallen is None, "routing was not done with it"
    with fabric.fault("leaf1-spine2", down=True), fabric.fault("leaf2-spine2", down=True):
        assert Deadline(20).poll(lambda: len(missing_paths(fabric, leaf)) == 2 or None), "leaf1 goes on using it"
        assert Deadline(20).poll(lambda: len(missing_paths(fabric, other)) == 2 or None), "leaf2 goes on using it"
        assert answered(fabric, "worker1", "worker2", count=5) == 5, "the link that came back carries nothing"


def test_a_fault_ends_with_its_block_however_that_ends(fabric: NetnsLab) -> None:
    def fail() -> None:
        with fabric.fault("worker2-leaf2", down=True):
            assert answered(fabric, "worker1", "worker2", count=2) == 0
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert comes_back(fabric, "worker1", "worker2")
    assert fabric.record.facts["faults"] == {}


def test_a_link_is_down_until_the_last_fault_that_says_so_ends(fabric: NetnsLab) -> None:
    outer, inner = (fabric.fault("worker2-leaf2", down=True) for _ in range(2))
    with outer:
        with inner:
            pass
        # A link that is up again carries packets within a second.
        assert answered(fabric, "worker1", "worker2", count=10, interval="0.2") == 0
    assert comes_back(fabric, "worker1", "worker2")


def test_what_is_no_link_or_no_fault_is_refused_before_anything_is_done(fabric: NetnsLab) -> None:
    with pytest.raises(InputError, match=r"no link 'leaf1-spine9'(.|\n)*links: master1-leaf1, worker1-leaf1"):
        fabric.fault("leaf1-spine9", down=True).__enter__()
    with pytest.raises(InputError, match=r"loss: 130 % is not(.|\n)*jitter varies a delay(.|\n)*leaf2 is no end"):
        fabric.fault("leaf1-spine1", loss=130, jitter=3, towards="leaf2").__enter__()
    assert missing_paths(fabric, fabric.spec.node("leaf1")) == []


def test_later_commands_know_of_it(fabric: NetnsLab) -> None:
    with fabric.fault("worker2-leaf2", down=True):
        assert remembered(fabric) == {"worker2-leaf2": "down"}
        said = shown("status", "--name", fabric.spec.id)
        assert "fault: worker2-leaf2: down\n" in said
        (told,) = json.loads(shown("status", "--name", fabric.spec.id, "--json"))["labs"]
        assert told["faults"] == {"worker2-leaf2": "down"}
        assert ">down</text>" in shown("graph", "--name", fabric.spec.id)
    assert remembered(fabric) == {}
    assert "fault: " not in shown("status", "--name", fabric.spec.id)


def test_a_kernel_without_netem_says_so_and_names_the_one_that_has_it(fabric: NetnsLab, tmp_path: Path) -> None:
    if probe_features()["netem"]["ok"]:
        pytest.skip("this kernel has netem")
    with pytest.raises(LabError, match=r"worker2:eth0: this machine's kernel has no netem(.|\n)*--kernel guest"):
        fabric.fault("worker2-leaf2", loss=10).__enter__()
    assert fabric.record.facts["faults"] == {}
    (tmp_path / "lab.yml").write_text(TWO_RACKS + DECLARED)
    spec = load_topology(str(tmp_path / "lab.yml"), unique("faults"))
    with pytest.raises(LabError, match=r"lab: this machine's kernel has no netem(.|\n)*--kernel guest"):
        netns.bring_up(spec)
    assert state.read_record(spec.id) is None


@pytest.mark.usefixtures("netem")
def test_loss_is_measured_in_both_directions_in_one_and_not_after(fabric: NetnsLab) -> None:
    assert answered(fabric, "worker1", "worker2") == SENT
    with fabric.fault("worker2-leaf2", loss=50):
        both = answered(fabric, "worker1", "worker2")
        assert answered(fabric, "worker1", "master1") == SENT, "only that link loses packets"
    with fabric.fault("worker2-leaf2", loss=50, towards="worker2"):
        one = answered(fabric, "worker1", "worker2")
        assert qdiscs(fabric) == ["leaf2:node1"]
    # Twenty standard deviations would be needed for 0 or all; five for these.
    assert 5 <= both <= 46, both
    assert 26 <= one <= 74, one
    assert qdiscs(fabric) == []
    assert answered(fabric, "worker1", "worker2") == SENT


@pytest.mark.usefixtures("netem")
def test_delay_is_measured_twice_in_a_round_trip_and_once_where_it_is_one_way(fabric: NetnsLab) -> None:
    before = round_trip(fabric, "worker1", "worker2")
    assert before < 40
    with fabric.fault("worker2-leaf2", delay=40):
        assert 80 <= round_trip(fabric, "worker1", "worker2") < 120
        with fabric.fault("leaf2-worker2", delay=100, towards="leaf2"):
            assert 140 <= round_trip(fabric, "worker1", "worker2") < 180, "the inner one counts"
        with fabric.fault("leaf2-worker2", loss=100, towards="worker2"):
            assert remembered(fabric) == {
                "worker2-leaf2": "delay 40 ms towards leaf2; delay 40 ms, loss 100 % towards worker2"
            }
            assert answered(fabric, "worker1", "worker2", count=5) == 0
        assert 80 <= round_trip(fabric, "worker1", "worker2") < 120, "the outer one is there again"
    assert round_trip(fabric, "worker1", "worker2") < 40


@pytest.mark.usefixtures("netem")
def test_a_rate_holds_back_what_is_more(fabric: NetnsLab) -> None:
    argv = ["ping", "-q", "-s", "1400", "-c", "1", str(fabric.node("worker2").spec.ip)]
    assert float(fabric.node("worker1").run(argv).stdout.rpartition("=")[2].split("/")[0]) < 40
    with fabric.fault("worker2-leaf2", rate=0.1):
        # 1442 bytes in each direction at 100 kbit/s.
        assert float(fabric.node("worker1").run(argv).stdout.rpartition("=")[2].split("/")[0]) > 200


@pytest.mark.usefixtures("netem")
def test_what_the_topology_declares_is_there_from_the_start_and_after_a_block(tmp_path: Path) -> None:
    lab = bring_up(tmp_path, DECLARED)
    try:
        assert qdiscs(lab) == ["worker2:eth0", "leaf2:node1"]
        assert 60 <= round_trip(lab, "worker1", "worker2") < 100
        with lab.fault("worker2-leaf2", loss=100):
            assert answered(lab, "worker1", "worker2", count=3) == 0
        assert 60 <= round_trip(lab, "worker1", "worker2") < 100
    finally:
        lab.down()
