"""The pytest plugin, run as its users run it, on suites that need no lab."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as Xml
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from testbed.labs.state import locked
from tests.labs.helpers import unique

CONFIGURATION = Path(__file__).parents[2] / "testbed" / "pytest.ini"

HEAD = """
import pytest
from testbed.checks import check, inconclusive
from testbed.errors import InputError, LabError
from testbed.errors import ProductError
"""

ONE_OF_EACH = """
@check("LSE-01")
def test_holds(): pass

@check("LSE-02")
def test_fails(): assert 1 == 2, "one is not two"

@check("LSE-03")
def test_cannot_tell(): inconclusive("no control")

@check("LSE-05")
def test_lab(): raise LabError("the cable is out", where="leaf1", hint="plug it in")

@check("POD-01")
def test_skips(): pytest.skip("not here")

@check("POD-05")
def test_breaks(): raise KeyError("oops")

@check("POD-06")
def test_product(): raise ProductError("flanneld died")

@check("DR-01")
def test_about_another_backend(): assert False
"""


@dataclass(frozen=True)
class Ended:
    code: int
    output: str
    report: Path

    @property
    def checks(self) -> dict[str, Any]:
        return {c["id"]: c for c in json.loads((self.report / "checks.json").read_text())["checks"]}

    @property
    def verdicts(self) -> dict[str, str]:
        return {identity: c["verdict"] for identity, c in self.checks.items()}

    @property
    def run(self) -> Mapping[str, Any]:
        run: Mapping[str, Any] = json.loads((self.report / "checks.json").read_text())["run"]
        return run


Runner = Callable[..., Ended]


@pytest.fixture
def run(tmp_path: Path) -> Runner:
    def run_suite(code: str, *options: str, backend: str | None = "vxlan", file: str = "", **env: str) -> Ended:
        folder = tmp_path / "suites"
        folder.mkdir(exist_ok=True)
        (folder / "test_some.py").write_text(HEAD + code)
        report = tmp_path / "reports" / "run"
        # One file of a folder is asked for, so that the rows that this suite leaves out do not show as skipped.
        argv = [sys.executable, "-m", "pytest", "-c", str(CONFIGURATION), "--rootdir", str(tmp_path)]
        argv += [f"--backend={backend}"] if backend else []
        argv += [f"--reports={report}", *options, str(folder / (file or "test_some.py"))]
        environment = {k: v for k, v in os.environ.items() if k not in ("CI", "COLUMNS")} | env
        done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
        return Ended(done.returncode, done.stdout + done.stderr, report)

    return run_suite


def test_verdicts_by_fault(run: Runner) -> None:
    ended = run(ONE_OF_EACH)
    assert ended.verdicts == {
        "LSE-01": "held",
        "LSE-02": "failed",
        "LSE-03": "inconclusive",
        "LSE-05": "lab_error",
        "POD-01": "skipped",
        "POD-05": "lab_error",
        "POD-06": "failed",
    }
    assert ended.code == ended.run["exit"] == 2
    assert "one is not two" in ended.checks["LSE-02"]["reason"]
    assert ended.checks["LSE-05"]["reason"] == "leaf1: the cable is out\n  hint: plug it in"
    assert ended.checks["POD-05"]["reason"].startswith("the check itself broke: KeyError")
    assert (ended.run["backend"], ended.run["topology"], ended.run["mtu"]) == ("vxlan", "racks", 9150)
    assert ended.run["implementations"]["worker3"] == "bundled"
    assert "one is not two" in ended.output
    assert "Traceback" not in ended.output
    artefact = ended.report / ended.checks["LSE-02"]["artefacts"][0]
    assert "one is not two" in artefact.read_text()
    assert not (ended.report / "checks" / "LSE-01").exists()
    suite = Xml.parse(ended.report / "junit.xml").getroot()[0]
    assert [suite.get(k) for k in ("tests", "failures", "errors", "skipped")] == ["7", "3", "2", "1"]


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        ("@check('LSE-01')\ndef test_a(): pass", 0),
        ("@check('LSE-01')\ndef test_a(): assert False", 1),
        ("@check('LSE-01')\ndef test_a(): inconclusive('x')", 1),
        ("@check('LSE-01')\ndef test_a(): raise LabError('x')", 2),
        ("@check('LSE-01')\ndef test_a(): raise InputError('x')", 3),
        ("@check('LSE-01')\ndef test_a(): pytest.skip('x')", 5),
        ("@check('DR-01')\ndef test_a(): pass", 5),
        ("this is no python", 2),
        ("@check('XYZ-99')\ndef test_a(): pass", 2),
        ("@check('LSE-01')\ndef test_a(): raise KeyboardInterrupt", 130),
    ],
)
def test_exit_codes(run: Runner, code: str, exit_code: int) -> None:
    ended = run(code)
    assert ended.code == exit_code, ended.output
    assert ended.run["exit"] == exit_code


def test_what_ran_before_an_interrupt_is_reported(run: Runner) -> None:
    ended = run("@check('LSE-01')\ndef test_a(): pass\n@check('LSE-02')\ndef test_b(): raise KeyboardInterrupt")
    assert ended.code == 130
    assert ended.verdicts == {"LSE-01": "held"}
    assert "interrupted" in ended.output
    assert "full-trace" not in ended.output


def test_a_failure_in_the_clean_up_counts(run: Runner) -> None:
    code = """
