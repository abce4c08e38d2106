"""The report: verdicts to exit codes, expected counts, files that are whole or not there."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import xml.etree.ElementTree as Xml
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

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


def test_an_assertion_that_a_clean_up_masked_is_still_the_verdict() -> None:
    def checked() -> None:
        try:
            assert_nothing("3 of 3 lost")
        finally:
            raise LabError("the node is gone")

    verdict, reason = ended(checked)
    assert verdict is Verdict.FAILED
    assert reason.startswith("3 of 3 lost\n")
    assert "the node is gone" in reason


def test_an_assertion_that_was_dealt_with_is_none_any_more() -> None:
    def told_otherwise() -> None:
        try:
            assert_nothing("it does not listen")
        except AssertionError:
            raise LabError("the lab has no such port") from None

    def cannot_tell() -> None:
        try:
            assert_nothing("it was not seen")
        except AssertionError:
            raise Inconclusive("nor was its control")  # noqa: B904 (as checks do it)

    def before() -> None:
        with suppress(AssertionError):
            assert_nothing("not yet")
        raise LabError("the node is gone")

    assert [ended(one)[0] for one in (told_otherwise, cannot_tell, before)] == [
        Verdict.LAB_ERROR,
        Verdict.INCONCLUSIVE,
        Verdict.LAB_ERROR,
    ]


def assert_nothing(message: str) -> None:
    raise AssertionError(message)


def ended(check: Callable[[], None]) -> tuple[Verdict, str]:
    """How a check ends."""
    try:
        check()
    except Exception as error:  # noqa: BLE001 (that is what is asked for)
        return verdict_of(error, skipped=Skipped, failed=Failed)
    raise AssertionError("it did not fail")


HELD, FAILED, LAB, UNSURE = Verdict.HELD, Verdict.FAILED, Verdict.LAB_ERROR, Verdict.INCONCLUSIVE
KNOWN, SURPRISE, SKIPPED = Verdict.EXPECTED_FAILURE, Verdict.UNEXPECTED_PASS, Verdict.SKIPPED


@pytest.mark.parametrize(
    ("first", "clean_up", "stands", "code"),
    [
        (HELD, UNSURE, UNSURE, Exit.FAILED),
        (HELD, LAB, LAB, Exit.LAB),
        (HELD, HELD, HELD, Exit.HELD),
        (FAILED, UNSURE, FAILED, Exit.FAILED),
        (FAILED, LAB, FAILED, Exit.FAILED),
        (LAB, UNSURE, LAB, Exit.LAB),
        (LAB, FAILED, LAB, Exit.LAB),
        (UNSURE, FAILED, FAILED, Exit.FAILED),
        (UNSURE, LAB, LAB, Exit.LAB),
        (UNSURE, HELD, UNSURE, Exit.FAILED),
        (SURPRISE, UNSURE, UNSURE, Exit.FAILED),
        (SURPRISE, KNOWN, SURPRISE, Exit.FAILED),
        (KNOWN, UNSURE, UNSURE, Exit.FAILED),
        (KNOWN, LAB, LAB, Exit.LAB),
        (SKIPPED, LAB, LAB, Exit.LAB),
    ],
)
def test_which_of_a_check_s_and_its_clean_up_s_verdicts_stands(
    first: Verdict, clean_up: Verdict, stands: Verdict, code: Exit
) -> None:
    run = record()
    run.add(outcome("A-1", first, "why it ended so"))
    kept = run.add(outcome("A-1", clean_up, "what its clean-up met"))
    assert run.outcomes == [kept]
    assert (kept.verdict, run.finish(strict=True)) == (stands, code)
    told = ["why it ended so", "what its clean-up met"]
    assert kept.reason.startswith(told[0 if stands is first else 1]), "the reason of what stands comes first"
    assert all(text in kept.reason for text in told)


def test_a_clean_up_takes_nothing_from_what_was_kept_of_a_failure() -> None:
    def gathered(*files: str, **more: Any) -> dict[str, Any]:
        kept: dict[str, Any] = {"folder": "checks/A-1", "changes": [], "trace": None, "missing": [], "seconds": 0.5}
        return kept | {"files": [{"path": path} for path in files]} | more

    failed, dropped = outcome("A-1", FAILED, "3 of 3 lost"), outcome("A-1", UNSURE, "tcpdump told no statistics")
    failed.artefacts, failed.figures = ["a.pcap"], [{"figure": "speed"}]
    failed.evidence = gathered("a.pcap", changes=["worker1: + route"], trace={"delivered": False})
    dropped.artefacts, dropped.evidence = ["a.pcap", "b.txt"], gathered("a.pcap", "b.txt", missing=["worker2"])
    run = record()
    run.add(failed)
    kept = run.add(dropped)
    assert kept.reason == "3 of 3 lost\nthen inconclusive: tcpdump told no statistics"
    assert (kept.seconds, kept.artefacts, kept.figures) == (0.5, ["a.pcap", "b.txt"], [{"figure": "speed"}])
    assert kept.evidence is not None
    assert kept.evidence == gathered("a.pcap", "b.txt", **{key: kept.evidence[key] for key in ("changes", "trace")},
                                     missing=["worker2"], seconds=1.0)  # fmt: skip
    assert kept.evidence["trace"] == {"delivered": False}
    assert "3 of 3 lost" in Xml.fromstring(to_junit(run)).find(".//failure").get("message")  # type: ignore[union-attr,operator]


def test_half_of_a_surrogate_pair_costs_no_report(tmp_path: Path) -> None:
    broken = json.loads('"the plugin said \\ud800"')
    one = outcome("A-1", FAILED, broken)
    one.account = {"lab": broken, "asserted": [], "commands": [{"where": "a", "argv": ["x", broken], "rc": 1}]}
    one.sketch = {"versions": {"plugin": broken}}
    run = record()
    run.add(one)
    run.facts["name"] = broken
    folder = ReportFolder(tmp_path / "report").write(run)
    (check,) = json.loads((folder / "checks.json").read_text())["checks"]
    assert check["reason"] == "the plugin said \\ud800"
    assert "the plugin said \\ud800" in (folder / "index.html").read_text()
    assert Xml.parse(folder / "junit.xml").getroot().tag == "testsuites"
    json.dumps(one.to_message(), ensure_ascii=False).encode()  # as it travels from a worker


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


def test_nothing_that_is_printed_steers_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    stream = io.StringIO()
    screen = Screen(stream)
    evil = "\x1b]0;owned\x07 \x1b[2J \x9b31m \u202e \ud800 \r end\tof it"
    one = outcome(f"A-1{evil}", FAILED, f"{evil}\n{evil}")
    one.leaked = [evil]
    screen.outcome(one, 1, 1)
    screen.more(outcome("A-1", UNSURE, evil))
    screen.leaked(one)
    run = record(one, outcome("A-2", SKIPPED, evil), outcome("A-3", KNOWN, evil))
    run.problems, run.broken = [evil], evil
    screen.summary(run, None, ["A"], evil)
    shown = stream.getvalue()
    assert shown.count("of it") >= 10
    assert not [char for char in shown if char not in "\n\t" and not char.isprintable()], ascii(shown)


def test_a_check_that_held_late_is_told_to_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    stream = io.StringIO()
    screen = Screen(stream)
    late = outcome("A-1")
    late.slow, late.account = True, {"late": ["it came after 4.0 s of at most 5.0 s"]}
    run = record(late, outcome("A-2"))
    for done, one in enumerate(run.outcomes, 1):
        screen.outcome(one, done, 2)
    screen.summary(run, None, ["A"], "")
    lines = stream.getvalue().splitlines()
    assert lines[0].split() == "held A-1 0.25 s slow: it came after 4.0 s of at most 5.0 s".split()
    assert "slow" not in lines[1]
    assert "slow: 1 checks held only late: A-1" in lines
    assert [check["slow"] for check in run.to_json()["checks"]] == [True, False]
    assert 'name="slow" value="it came after 4.0 s' in to_junit(run)
    assert run.finish(strict=True) == Exit.HELD
    run.add(outcome("A-1", UNSURE, "packets dropped"))
    assert not run.outcomes[0].slow, "it did not hold after all"


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
