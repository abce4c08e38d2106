"""Who may have which lab, and what is left of one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from testbed.deadline import Deadline
from testbed.errors import InputError, LabError
from testbed.labs import kinds, netns, plan, state
from testbed.labs.netns import NetnsLab
from testbed.model import LabSpec
from tests.labs.helpers import processes_of, unique

Make = Callable[[LabSpec], NetnsLab]


def test_nothing_of_a_lab_is_left(flat: LabSpec, make_lab: Make) -> None:
    lab = make_lab(flat)
    assert len(processes_of(flat.id)) > len(flat.nodes), "the test would not see what is left"
    lab.down()
    assert processes_of(flat.id) == []
    assert not list(state.state_folder().glob(f"{flat.id}*"))


def test_two_labs_run_side_by_side_with_the_same_addresses(flat: LabSpec, make_lab: Make) -> None:
    labs = [make_lab(flat), make_lab(replace(flat, id=unique("other")))]
    for lab in labs:
        lab.node("worker1").write("/run/who", lab.spec.id)
        assert lab.node("worker1").run(["ping", "-c", "1", "-W", "2", str(lab.node("worker2").spec.ip)]).ok
    assert [lab.node("worker1").read("/run/who").decode() for lab in labs] == [lab.spec.id for lab in labs]


def test_a_lab_that_is_up_is_not_brought_up_again(flat: LabSpec, make_lab: Make) -> None:
    make_lab(flat)
    with pytest.raises(LabError, match=f"lab {flat.id} is already up\n  hint: `testbed down --name {flat.id}`"):
        netns.bring_up(flat)


def test_a_name_that_somebody_is_using_is_refused(flat: LabSpec) -> None:
    with state.locked(flat.id), pytest.raises(LabError, match="is being brought up or down by another command"):
        netns.bring_up(flat)


@pytest.mark.parametrize("name", ["", "../x", "UPPER", "a b", "x" * 49, "-x"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="cannot name a lab"):
        state.checked_id(name)


def test_a_lab_whose_holder_was_killed_can_be_brought_up_again(flat: LabSpec, make_lab: Make) -> None:
    lab = make_lab(flat)
    os.kill(lab.record.holder.pid, signal.SIGKILL)
    assert Deadline(10).poll(lambda: not processes_of(flat.id)), "nodes outlive their holder"
    with pytest.raises(LabError, match="is not up"):
        kinds.open_lab(flat.id)
    make_lab(flat)


@pytest.mark.parametrize("killed", [False, True])
def test_what_stops_itself_in_a_lab_does_not_keep_it_from_ending(
    flat: LabSpec, make_lab: Make, *, killed: bool
) -> None:
    lab = make_lab(flat)
    entered = lab.node("worker1").spawn(["sh", "-c", "kill -s STOP $$; sleep 60"])
    stat = Path(f"/proc/{entered.pid}/stat")
    assert Deadline(10).poll(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T" or None), "it stops, too"
    if killed:
        os.kill(lab.record.holder.pid, signal.SIGKILL)
    lab.down()
    assert entered.wait(10) != 0
    assert not processes_of(flat.id)


def test_a_pid_that_belongs_to_somebody_else_by_now_is_left_alone(flat: LabSpec, make_lab: Make) -> None:
    lab = make_lab(flat)
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        stale = replace(lab.record, holder=replace(lab.record.holder, pid=bystander.pid))
        assert not stale.holder.alive
        assert stale.holder.kill(1)
        assert bystander.poll() is None, "a stranger's process was killed"
    finally:
        bystander.kill()
        bystander.wait()


def test_another_process_finds_the_lab_and_enters_it(flat: LabSpec, make_lab: Make) -> None:
    lab = make_lab(flat)
    lab.detach()
    found = kinds.open_lab(flat.id)
    assert found.spec == flat
    assert found.node("worker1").run(["hostname"]).stdout.strip() == "worker1"


MISWIRINGS: dict[str, tuple[str, str, str]] = {
    "MTU": ("links", "mtu 1500", "mtu 1400"),
    "MAC": ("links", "address 02:", "address 06:"),
    "address": ("batch", "addr replace 10.0.0.12/24", "addr replace 10.0.0.77/24"),
    "down": ("batch", "link set eth0 up", "link set eth0 down"),
    "bridge": ("batch", "link set node1 master br0", "link set node1 nomaster"),
}


@pytest.mark.parametrize("kind", MISWIRINGS)
def test_wrong_wiring_is_the_labs_error(kind: str, flat: LabSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    where, right, wrong = MISWIRINGS[kind]
    right_plan = plan.box_plan

    def wrong_plan(lab: LabSpec, **rest: Any) -> dict[str, Any]:
        made = right_plan(lab, **rest)
        assert right in json.dumps(made), "this would change nothing"
        if where == "links":
            made["links"] = made["links"].replace(right, wrong, 1)
        else:
            for node in made["nodes"]:
                batch = node["batch"].replace(right, wrong)
                if batch != node["batch"]:  # no default route over an interface that is down
                    node["batch"] = batch.partition("route add")[0]
        return made

    monkeypatch.setattr(netns, "box_plan", wrong_plan)
    with pytest.raises(LabError, match="not wired as described"):
        netns.bring_up(flat)
    assert processes_of(flat.id) == []


def test_wiring_that_the_kernel_refuses_is_the_labs_error(flat: LabSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    right_plan = plan.box_plan
    monkeypatch.setattr(
        netns, "box_plan", lambda lab, **rest: right_plan(lab, **rest) | {"links": "link add nonsense\n"}
    )
    with pytest.raises(LabError, match="could not be made"):
        netns.bring_up(flat)
    assert Deadline(10).poll(lambda: not processes_of(flat.id))


BRING_UP = """
import sys
from testbed.labs import netns
from testbed.topology import load_topology
lab = netns.bring_up(load_topology("flat", sys.argv[1]))
if sys.argv[2] == "stay":
    lab.detach()
else:
    lab.down()
"""


@pytest.mark.parametrize("kill", range(int(os.environ.get("TESTBED_KILLS", "12"))))
def test_a_bring_up_that_is_killed_at_any_moment_leaves_nothing(kill: int) -> None:
    lab_id = unique("killed")
    moment = random.Random(kill).uniform(0.05, 0.9)
    process = subprocess.Popen([sys.executable, "-c", BRING_UP, lab_id, "down"])
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    gone = Deadline(20).poll(lambda: not processes_of(lab_id))
    assert gone, f"killed after {moment:.3f} s, it left {processes_of(lab_id)}"
    record = state.read_record(lab_id)
    if record:
        NetnsLab(record).down()
    state.sweep()
    assert not list(state.state_folder().glob(f"{lab_id}.*"))
