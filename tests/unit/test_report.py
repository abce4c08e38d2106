"""The report: verdicts to exit codes, expected counts, files that are whole or not there."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import xml.etree.ElementTree as Xml
from pathlib import Path

import pytest

from testbed.checks import load_catalogue
from testbed.errors import Exit, InputError, LabError
from testbed.probes.capture import Inconclusive
from testbed.report.expected import Expected, deviations, load_expected, stable
from testbed.report.junit import to_junit
from testbed.report.record import Outcome, RunRecord, Verdict, exit_code, verdict_of
from testbed.report.terminal import Screen
from testbed.report.write import ReportFolder, safe_name, save_artefacts


def outcome(row: str, verdict: Verdict = Verdict.HELD, reason: str = "", path: str = "") -> Outcome:
    return Outcome(row, f"{row}[vxlan-{path}]" if path else row, "vxlan", verdict, 0.25, reason)


def record(*outcomes: Outcome) -> RunRecord:
    return RunRecord({"name": "x", "backend": "vxlan"}, list(outcomes))


class Skipped(Exception):
    msg = "not here"


class Failed(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (Skipped(), Verdict.SKIPPED),
        (Inconclusive("x"), Verdict.INCONCLUSIVE),
        (LabError("x"), Verdict.LAB_ERROR),
        (InputError("x"), Verdict.LAB_ERROR),
        (AssertionError("x"), Verdict.FAILED),
        (Failed("x"), Verdict.FAILED),
        (ZeroDivisionError("x"), Verdict.LAB_ERROR),
    ],
)
def test_whose_fault_an_error_is(error: Exception, verdict: Verdict) -> None:
    assert verdict_of(error, skipped=Skipped, failed=Failed)[0] is verdict


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [
        ([], Exit.NOTHING_RAN),
        ([Verdict.SKIPPED], Exit.NOTHING_RAN),
        ([Verdict.HELD, Verdict.SKIPPED], Exit.HELD),
        ([Verdict.HELD, Verdict.INCONCLUSIVE], Exit.FAILED),
        ([Verdict.UNEXPECTED_PASS, Verdict.HELD], Exit.FAILED),
        ([Verdict.EXPECTED_FAILURE], Exit.HELD),
        ([Verdict.FAILED, Verdict.LAB_ERROR], Exit.LAB),
    ],
)
def test_exit_codes(verdicts: list[Verdict], code: Exit) -> None:
    found = [outcome(f"A-{number}", verdict) for number, verdict in enumerate(verdicts)]
    assert exit_code(found) is code
    assert exit_code(found, broken=True) is Exit.LAB
    assert exit_code(found, broken=True, interrupted=True) is Exit.INTERRUPTED
    wrong = outcome("A-9", Verdict.LAB_ERROR)
    wrong.input_error = True
    assert exit_code([*found, wrong], broken=True) is Exit.INPUT


def test_a_worse_clean_up_replaces_a_verdict_and_a_better_one_does_not() -> None:
    run = record()
    run.add(outcome("A-1"))
    run.add(outcome("A-1", Verdict.INCONCLUSIVE))
    assert [o.verdict for o in run.outcomes] == [Verdict.INCONCLUSIVE]
    run.add(outcome("A-1"))
    assert [o.verdict for o in run.outcomes] == [Verdict.INCONCLUSIVE]


def test_an_outcome_survives_its_journey() -> None:
    one = outcome("VXE-01", Verdict.FAILED, "because", "XS-a->b")
    assert Outcome.from_message(json.loads(json.dumps(one.to_message()))) == one


EXPECTED = Expected("racks", {"A": 2, "B": 1}, {"A-3": "needs the moon", "B-2[vxlan-XS]": "flat"})


def test_what_is_as_expected_deviates_in_nothing() -> None:
    run = record(
        outcome("A-1"),
        outcome("A-2", Verdict.FAILED),
        outcome("A-3", Verdict.SKIPPED),
        outcome("B-1"),
        outcome("B-2", Verdict.SKIPPED, path="XS"),
    )
    assert deviations(run, EXPECTED) == []


@pytest.mark.parametrize(
    ("outcomes", "word"),
    [
        ([outcome("A-1"), outcome("A-2", Verdict.SKIPPED, "tired"), outcome("B-1")], "A-2 is skipped, which is new"),
        ([outcome("A-1"), outcome("A-2")], "B: 0 checks ran where 1 are expected"),
        ([outcome("A-1"), outcome("A-2"), outcome("A-3"), outcome("B-1")], "A-3 ran, but is expected to be skipped"),
        ([outcome("A-1"), outcome("A-2"), outcome("B-1"), outcome("C-1")], "C: 1 checks ran, more than the 0 expected"),
    ],
)  # fmt: skip
def test_deviations_are_told_and_fail_a_strict_run(outcomes: list[Outcome], word: str) -> None:
    run = record(*outcomes)
    run.problems = deviations(run, EXPECTED)
    assert any(word in problem for problem in run.problems), run.problems
    assert run.finish(strict=False) == Exit.HELD
    assert run.finish(strict=True) == Exit.FAILED


def test_what_waits_for_another_kernel_counts_as_there_and_what_is_skipped_otherwise_does_not() -> None:
    expected = Expected("racks", {"ECMP": 2}, {})
    reason = load_catalogue()["ECMP-05"].reason
    assert "netem" in reason
    waiting = outcome("ECMP-05", Verdict.SKIPPED, reason)
    assert deviations(record(outcome("ECMP-01"), waiting), expected) == []
    assert deviations(record(outcome("ECMP-01"), outcome("ECMP-05")), expected) == []
    tired = deviations(record(outcome("ECMP-01"), outcome("ECMP-05", Verdict.SKIPPED, "tired")), expected)
    assert tired == ["ECMP-05 is skipped, which is new: tired", "ECMP: 1 checks ran where 2 are expected"]
    assert len(deviations(record(outcome("ECMP-05"), outcome("ECMP-01", Verdict.SKIPPED, reason)), expected)) == 2


def test_items_are_compared_without_the_names_of_their_ends() -> None:
    assert stable("NAT-03[host_gw-XS-worker1/client->worker3/testapp]") == "NAT-03[host_gw-XS]"
    assert stable("NAT-03[host_gw-XS]") == "NAT-03[host_gw-XS]"
    assert stable("POD-01") == "POD-01"


def test_broken_expected_counts_are_the_labs_fault(tmp_path: Path) -> None:
    (tmp_path / "counts.yaml").write_text("runs: {vxlan: {smoke: {held: 3}}}")
    with pytest.raises(LabError):
        load_expected("vxlan", "smoke", tmp_path / "counts.yaml")
    assert load_expected("udp", "smoke", tmp_path / "counts.yaml") is None


def test_junit_holds_what_strangers_print() -> None:
    run = record(outcome("VXE-01", Verdict.FAILED, "bad \x00 <b> & \ud800 ]]>", "XS-a->b"), outcome("LSE-01"))
    run.broken = "cut short"
    suite = Xml.fromstring(to_junit(run).split("?>", 1)[1])[0]
    cases = suite.findall("testcase")
    assert [case.get("name") for case in cases] == ["VXE-01[vxlan-XS-a->b]", "LSE-01", "the run itself"]
    assert (suite.get("failures"), suite.get("errors")) == ("1", "1")
    properties = {p.get("name"): p.get("value") for p in cases[0].iter("property")}
    assert properties["id"] == "VXE-01"
    assert "dport" in str(properties["claim"])


def test_a_report_replaces_the_earlier_one_whole(tmp_path: Path) -> None:
    place = tmp_path / "reports" / "vxlan"
    first = ReportFolder(place)
    save_artefacts(first.staging, "VXE-01[vxlan-XS-a/b->c/d]", {"eth0.pcap": b"x"})
    first.write(record(outcome("A-1")))
    assert [path.name for path in (place / "checks").iterdir()] == ["VXE-01_vxlan-XS-a_b-_c_d"]
    second = ReportFolder(place)
    assert json.loads((place / "checks.json").read_text())["checks"][0]["id"] == "A-1"
    second.write(record(outcome("A-2")))
    assert json.loads((place / "checks.json").read_text())["checks"][0]["id"] == "A-2"
    assert sorted(path.name for path in place.iterdir()) == ["checks.json", "index.html", "junit.xml"]
    assert [path.name for path in place.parent.iterdir() if path.is_dir()] == ["vxlan"]


GROWS = """
import sys, time
from pathlib import Path
from testbed.report.write import ReportFolder
print(ReportFolder(Path(sys.argv[1])).staging, flush=True)
time.sleep(600)
"""


def grow(folder: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process whose report grows, and the folder in which it does."""
    process = subprocess.Popen([sys.executable, "-c", GROWS, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_run_left_is_swept_and_what_another_writes_is_not(tmp_path: Path) -> None:
    """Whoever writes may have any pid, also one of another machine, container or guest."""
    killed, left = grow(tmp_path / "vxlan")
    killed.kill()
    killed.wait()
    assert left.is_dir()
    alive, growing = grow(tmp_path / "vxlan")
    try:
        assert not left.exists()
        ReportFolder(tmp_path / "vxlan").discard()
        assert growing.is_dir()
    finally:
        alive.kill()
        alive.wait()


FULL = """
import sys
from pathlib import Path
from testbed.errors import LabError
from testbed.report.record import Outcome, RunRecord, Verdict
from testbed.report.write import ReportFolder
place = Path(sys.argv[1]) / "vxlan"
ReportFolder(place).write(RunRecord({}, [Outcome("A-1", "A-1", "vxlan", Verdict.HELD)]))
try:
    ReportFolder(place).write(RunRecord({}, [Outcome("A-2", "A-2", "vxlan", Verdict.FAILED, 0, "x" * 400_000)]))
except LabError as error:
    print(error)
left = (place / "checks.json").read_text()
print(sorted(p.name for p in place.parent.iterdir() if p.is_dir()), left.count('"id": "A-1"'))
"""


def test_a_full_disk_is_one_clear_error_and_leaves_the_earlier_report(tmp_path: Path) -> None:
    mounted = ["unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size=400k none "$1" && exec "$2" -c "$3" "$1"', "sh"]
    argv = [*mounted, str(tmp_path), sys.executable, FULL]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip(f"no user namespaces here: {done.stderr}")
    assert "the report cannot be written: No space left on device" in done.stdout, done.stdout + done.stderr
    assert "hint: free some space" in done.stdout
    assert done.stdout.splitlines()[-1] == "['vxlan'] 1"


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LabError, match="--reports"):
        ReportFolder(tmp_path / "file" / "vxlan")


def test_a_report_replaces_nothing_but_a_report(tmp_path: Path) -> None:
    mine = tmp_path / "mine" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("years of work")
    (mine.parent / "checks.json").write_text("{}")
    for place in (mine, mine.parent, mine.parent / "deeper" / ".."):
        with pytest.raises(InputError, match="--reports"):
            ReportFolder(place)
    assert mine.read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    assert ReportFolder(tmp_path / "empty").write(record(outcome("A-1"))).is_dir()


@pytest.mark.parametrize("name", ["../../etc/passwd", "", ".", "a/b:c\0d", "x" * 500])
def test_file_names_stay_in_their_folder(name: str) -> None:
    safe = safe_name(name)
    assert safe
    assert "/" not in safe
    assert not safe.startswith(".")
    assert len(safe) <= 120


def test_the_table_and_the_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    stream = io.StringIO()
    screen = Screen(stream)
    bad = outcome("B-1", Verdict.FAILED, "one is not [bold]two", "XS-a->b")
    run = record(outcome("A-1"), outcome("A-3", Verdict.SKIPPED, "needs the moon"), bad)
    for done, one in enumerate(run.outcomes, 1):
        screen.outcome(one, done, 3)
    run.problems = ["something"]
    screen.summary(run, EXPECTED, ["B", "A"], "reports/vxlan")
    text = stream.getvalue()
    assert "one is not [bold]two" in text
    assert "B-1[vxlan-XS-a->b]" in text
    rows = [line.split() for line in text.splitlines() if line.startswith(("A ", "B ", "all "))]
    assert rows == [["B", "·", "1", "·", "1"], ["A", "1", "·", "1", "2"], ["all", "1", "1", "1", "3"]]
    assert "skipped A-3: needs the moon" in text
    assert "not as expected: something" in text
    assert "\x1b" not in text


def test_a_bar_that_comes_back_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    screen = Screen(stream)
    screen.outcome(outcome("A-1"), 1, 3)
    screen.close_bar()
    behind = stream.tell()
    screen.outcome(outcome("A-2"), 2, 3)
    screen.close_bar()
    assert "1/3" in stream.getvalue()[:behind]
    shown = stream.getvalue()[behind:]
    assert "2/3" in shown
    assert "0/3" not in shown
