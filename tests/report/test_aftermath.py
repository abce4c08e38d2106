"""What comes after a check, without a lab: what is held against it, and what goes wrong without harm."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from testbed import aftermath
from testbed.aftermath import Aftermath
from testbed.report import evidence
from testbed.report.junit import to_junit
from testbed.report.record import Outcome, RunRecord, Verdict, exit_code
from testbed.statewatch import State


class FakeWatch:
    """Tells one state after another, the last one for ever."""

    readings, seconds = 3, 0.25

    def __init__(self, *states: State) -> None:
        self.states = list(states)

    def read(self) -> State:
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def settled(self, before: State, seconds: float, seen_as: Any = None) -> State:
        return self.read()

    def close(self) -> None:
        pass


def made(staging: Path | None = None, **run: Any) -> Aftermath:
    options = SimpleNamespace(pause_on_fail=False)
    fields: dict[str, Any] = {"staging": staging, "cluster": None, "screen": None, "record": None, "options": options}
    return Aftermath(SimpleNamespace(**(fields | run)))  # type: ignore[arg-type]


def outcome(verdict: Verdict = Verdict.FAILED, item: str = "VXE-01[x]", **more: Any) -> Outcome:
    return Outcome(item.partition("[")[0], item, "vxlan", verdict, **more)


REPORT: Any = SimpleNamespace(longreprtext="it did not hold")


def test_a_leak_is_told_once_and_is_then_how_it_is() -> None:
    after = made()
    clean, dirty = {"worker1": ("a",)}, {"worker1": ("a", "b")}
    after.state = clean
    watch: Any = FakeWatch(dirty, dirty)
    assert after._left_changed(watch, disruptive=False) == ["worker1: + b"]
    assert after._left_changed(watch, disruptive=False) == []


def test_what_is_put_right_in_time_is_no_leak() -> None:
    after = made()
    after.state = {"worker1": ("a",)}
    watch: Any = FakeWatch({"worker1": ()}, {"worker1": ("a",)})
    assert after._left_changed(watch, disruptive=False) == []


def test_a_machine_that_cannot_be_asked_holds_nothing_against_a_check() -> None:
    after = made()
    after.state = {"worker1": ("a",), "worker1/client": ("p",), "worker2": ("x",)}
    watch: Any = FakeWatch({"worker2": ("y",)})
    assert after._left_changed(watch, disruptive=False) == ["worker2: - x", "worker2: + y"]


def test_a_leak_fails_the_run_and_not_the_check() -> None:
    held = outcome(Verdict.HELD, leaked=["worker1: + b"])
    assert exit_code([held]) == 1
    assert exit_code([outcome(Verdict.HELD)]) == 0
    record = RunRecord({})
    record.add(outcome(Verdict.HELD))
    record.add(held)  # once more, from its clean-up
    (only,) = record.to_json()["checks"]
    assert (only["verdict"], only["leaked"]) == ("held", ["worker1: + b"])
    assert record.to_json()["run"]["leaks"] == 1
    assert 'name="leaked" value="worker1: + b"' in to_junit(record)


def test_a_failure_without_a_lab_has_its_report(tmp_path: Path) -> None:
    failed = outcome()
    made(tmp_path).keep(REPORT, failed)
    assert failed.artefacts == ["checks/VXE-01_x/report.txt"]
    assert (tmp_path / failed.artefacts[0]).read_text() == "it did not hold"
    assert failed.evidence is not None
    assert failed.evidence["missing"] == []


def test_a_lab_that_is_broken_costs_no_verdict(tmp_path: Path) -> None:
    failed = outcome()
    made(tmp_path, cluster=SimpleNamespace()).keep(REPORT, failed)  # nothing of a lab is there
    assert failed.verdict is Verdict.FAILED
    assert failed.evidence is not None
    assert failed.evidence["missing"][0].startswith("not all could be kept: AttributeError")
    assert failed.artefacts


def test_only_so_many_failures_are_kept_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(evidence, "keep_answers", lambda staging, item, *rest: asked.append(item))
    monkeypatch.setattr(aftermath, "MOST_IN_FULL", 2)
    after = made(tmp_path, cluster=SimpleNamespace())
    failed = [outcome(item=f"VXE-0{number}[x]") for number in range(4)]
    for one in failed:
        after.keep(REPORT, one)
    assert asked == ["VXE-00[x]", "VXE-01[x]"]
    assert [bool(one.evidence and one.evidence["missing"]) for one in failed] == [False, False, True, True]
    assert all(one.artefacts for one in failed)


def test_a_lab_that_is_wrong_on_purpose_is_not_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "keep_answers", lambda *_: pytest.fail("it was"))
    after = made(tmp_path, cluster=SimpleNamespace())
    after.watching = False
    failed = outcome()
    after.keep(REPORT, failed)
    assert failed.artefacts == ["checks/VXE-01_x/report.txt"]


def session(worker: str = "") -> Any:
    config = SimpleNamespace(workeroutput={})
    if worker:
        config.workerinput = {"workerid": worker}
    return SimpleNamespace(config=config)


def test_what_workers_have_traced_and_spent_comes_together() -> None:
    worker = made()
    worker.watch, worker.traces = FakeWatch({}), [{"source": "worker1/client"}]  # type: ignore[assignment]
    theirs = session("gw0")
    worker.pytest_sessionfinish(theirs)
    record = RunRecord({})
    controller = made(record=record)
    for _ in range(2):
        controller.pytest_testnodedown(theirs.config)
    controller.pytest_testnodedown(SimpleNamespace())  # one that died
    controller.pytest_sessionfinish(session())
    assert record.facts["watch"] == {"readings": 6, "seconds": 0.5}
    assert record.facts["traces"] == [{"source": "worker1/client"}] * 2
