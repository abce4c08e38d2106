"""The command line: what is listed, how each kind of end is told, and what `run` hands to pytest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from testbed import cli
from testbed.commands import run as run_command
from testbed.errors import InputError, LabError


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A command `fail` that raises or returns what is put into this list."""
    outcome: list[object] = []

    @click.command()
    def fail() -> object:
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    monkeypatch.setattr(cli.LazyGroup, "list_commands", lambda *_: ["fail"])
    monkeypatch.setattr(cli.LazyGroup, "get_command", lambda *_: fail)
    monkeypatch.setitem(cli.COMMANDS, "fail", "Fails.")
    return outcome


@pytest.mark.parametrize(
    ("outcome", "code", "said"),
    [
        (None, 0, ""),
        (5, 5, ""),
        (LabError("leaf1 is gone", hint="bring it up"), 2, "error: leaf1 is gone\n  hint: bring it up"),
        (InputError("no such topology"), 3, "error: no such topology"),
        (click.UsageError("what?"), 3, "error: what?"),
        (click.BadParameter("7 is too much"), 3, "7 is too much"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("by nought"), 2, "internal: ZeroDivisionError: by nought"),
    ],
)
def test_every_end_has_its_exit_code_and_one_message(
    ending: list[object],
    outcome: object,
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ending.append(outcome)
    assert cli.invoke(["fail"]) == code
    captured = capsys.readouterr()
    assert said in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    kept = list(tmp_path.iterdir())
    if isinstance(outcome, ZeroDivisionError):
        assert str(kept[0]) in captured.err
        assert "Traceback" in kept[0].read_text()
    else:
        assert kept == []


def test_a_traceback_is_shown_to_who_asks(
    ending: list[object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESTBED_DEBUG", "1")
    ending.append(ZeroDivisionError())
    assert cli.invoke(["fail"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_command_that_is_not_there_is_named_with_its_likeness(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.invoke(["doctr"]) == 3
    assert "did you mean doctor?" in capsys.readouterr().err


def test_help_lists_exactly_the_commands_that_have_a_module(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.invoke(["--help"]) == 0
    text = capsys.readouterr().out
    for name, line in cli.COMMANDS.items():
        assert (line in text) == (cli.FOLDER / f"{name}.py").exists(), name


def test_every_listed_command_is_a_click_command_of_that_name() -> None:
    context = click.Context(cli.cli)
    for name in cli.cli.list_commands(context):
        command = cli.cli.get_command(context, name)
        assert isinstance(command, click.Command)
        assert command.name == name


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from testbed import cli; cli.invoke(['--help'])\n"
        "heavy = {'pytest', 'pydantic', 'rich', 'jinja2', 'scapy', 'yaml', 'testbed.flannelspec'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_goes_away_gets_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    argv = [sys.executable, "-m", "testbed", "--help"]
    done = subprocess.run(argv, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 2, "no check has failed"


# --- testbed run ---


@pytest.mark.parametrize(
    ("arguments", "names", "options"),
    [
        (["vxlan"], ["vxlan"], []),
        (["host-gw", "vxlan", "host_gw"], ["host_gw", "vxlan"], []),
        (["vxlan", "--", "-k", "VXE-01"], ["vxlan"], ["-k", "VXE-01"]),
        (["vxlan", "-k", "VXE-01"], ["vxlan"], ["-k", "VXE-01"]),
        (["--", "-k", "x"], [], ["-k", "x"]),
    ],
)
def test_names_come_first_then_options(arguments: list[str], names: list[str], options: list[str]) -> None:
    assert run_command.split(arguments) == (names, options)


def test_every_unknown_name_is_told_at_once() -> None:
    with pytest.raises(InputError) as raised:
        run_command.split(["vxlam", "vxlan", "hostgw"])
    assert "'vxlam'" in str(raised.value)
    assert "'hostgw'" in str(raised.value)
    assert "'vxlan'" not in str(raised.value)


def test_each_of_several_runs_has_reports_of_its_own() -> None:
    assert run_command.with_reports_apart("udp", ["--reports", "out", "-x"]) == ["--reports", "out/udp", "-x"]
    assert run_command.with_reports_apart("udp", ["--reports=out"]) == ["--reports=out/udp"]


def test_help_of_a_run_shows_options_with_what_each_takes() -> None:
    shown = run_command.suite_options()
    for option in ("--path-trace SRC DST  ", "--pause-on-fail  ", "--full  ", "--net-conf KEY=VALUE  "):
        assert option in shown


SUITE_PLUGIN = """
def pytest_addoption(parser):
    parser.addoption("--backend", required=True)
"""

ENDS = {
    "held": ("def test_it(): pass", 0),
    "failed": ("def test_it(): assert False", 1),
    "none": ("", 5),
    "interrupted": ("def test_it(): raise KeyboardInterrupt", 130),
    "internal": ("def test_it(): pass", 2),
}


@pytest.mark.parametrize("end", ENDS)
def test_how_pytest_ended_is_told_apart(end: str, tmp_path: Path) -> None:
    """A real pytest, with a suite and a plugin in the place of ours."""
    code, expected = suite_run(tmp_path, ENDS[end][0], broken=end == "internal"), ENDS[end][1]
    assert code == expected


def test_an_option_that_pytest_does_not_know_is_the_user_s_fault(tmp_path: Path) -> None:
    assert suite_run(tmp_path, ENDS["held"][0], options=["--no-such-option"]) == 3


def suite_process(folder: Path, suite: str, *, broken: bool = False, options: list[str]) -> subprocess.Popen[str]:
    """`testbed run` with a suite and a plugin of the test's own."""
    suites = folder / "suites"
    suites.mkdir()
    (suites / "test_it.py").write_text(suite)
    hook = "def pytest_runtestloop(session): raise RuntimeError('broken')\n" if broken else ""
    (folder / "stand_in.py").write_text(SUITE_PLUGIN + hook)
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -p stand_in -p no:cacheprovider\n")
    code = f"""
import sys; sys.path.insert(0, {str(folder)!r})
from pathlib import Path
from testbed import cli
from testbed.commands import run
run.CONFIGURATION = Path({str(folder / "pytest.ini")!r})
run.folder = lambda name: Path({str(suites)!r})
run.require_tools = lambda *runs: None
sys.exit(cli.invoke(['run', 'vxlan', '--', *{options!r}]))
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def suite_run(folder: Path, suite: str, *, broken: bool = False, options: list[str] | None = None) -> int:
    process = suite_process(folder, suite, broken=broken, options=options or [])
    print(process.communicate(timeout=60)[0])
    return process.returncode


def test_several_runs_end_with_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = {"vxlan": 0, "udp": 1, "host_gw": 5}
    monkeypatch.setattr(run_command, "require_tools", lambda *runs: None)
    monkeypatch.setattr(run_command, "in_a_process", lambda name, _: codes[name])
    assert cli.invoke(["run", *codes]) == 1


def test_an_interrupt_ends_all_of_several_runs(tmp_path: Path) -> None:
    """SIGTERM during the first of two: that one ends in its own time, and the second is not begun."""
    began, ended = tmp_path / "began", tmp_path / "ended"
    code = f"""
import sys
from testbed import cli
from testbed.commands import run
run.require_tools = lambda *runs: None
run.sys = type(sys)("sys")
run.sys.executable = {str(tmp_path / "stand-in")!r}
cli.main()
"""
    stand_in = tmp_path / "stand-in"
    stand_in.write_text(
        f"#!/bin/sh\ntrap 'echo ended >>{ended}; exit 130' TERM\n"
        f'echo "$4" >>{began}\n'
        "for i in $(seq 400); do sleep 0.05; done\n"
    )
    stand_in.chmod(0o755)
    argv = [sys.executable, "-c", code, "run", "vxlan", "udp"]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while not began.exists():
        assert time.monotonic() < deadline, "the first run did not begin"
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 130
    assert began.read_text() == "vxlan\n"
    assert ended.read_text() == "ended\n"


@pytest.mark.parametrize(
    ("ending", "code"), [(KeyboardInterrupt(), 130), (pytest.Session.Interrupted("1 error during collection"), 2)]
)
def test_only_the_users_own_interrupt_is_one(ending: BaseException, code: int) -> None:
    outcome = run_command.Outcome()
    with pytest.raises(type(ending)) as raised:
        raise ending
    outcome.pytest_keyboard_interrupt(raised)
    assert outcome.code(2) == code
