"""A pause at a failure: what it prints, and how it ends."""

from __future__ import annotations

import os
import pty
import select
import signal
import time
from dataclasses import replace

import pytest

from testbed import pause
from testbed.options import RunOptions
from testbed.report.record import Outcome, Verdict

ENDS = ["worker1/client", "worker3/testapp"]
FAILED = Outcome("VXE-01", "VXE-01[x]", "vxlan", Verdict.FAILED, nodes=["worker1", "worker3"], path=ENDS)


def options(**more: object) -> RunOptions:
    return RunOptions(backend="vxlan", name="mine", **more)  # type: ignore[arg-type]


def test_the_commands_get_in_at_both_ends() -> None:
    assert pause.commands(options(), FAILED) == [
        "testbed status --name mine",
        "testbed shell --name mine worker1/client",
        "testbed shell --name mine worker3/testapp",
        "testbed shell --name mine worker1",
        "testbed shell --name mine worker3",
        "testbed capture --name mine worker3:eth0",
        "testbed trace --name mine worker1/client worker3/testapp",
    ]


def test_the_trace_is_by_such_a_packet_as_was_lost() -> None:
    packet = {"protocol": "icmp", "size": 9072, "dont_fragment": True}
    lost = replace(FAILED, evidence={"trace": {"packet": packet}})
    assert pause.commands(options(), lost)[-1] == (
        "testbed trace --name mine --proto icmp --size 9072 --df worker1/client worker3/testapp"
    )


def test_the_trace_is_between_the_ends_of_what_was_lost_and_a_syn_has_no_size() -> None:
    packet = {"protocol": "tcp", "size": 0, "dont_fragment": False}
    trace = {"packet": packet, "source": "worker1/client", "target": "worker2"}
    assert pause.commands(options(), replace(FAILED, evidence={"trace": trace}))[-1] == (
        "testbed trace --name mine --proto tcp worker1/client worker2"
    )


def test_a_check_without_a_path_has_no_trace() -> None:
    about = Outcome("LSE-01", "LSE-01", "vxlan", Verdict.FAILED)
    assert pause.commands(options(), about) == ["testbed status --name mine"]


def test_without_a_terminal_the_time_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pause, "has_terminal", lambda: False)
    said: list[str] = []
    began = time.monotonic()
    pause.pause(options(pause_on_fail=True, pause_seconds=0.2), FAILED, "reports/x", said.append)
    assert time.monotonic() - began >= 0.2
    assert said[0] == "paused: VXE-01[x] failed; lab mine is up"
    assert said[-2:] == ["it goes on after 0.2 s", "going on"]
    assert "captures and state: reports/x" in said


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def test_enter_on_the_terminal_ends_it() -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        pause.pause(options(pause_on_fail=True), FAILED, "", say)
        os._exit(7)
    try:
        shown = b""
        while b"Enter goes on" not in shown:
            assert select.select([terminal], [], [], 30)[0], shown
            shown += os.read(terminal, 4096)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        os.write(terminal, b"\n")
        ended = 0
        end = time.monotonic() + 30
        while not ended and time.monotonic() < end:
            ended, status = os.waitpid(pid, os.WNOHANG)
            select.select([terminal], [], [], 0.05)
        assert ended == pid
        assert os.waitstatus_to_exitcode(status) == 7
        pid = 0
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(terminal)