@pytest.fixture
def late():
    yield
    inconclusive("packets were dropped")

@check("LSE-01")
def test_a(late): pass
"""
    ended = run(code)
    assert (ended.code, ended.verdicts) == (1, {"LSE-01": "inconclusive"})
    assert len(json.loads((ended.report / "checks.json").read_text())["checks"]) == 1


PATHS = """
@check("VXE-01", encapsulated=True)
def test_a(path): pass
"""


def test_names_and_paths(run: Runner) -> None:
    lines = run(PATHS, "--collect-only", "-q").output.splitlines()
    assert [line.partition("::")[2] for line in lines if "::" in line] == [
        "VXE-01[vxlan-SS-worker1/client->worker2/testapp]",
        "VXE-01[vxlan-XS-worker1/client->worker3/testapp]",
    ]
    direct = run(PATHS, "--collect-only", "-q", backend="vxlan-direct").output
    assert "VXE-01[vxlan_direct-XS-worker1/client->worker3/testapp]" in direct
    assert "SS" not in direct
    flat = run(PATHS.replace("raise", ""), "--topology=flat", "-k", "XS")
    assert flat.verdicts == {"VXE-01": "skipped"}
    assert flat.checks["VXE-01"]["reason"] == "flat has no two nodes in different subnets"


@pytest.mark.parametrize("netem", [True, False])
def test_a_row_that_needs_a_kernel_feature_runs_where_that_is(run: Runner, *, netem: bool) -> None:
    code = f"""
from testbed import collecting
collecting.probe_features = lambda: {{"netem": {{"ok": {netem}}}}}

@check("ECMP-05")
def test_slow(): pass

@check("ECMP-06")
def test_down(): pass
"""
    ended = run(code)
    assert ended.verdicts["ECMP-05"] == ("held" if netem else "skipped")
    assert ended.verdicts["ECMP-06"] == "held"
    assert netem or "netem" in ended.checks["ECMP-05"]["reason"]


PASSES = """
from testbed import collecting
collecting.probe_features = lambda: {"netem": {"ok": False}}

@check("LSE-01")
def test_a(): pass

@check("LSE-02")
def test_b(): pass

@check("LSE-03")
def test_c(): pass

