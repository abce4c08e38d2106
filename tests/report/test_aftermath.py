"""What comes after a check, without a lab: what is held against it, and what goes wrong without harm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from testbed import aftermath, journal
from testbed.aftermath import Aftermath
from testbed.report import evidence
from testbed.report.junit import to_junit
from testbed.report.record import Outcome, RunRecord, Verdict, exit_code
from testbed.statewatch import State
from testbed.trace import follow


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


REPORT: Any = SimpleNamespace(longreprtext="it did not hold", when="call")


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


def test_a_machine_that_misses_a_look_is_told_once_and_keeps_its_last_state() -> None:
    said: list[str] = []
    screen = SimpleNamespace(close_bar=lambda: None, say=lambda text, style: said.append(text))
    after = made(screen=screen)
    after.state = {"worker1": ("a",), "worker1/client": ("p",), "worker2": ("x",)}
    away, back = {"worker2": ("x",)}, {"worker1": ("a", "b"), "worker1/client": ("p",), "worker2": ("x",)}
    assert after._left_changed(FakeWatch(away), disruptive=False) == []  # type: ignore[arg-type]
    assert after._left_changed(FakeWatch(away), disruptive=False) == []  # type: ignore[arg-type]
    assert after._left_changed(FakeWatch(back), disruptive=False) == ["worker1: + b"]  # type: ignore[arg-type]
    assert said == ["worker1 told nothing of its state in time: what changes there shows behind a later check"]


def test_a_pod_that_is_gone_is_no_machine_that_was_silent() -> None:
    after = made()
    after.state = {"worker1": ("a",), "worker1/client": ("p",)}
    watch: Any = FakeWatch({"worker1": ("a",)})
    assert after._left_changed(watch, disruptive=False) == ["worker1/client: - the network of worker1/client"]
    assert after.state == {"worker1": ("a",)}


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


def test_what_an_expected_failure_leaves_goes_with_it() -> None:
    expected = outcome(Verdict.EXPECTED_FAILURE, leaked=["worker1: + b"])
    assert exit_code([expected]) == 0
    record = RunRecord({})
    record.add(expected)
    told = record.to_json()
    assert (told["run"]["leaks"], told["checks"][0]["leaked"]) == (0, ["worker1: + b"])


def test_a_failure_without_a_lab_has_its_report(tmp_path: Path) -> None:
    failed = outcome()
    made(tmp_path).keep(REPORT, failed)
    assert failed.artefacts == ["checks/VXE-01_x/report.txt"]
    assert (tmp_path / failed.artefacts[0]).read_text() == "it did not hold"
    assert failed.evidence is not None
    assert failed.evidence["missing"] == []


def test_a_clean_up_leaves_its_report_beside_that_of_the_failure(tmp_path: Path) -> None:
    after, failed, later = made(tmp_path), outcome(), outcome(Verdict.INCONCLUSIVE)
    after.keep(REPORT, failed)
    after.keep(SimpleNamespace(longreprtext="dropped \ud800", when="teardown"), later)  # type: ignore[arg-type]
    assert [*failed.artefacts, *later.artefacts] == [
        "checks/VXE-01_x/report.txt",
        "checks/VXE-01_x/report-of-the-clean-up.txt",
    ]
    said = [(tmp_path / path).read_text() for path in (*failed.artefacts, *later.artefacts)]
    assert said == ["it did not hold", "dropped \\ud800"]


def lab_with(*flows: journal.Flow) -> Any:
    """A cluster whose check has sent these."""
    notes = journal.begin()
    notes.flows += flows
    addresses = {"worker1/client": ("10.244.1.3", "fd00::1:3"), "worker3/testapp": ("10.244.3.2", "fd00::3:2")}
    pods = {
        name: SimpleNamespace(node=SimpleNamespace(name=name.partition("/")[0]), netns="", address4=four, address6=six)
        for name, (four, six) in addresses.items()
    }
    spec = SimpleNamespace(node=lambda name: SimpleNamespace(ip="10.0.0.12", ip6="fd00:9::12"))
    machine = SimpleNamespace(netns=lambda *_: None)
    flannel = SimpleNamespace(
        backend=SimpleNamespace(run="vxlan"), rules="", bridge="cni0", tunnel_device="", tunnel_device6="", port=8472
    )
    nodes = {"worker1": machine, "worker3": machine}
    inside = SimpleNamespace(spec=spec, nodes={"worker2": machine}, node=lambda name: nodes.get(name, machine))
    return SimpleNamespace(pods=pods, lab=inside, flannel=flannel)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """What was traced: source, target, its address, protocol, size and port."""
    asked: list[tuple[Any, ...]] = []

    def trace(places: Any, source: str, target: str, wish: Any) -> Any:
        asked.append((source, target, places.address(target), wish.protocol, wish.size, wish.port))
        notes: list[str] = []
        return SimpleNamespace(notes=notes, to_json=lambda: {"notes": notes})

    monkeypatch.setattr(follow, "trace", trace)
    yield asked
    journal.end()


ENDS = ["worker1/client", "worker3/testapp"]


@pytest.mark.parametrize(
    ("flow", "wanted"),
    [
        (("10.244.3.2", {"size": 8972, "lost": 1}), ("worker3/testapp", "10.244.3.2", "icmp", 8972, 0)),
        (("fd00::3:2", {"size": 56, "lost": 2}), ("worker3/testapp", "fd00::3:2", "icmp", 56, 0)),
        (("10.244.3.2", {"protocol": "udp", "port": 7, "lost": 1}), ("worker3/testapp", "10.244.3.2", "udp", 56, 7)),
        (("10.244.3.2", {"protocol": "tcp", "port": 81, "lost": 1}), ("worker3/testapp", "10.244.3.2", "tcp", 56, 81)),
        (("10.0.0.12", {"size": 56, "lost": 1}), ("worker2", "10.0.0.12", "icmp", 56, 0)),
        (("10.244.3.2", {"lost": 0}), ("worker3/testapp", "10.244.3.2", "icmp", 56, 0)),
    ],
)
def test_such_a_packet_is_traced_as_the_check_has_lost(
    flow: tuple[str, dict[str, Any]], wanted: tuple[object, ...], traced: list[tuple[object, ...]]
) -> None:
    found = evidence.Evidence("x")
    sent = journal.Flow("a flow", ENDS[0], flow[0], (), **flow[1])
    Aftermath._keep_trace(lab_with(sent), outcome(path=ENDS), found)
    assert traced == [("worker1/client", *wanted)]
    assert found.trace is not None
    assert bool(found.trace["notes"]) is not bool(flow[1]["lost"])


def test_what_cannot_be_followed_is_said_instead_of_another_packet_delivered(traced: list[tuple[object, ...]]) -> None:
    found = evidence.Evidence("x")
    Aftermath._keep_trace(lab_with(journal.Flow("HTTP", ENDS[0], "10.96.0.1", (), lost=1)), outcome(path=ENDS), found)
    assert (traced, found.trace) == ([], None)
    assert found.missing == ["no path trace of what was lost, HTTP: 10.96.0.1 is no pod's or machine's address"]


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
