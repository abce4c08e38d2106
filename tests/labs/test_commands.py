"""The commands that work on a lab, from another process than the one that brought it up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from testbed.labs import state
from testbed.labs.netns import NetnsLab
from testbed.model import LabSpec
from tests.labs.helpers import processes_of, unique

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def testbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    """Runs `testbed` with labs of this test's own."""
    monkeypatch.setenv("TESTBED_STATE", str(tmp_path / "state"))

    def run(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "testbed", *words]
        return subprocess.run(
            argv, cwd=tmp_path, env=os.environ, input=stdin, capture_output=True, text=True, check=False, timeout=120
        )

    yield run
    assert "Traceback" not in run("down", "--all").stderr


def test_no_lab_is_said(testbed: Command) -> None:
    for words in (["status"], ["down"], ["down", "--all"]):
        done = testbed(*words)
        assert done.returncode == 0
        assert "no lab" in done.stdout
    assert testbed("down", "--name", "mine").stdout == "lab mine was not up\n"
    both = testbed("down", "--all", "--name", "mine")
    assert (both.returncode, "--all and --name" in both.stderr) == (3, True)
    done = testbed("exec", "worker1", "--", "true")
    assert (done.returncode, done.stderr) == (2, "error: no lab is up\n  hint: `testbed up` makes one\n")
    assert json.loads(testbed("status", "--json").stdout) == {"schema": 1, "labs": []}


def test_a_state_folder_that_cannot_be_used(testbed: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    (tmp_path / "link").symlink_to(tmp_path / "open")
    (tmp_path / "file").write_text("")
    for name, words in (
        ("open", "is open to others\n  hint: chmod 700"),
        ("link", "no folder of yours"),
        ("file", "hint"),
        ("not/there", "No such file or directory\n  hint: TESTBED_STATE"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv("TESTBED_STATE", str(tmp_path / name))
            done = testbed("status")
        assert (done.returncode, done.stderr.count("error: ")) == (2, 1), done.stderr
        assert words in done.stderr, name


def test_a_bare_lab_from_outside(testbed: Command, flat: LabSpec, make_lab: Callable[[LabSpec], NetnsLab]) -> None:
    lab = make_lab(flat)
    lab.detach()
    assert testbed("exec", "worker1", "--", "sh", "-c", "hostname; exit 7").returncode == 7
    assert testbed("exec", "worker1", "hostname").stdout == "worker1\n"
    assert testbed("shell", "worker2", stdin="hostname; exit 4\n").stdout.strip() == "worker2"
    done = testbed("exec", "nobody", "--", "true")
    assert done.returncode == 3
    assert f"lab {flat.id} has no nobody\n  hint: it has: master1, worker1" in done.stderr
    done = testbed("capture", "worker1:nothing")
    assert (done.returncode, done.stderr) == (3, "error: worker1 has no interface nothing\n  hint: it has: lo, eth0\n")
    (told,) = json.loads(testbed("status", "--json").stdout)["labs"]
    assert told["name"] == flat.id
    assert {n["name"]: n["address"] for n in told["nodes"]} == {n.name: str(n.ip) for n in flat.nodes}
    assert testbed("graph").stdout.startswith("<svg")
    assert testbed("down").stdout == f"removed {flat.id}\n"
    assert processes_of(flat.id) == []


def test_of_several_labs_one_has_to_be_named(
    testbed: Command, flat: LabSpec, make_lab: Callable[[LabSpec], NetnsLab]
) -> None:
    from dataclasses import replace

    other = replace(flat, id=unique("second"))
    for spec in (flat, other):
        make_lab(spec).detach()
    done = testbed("exec", "worker1", "--", "true")
    assert done.returncode == 3
    assert flat.id in done.stderr
    assert other.id in done.stderr
    assert testbed("exec", "--name", other.id, "worker1", "--", "true").returncode == 0
    assert testbed("down", "--name", other.id).returncode == 0
    assert testbed("down", "--all").stdout == f"removed 1: {flat.id}\n"


def test_a_record_that_cannot_be_read_is_an_error_until_all_is_removed(testbed: Command, flat: LabSpec) -> None:
    (state.state_folder() / f"{flat.id}.json").write_text("{")
    done = testbed("status")
    assert done.returncode == 2
    assert "cannot be read" in done.stderr
    assert "hint: testbed down --all" in done.stderr
    assert testbed("down", "--all").returncode == 0
    assert testbed("status").returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["up", "nowhere"], "nowhere"),
        (["up", "--backend", "vxlam"], "there is no run called 'vxlam'"),
        (["up", "clos", "--set", "racks=0"], "racks"),
        (["up", "--name", "UPPER"], "cannot name a lab"),
        (["up", "--flanneld", "/nowhere/flanneld"], "there is no file"),
        (["up", "--mtu", "9999"], "9999"),
        (["up", "--net-conf", "Port=x"], "Port"),
        (["up", "--rules", "moon"], "'moon' is not known"),
        (["up", "--nonsense"], "No such option"),
        (["graph", "--topology", "nowhere"], "nowhere"),
    ],
)
def test_wrong_input_is_one_error_and_exit_3(words: list[str], message: str, testbed: Command) -> None:
    done = testbed(*words)
    assert done.returncode == 3, done.stderr
    assert message in done.stderr
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr


def test_a_drawing_that_cannot_be_written_is_an_error(testbed: Command) -> None:
    done = testbed("graph", "--topology", "flat", "-o", "/nowhere/lab.svg")
    assert (done.returncode, done.stderr) == (
        2,
        "error: /nowhere/lab.svg: cannot write the drawing: No such file or directory\n",
    )