@check("ECMP-05")
def test_slow(): pass
"""


@pytest.mark.parametrize(
    ("expression", "deferred", "shares"),
    [
        ("LSE or ECMP", ["ECMP-05"], [["LSE-01", "LSE-03"], ["ECMP-05", "LSE-02"]]),
        ("LSE-01 or LSE-03", [], [["LSE-01"], ["LSE-03"]]),
    ],
)
def test_what_other_passes_are_for_is_a_part_of_what_was_chosen(
    run: Runner, tmp_path: Path, expression: str, deferred: list[str], shares: list[list[str]]
) -> None:
    def ran(name: str, **env: str) -> list[str]:
        part = tmp_path / name
        part.mkdir()
        run(PASSES, "-k", expression, TESTBED_PART=str(part), **env)
        return sorted(json.loads(line)["id"] for line in (part / "outcomes.jsonl").read_text().splitlines())

    assert "ECMP-05" not in ran("host", TESTBED_DEFER="netem")
    assert json.loads((tmp_path / "host" / "deferred.json").read_text()) == deferred
    assert [ran(f"share{number}", TESTBED_SHARE=f"{number}/2") for number in range(2)] == shares


def test_rows_are_chosen_by_their_id(run: Runner) -> None:
    assert run(ONE_OF_EACH, "-k", "LSE-01").verdicts == {"LSE-01": "held"}
    assert run(ONE_OF_EACH, "-k", "LSE-99").code == 5


def test_smoke_rows_that_nothing_checks_show_as_skipped(run: Runner) -> None:
    ended = run("@check('LSE-01')\ndef test_a(): pass", file=".")
    assert ended.verdicts["LSE-01"] == "held"
    assert ended.verdicts["LSE-04"] == "skipped"
    assert ended.checks["LSE-04"]["reason"] == "needs --store kubernetes"
    assert "IPIP-01" not in ended.verdicts
    assert ended.code == 0
    assert "not as expected: VXD: 0 checks ran where 4 are expected" in ended.output
    strict = run("@check('LSE-01')\ndef test_a(): pass", file=".", CI="true")
    assert strict.code == 1


FULL = """
@check("NAT-09", disruptive=True)
def test_disruptive(): pass

@check("NAT-01")
def test_later(): pass

@check("LSE-03")
def test_sooner(): pass

@check("POD-17")
def test_between(): pass
"""


def test_the_smoke_part_is_what_runs_unless_all_or_some_are_asked_for(run: Runner) -> None:
    def order(*options: str, file: str = ".") -> list[str]:
        ended = run(FULL, *options, file=file)
        assert ended.code == 0, ended.output
        return [identity for identity, verdict in ended.verdicts.items() if verdict == "held"]

    every = ["LSE-03", "POD-17", "NAT-01", "NAT-09"]  # the catalogue's order, and what disturbs others behind it
    assert order() == ["NAT-01"]
    assert order("--full") == every
    assert order("-k", "NAT or LSE") == ["LSE-03", "NAT-01", "NAT-09"]
    assert order(file="test_some.py") == every


def test_a_full_run_shows_what_is_not_written(run: Runner) -> None:
    code = "@check('LSE-01')\ndef test_a(): pass"
    assert "NAT-09" not in run(code, file=".").verdicts
    ended = run(code, "--full", file=".")
    assert ended.checks["NAT-09"]["reason"] == "is not written yet"
    assert "NAT-20" not in ended.verdicts  # of no lab of this kind


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lab=kind", "--rules=ipfw", "--set=x", "--flanneld=/nowhere/it"], ["kind", "ipfw", "K", "nowhere"]),
        (["--lab=moon"], ["'moon' is not known"]),
        (["--kernel=guest"], ["does not work yet"]),
        (["--image=full"], ["the machines of netns have no image", "--lab clab"]),
        (["--topology=moon"], ["moon"]),
        (["--net-conf=VNI=twelve"], ["VNI"]),
        (["--flanneld=worker9=/bin/true"], ["worker9", "worker1"]),
        (["--manifest=/nowhere.yml"], ["/nowhere.yml"]),
    ],
)
def test_wrong_input_is_refused_before_anything_is_made(run: Runner, options: list[str], words: list[str]) -> None:
    ended = run("@check('LSE-01')\ndef test_a(): pass", *options)
    assert ended.code == 3, ended.output
    assert all(word in ended.output for word in words), ended.output
    assert "Traceback" not in ended.output
    assert ended.output.startswith("error: "), ended.output
    assert ended.output.count("error: ") == 1, ended.output
    assert not ended.report.exists()


def test_what_selects_nothing_says_so_and_a_wrong_selection_keeps_the_report(run: Runner) -> None:
    one = "@check('LSE-01')\ndef test_a(): pass"
    held = run(one)
    wrong = run(one, "-k", "LSE(")
    assert wrong.code in (3, 4)  # pytest's own 4 is made 3 by `testbed run`
    assert "Wrong expression" in wrong.output
    assert json.loads((wrong.report / "checks.json").read_text())["run"]["exit"] == 0
    assert sorted(path.name for path in held.report.parent.glob(".*")) == [f".{held.report.name}.lock"]
    nothing = run(one, "-k", "LSE-99")
    assert "nothing ran: no check is selected" in nothing.output
    assert json.loads((nothing.report / "checks.json").read_text())["run"]["exit"] == 0, "it replaced a report"


def test_a_name_in_use_keeps_the_report(run: Runner, tmp_path: Path) -> None:
    name, state = unique("busy"), str(tmp_path / "state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESTBED_STATE", state)
        with locked(name):
            ended = run("@check('LSE-01')\ndef test_a(cluster): pass", f"--name={name}", TESTBED_STATE=state)
    assert ended.code == 2, ended.output
    assert "is being brought up or down by another command" in ended.output
    assert not ended.report.exists()


def test_the_suites_want_a_backend(run: Runner) -> None:
    ended = run("@check('LSE-01')\ndef test_a(): pass", backend=None)
    assert ended.code == 3
    assert "--backend vxlan" in ended.output
    unknown = run("@check('LSE-01')\ndef test_a(): pass", backend="vxlam")
    assert unknown.code == 3
    assert "vxlan_direct" in unknown.output


def test_plain_tests_are_left_alone(run: Runner) -> None:
    ended = run("def test_plain(): pass", backend=None)
    assert ended.code == 0
    assert not ended.report.exists()


DEPLOYED = """
from testbed.nodes import deploy

