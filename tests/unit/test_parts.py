"""A run of several passes: its parts put together, whatever became of each."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from testbed.errors import Exit, InputError, LabError
from testbed.guest import runs
from testbed.guest.passes import Passes, on_both, without_workers, workers
from testbed.guest.source import GuestUnavailable
from testbed.report.parts import OUTCOMES, PartWriter, gather_files, merged
from testbed.report.record import Outcome, RunRecord, Verdict
from testbed.report.write import ReportFolder

ENDING = {"backend": "vxlan", "selection": "smoke", "comparable": False, "stopped": False, "refused": False}


def outcome(row: str, verdict: Verdict = Verdict.HELD, reason: str = "") -> Outcome:
    return Outcome(row, row, "vxlan", verdict, 0.5, reason)


def write(folder: Path, *outcomes: Outcome, ended: bool = True, **more: object) -> None:
    writer = PartWriter(folder)
    for one in outcomes:
        writer.add(one)
    if ended:
        writer.end(RunRecord({"name": "a", "backend": "vxlan", "kernel": "guest"}), ending=ENDING | more)


@pytest.fixture
def run(tmp_path: Path) -> Passes:
    return Passes.of("vxlan", ["--reports", str(tmp_path / "report")])


def report(tmp_path: Path) -> list[tuple[str, str]]:
    checks = json.loads((tmp_path / "report" / "checks.json").read_text())["checks"]
    return [(check["id"], check["verdict"]) for check in checks]


def test_parts_become_one_report_in_the_catalogue_s_order(run: Passes, tmp_path: Path) -> None:
    write(run.part().folder, outcome("VXD-02"), outcome("LSE-01"))
    write(run.part().folder, outcome("VXD-01"), outcome("DEP-12", Verdict.FAILED, "why"))
    run.codes += [0, 1]
    assert run.conclude() == Exit.FAILED
    expected = [("DEP-12", "failed"), ("LSE-01", "held"), ("VXD-01", "held"), ("VXD-02", "held")]
    assert report(tmp_path) == expected
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["checks.json", "index.html", "junit.xml"]


def test_what_failed_checks_left_comes_along(run: Passes, tmp_path: Path) -> None:
    for row in ("VXD-01", "VXD-02"):
        part = run.part()
        (part.folder / "checks" / row).mkdir(parents=True)
        (part.folder / "checks" / row / "eth0.pcap").write_bytes(row.encode())
        write(part.folder, outcome(row, Verdict.FAILED, "why"))
    run.conclude()
    assert (tmp_path / "report/checks/VXD-01/eth0.pcap").read_bytes() == b"VXD-01"
    assert (tmp_path / "report/checks/VXD-02/eth0.pcap").read_bytes() == b"VXD-02"


def test_a_pass_that_dies_leaves_what_it_had_done_and_the_lab_is_at_fault(
    run: Passes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write(run.part().folder, outcome("VXD-01"))
    folder = run.part().folder
    write(folder, outcome("VXD-02"), ended=False)
    with (folder / OUTCOMES).open("a") as file:
        file.write('{"id": "VXD-03", "it')  # torn by its death
    with run.kept():
        raise LabError("the guest kernel died\nits last words")
    assert run.conclude() == Exit.LAB
    assert report(tmp_path) == [("VXD-01", "held"), ("VXD-02", "held")]
    assert "its last words" in capfd.readouterr().out


def test_the_death_of_one_of_several_is_in_the_report(
    run: Passes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write(run.part().folder, outcome("VXD-01"))
    write(run.part().folder, outcome("VXD-02"), ended=False)
    run.codes += [int(Exit.HELD), int(Exit.LAB)]
    assert run.conclude() == Exit.LAB
    assert json.loads((tmp_path / "report" / "checks.json").read_text())["run"]["exit"] == Exit.LAB
    assert "a guest died" in (tmp_path / "report" / "junit.xml").read_text()
    assert "a guest died" in capfd.readouterr().out


def test_where_nothing_was_done_the_error_is_all_there_is(run: Passes, tmp_path: Path) -> None:
    run.part()
    with run.kept():
        raise LabError("the guest kernel died")
    with pytest.raises(LabError, match="the guest kernel died"):
        run.conclude()
    assert not (tmp_path / "report").exists()


def test_a_pass_that_refused_its_input_leaves_an_earlier_report(tmp_path: Path) -> None:
    ReportFolder(tmp_path / "report").write(RunRecord({}, [outcome("A-1")]))
    run = Passes.of("vxlan", ["--reports", str(tmp_path / "report")])
    run.part()
    run.codes.append(int(Exit.INPUT))
    assert run.conclude() == Exit.INPUT
    assert report(tmp_path) == [("A-1", "held")]


def test_an_interrupt_is_the_worst(run: Passes, tmp_path: Path) -> None:
    write(run.part().folder, outcome("VXD-01", Verdict.LAB_ERROR, "why"))
    with run.kept():
        raise KeyboardInterrupt
    assert run.conclude() == Exit.INTERRUPTED
    assert report(tmp_path) == [("VXD-01", "lab_error")]


def test_a_lab_that_is_somebody_s_replaces_no_report(tmp_path: Path) -> None:
    ReportFolder(tmp_path / "report").write(RunRecord({}, [outcome("A-1")]))
    run = Passes.of("vxlan", ["--reports", str(tmp_path / "report")])
    write(run.part().folder, outcome("VXD-01", Verdict.LAB_ERROR, "why"), refused=True)
    run.codes.append(int(Exit.LAB))
    assert run.conclude() == Exit.LAB
    assert report(tmp_path) == [("A-1", "held")]


def test_of_one_check_the_worse_outcome_counts(run: Passes) -> None:
    write(run.part().folder, outcome("VXD-01"), outcome("VXD-01", Verdict.INCONCLUSIVE, "dropped"))
    assert [o.verdict for o in merged(run.parts, [], {}).outcomes] == [Verdict.INCONCLUSIVE]
    gather_files(run.parts, run.report.staging)
    assert not run.parts[0].folder.exists()


def test_what_is_written_again_of_a_check_takes_the_place_of_what_was(run: Passes) -> None:
    both = RunRecord({})
    part = run.part()
    for one in (outcome("VXD-01", Verdict.FAILED, "lost"), outcome("VXD-01", Verdict.INCONCLUSIVE, "dropped")):
        PartWriter(part.folder).add(both.add(one))
    (kept,) = merged(run.parts, [], {}).outcomes
    assert (kept.verdict, kept.seconds, kept.reason) == (Verdict.FAILED, 1.0, "lost\nthen inconclusive: dropped")


@pytest.mark.parametrize(
    ("words", "count", "rest"),
    [
        (["-k", "VXD"], 1, ["-k", "VXD"]),
        (["-n", "2", "-x"], 2, ["-x"]),
        (["-n3"], 3, []),
        (["--numprocesses=4", "-n0"], 1, []),
        (["--numprocesses", "2"], 2, []),
        (["--name", "a", "-nauto"], len(os.sched_getaffinity(0)), ["--name", "a"]),
    ],
)
def test_the_number_of_guests_is_said_as_that_of_workers(words: list[str], count: int, rest: list[str]) -> None:
    assert (workers(words), without_workers(words)) == (count, rest)


@pytest.mark.parametrize("words", [["-n", "two"], ["-ntwo"], ["-n", "-1"], ["-n"], ["--numprocesses=\u00b2"]])
def test_what_is_no_number_of_guests_is_refused(words: list[str]) -> None:
    with pytest.raises(InputError, match="is no number of guests"):
        workers(words)


def no_place_for_one(_: object) -> None:
    raise GuestUnavailable("there is no folder to keep a guest kernel in")


def test_only_an_auto_run_leaves_checks_to_a_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from testbed.checks import load_catalogue
    from testbed.guest.build import Kernel

    rows = {"ECMP-05": replace(load_catalogue()["ECMP-05"], backends=("vxlan",), needs="netem")}
    monkeypatch.setattr(runs, "load_catalogue", lambda: rows)
    monkeypatch.setattr(runs, "ready_kernel", lambda _: Kernel(Path("/k"), "7", "built"))
    monkeypatch.setattr(runs, "lacking", lambda run, features: tuple(features))
    assert runs.deferrable("vxlan", []) == ("netem",)
    assert runs.deferrable("udp", []) == ()
    assert runs.deferrable("vxlan", ["--kernel", "host"]) == ()
    assert runs.deferrable("vxlan", ["--lab=clab"]) == ()
    monkeypatch.setattr(runs, "ready_kernel", lambda _: None)
    assert runs.deferrable("vxlan", []) == ()
    monkeypatch.setattr(runs, "ready_kernel", no_place_for_one)
    assert runs.deferrable("vxlan", []) == (), "a run on this kernel does without a cache folder"
    monkeypatch.setattr(runs, "ready_kernel", lambda _: Kernel(Path("/k"), "6.1", "qemu"))
    assert runs.deferrable("vxlan", []) == (), "a whole lab in QEMU for a few checks is too much"


def test_an_unknown_kernel_is_refused_also_where_none_is_needed() -> None:
    from testbed.commands.run import in_this_process

    with pytest.raises(InputError, match="'moon' is no kernel"):
        in_this_process("vxlan", ["--collect-only", "--kernel", "moon"])


def both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host_code: int, *, stopped: bool = False
) -> tuple[int, list[dict[str, str]]]:
    """Run on both kernels, the host's pass leaving ECMP-05 to a guest; returns the code, and what guests were told."""
    told: list[dict[str, str]] = []

    def host(options: Sequence[str]) -> int:
        assert "--kernel" not in options
        assert os.environ["TESTBED_DEFER"] == "netem"
        part = Path(os.environ["TESTBED_PART"])
        write(part, outcome("VXD-01"), stopped=stopped)
        (part / "deferred.json").write_text('["ECMP-05[vxlan-XS]"]')
        return host_code

    def guest(run: str, options: Sequence[str], kernel: object, part: Path) -> int:
        told.append({"only": Path(os.environ["TESTBED_ONLY"]).read_text(), "options": " ".join(options)})
        assert "TESTBED_DEFER" not in os.environ
        write(part, outcome("ECMP-05"))
        return 0

    monkeypatch.setattr(runs, "kernel_for", lambda run, options: None)
    monkeypatch.setattr(runs, "in_guest", guest)
    options = ["--kernel", "auto", "-n", "2", "--keep", "--reports", str(tmp_path / "report")]
    return on_both("vxlan", options, ["netem"], host), told


@pytest.mark.parametrize("code", [Exit.HELD, Exit.FAILED, Exit.NOTHING_RAN])
def test_what_needs_more_than_this_kernel_has_runs_in_a_guest_behind_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: Exit
) -> None:
    ended, told = both(tmp_path, monkeypatch, int(code))
    assert ended == (Exit.HELD if code is Exit.NOTHING_RAN else code)
    kernel_and_report = f"--kernel auto --reports {tmp_path / 'report'}"
    assert told == [{"only": '["ECMP-05[vxlan-XS]"]', "options": kernel_and_report}]
    assert report(tmp_path) == [("VXD-01", "held"), ("ECMP-05", "held")]
    assert "TESTBED_PART" not in os.environ


def test_a_run_that_was_stopped_goes_on_in_no_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, (code, stopped) in enumerate([(Exit.LAB, False), (Exit.FAILED, True), (Exit.INTERRUPTED, False)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        ended, told = both(folder, monkeypatch, int(code), stopped=stopped)
        assert (ended, told) == (code, [])
        assert report(folder) == [("VXD-01", "held")]