def bring_up(options, progress=None):
    with progress.step("Making nothing"):
        raise {error}("it did not come up")

deploy.bring_up = bring_up

@check("LSE-01")
def test_a(cluster): pass

@check("LSE-02")
def test_b(cluster): pass
"""


@pytest.mark.parametrize(("error", "verdict", "code"), [("LabError", "lab_error", 2), ("ProductError", "failed", 1)])
def test_a_lab_that_does_not_come_up_is_told_once(run: Runner, error: str, verdict: str, code: int) -> None:
    ended = run(DEPLOYED.replace("{error}", error))
    assert (ended.code, ended.verdicts) == (code, {"LSE-01": verdict})
    assert ended.output.count("it did not come up") == 1
    assert "Making nothing" in ended.output
    assert "Traceback" not in ended.output


LABS = """
from testbed.nodes import deploy
from types import SimpleNamespace

def bring_up(options, progress=None):
    down = lambda: open(f"down-{options.name}", "w").close()
    return SimpleNamespace(options=options, lab=SimpleNamespace(down=down, detach=lambda: None))

deploy.bring_up = bring_up

@pytest.fixture(scope="session")
def captures(cluster):  # there is no interface to listen on
    return None

@pytest.mark.parametrize("number", range(6))
@check("LSE-01")
def test_a(cluster, number):
    assert number != 3, f"on {cluster.options.name}"
"""


def test_each_worker_has_a_lab_and_one_report_has_all(run: Runner, tmp_path: Path) -> None:
    ended = run(LABS, "-n", "2", "--name", "pair")
    assert ended.code == 1, ended.output
    found = json.loads((ended.report / "checks.json").read_text())["checks"]
    assert sorted(c["verdict"] for c in found) == ["failed"] + ["held"] * 5
    assert {path.name for path in tmp_path.glob("down-*")} == {"down-pair-gw0", "down-pair-gw1"}
    failed = next(c for c in found if c["verdict"] == "failed")
    assert "on pair-gw" in failed["reason"]
    assert (ended.report / failed["artefacts"][0]).is_file()


def test_a_kept_lab_is_left_up(run: Runner, tmp_path: Path) -> None:
    assert run(LABS, "--keep", "--name", "kept").code == 1
    assert not list(tmp_path.glob("down-*"))
    assert run(LABS, "--name", "kept").code == 1
    assert len(list(tmp_path.glob("down-*"))) == 1
