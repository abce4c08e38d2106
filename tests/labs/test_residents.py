"""Residents: what they run ends with their caller, but for daemons; without them everything goes on as ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from testbed.deadline import Deadline
from testbed.labs import interpreter, residents
from testbed.labs.base import TIMED_OUT
from testbed.labs.kinds import open_lab
from testbed.labs.netns import NetnsLab
from testbed.labs.netnsnode import NetnsNode
from testbed.model import LabSpec

PYTHON = [interpreter(), "-I", "-S", "-c"]


@pytest.fixture
def node(make_lab: Callable[[LabSpec], NetnsLab], flat: LabSpec) -> NetnsNode:
    """A node with a resident."""
    lab = make_lab(flat)
    lab.settle(["worker1"])
    assert residents.resident_of(lab.node("worker1"))
    return lab.node("worker1")


def pids(node: NetnsNode, pattern: str) -> list[str]:
    return node.run(["pgrep", "-f", pattern], check=False).stdout.split()


def test_a_command_s_parent_is_the_resident(node: NetnsNode) -> None:
    """The tests here are about something: without a resident a command is entered from outside, and has no parent."""
    parent = int(node.run(["sh", "-c", "echo $PPID"]).stdout)
    assert parent != 0
    residents.leave(node)
    assert int(node.run(["sh", "-c", "echo $PPID"]).stdout) == 0


@pytest.mark.parametrize(
    ("text", "rc", "out", "err"),
    [
        ("import sys; print(sys.argv, __name__, sys.stdin.read())", 0, "['-c', 'a', 'b'] __main__ in\n", ""),
        ("import sys; sys.exit('why')", 1, "", "why\n"),
        ("import sys; sys.exit(7)", 7, "", ""),
        ("import os; print(os.environ['WORD'], len(os.listdir('/proc/self/fd')))", 0, "x 4\n", ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -15, "", ""),
        ("print(1", 1, "", "SyntaxError"),
        ("1 / 0", 1, "", "ZeroDivisionError"),
        ("import threading; t = threading.Thread(target=lambda: print(1)); t.start(); t.join()", 0, "1\n", ""),
        ("def f():\n    return g()\ndef g():\n    return 5\nprint(f())", 0, "5\n", ""),
    ],
)
def test_a_program_runs_as_in_an_interpreter_of_its_own(
    node: NetnsNode, text: str, rc: int, out: str, err: str
) -> None:
    for _ in ("by the resident", "entered"):
        done = node.run([*PYTHON, text, "a", "b"], check=False, stdin="in", env={"WORD": "x"})
        assert (done.rc, done.stdout) == (rc, out), done
        assert err in done.stderr
        residents.leave(node)


def test_a_program_is_in_the_network_namespace_that_it_belongs_to(node: NetnsNode) -> None:
    node.run(["ip", "netns", "add", "inner"])
    place = node.netns("/run/netns/inner", "worker1/inner")
    look = [*PYTHON, "import socket; print(sorted(name for _, name in socket.if_nameindex()))"]
    assert "eth0" not in place.run(look).stdout
    assert "eth0" in node.run(look).stdout
    pid = place.start(["sleep", "7392"], name="inner")
    assert "eth0" not in node.run(["nsenter", "-t", str(pid), "-n", "ip", "-br", "link"]).stdout


def test_a_program_that_takes_too_long_is_ended_with_what_it_started(node: NetnsNode) -> None:
    text = "import subprocess; subprocess.run(['sleep', '7393'])"
    assert node.run([*PYTHON, text], check=False, timeout=0.5).rc == TIMED_OUT
    assert Deadline(5).poll(lambda: not pids(node, "sleep 7393") or None)


def test_a_command_ends_where_nobody_reads_any_more(node: NetnsNode) -> None:
    """SIGPIPE is what ends the left part of a pipe; a Python process ignores it and hands that on."""
    assert node.run(["sh", "-c", "yes | head -n 1; echo $?"], timeout=5).stdout == "y\n0\n"
    assert node.run(["bash", "-c", "yes | head -n 1; echo ${PIPESTATUS[0]}"], timeout=5).stdout == "y\n141\n"


def test_commands_side_by_side_do_not_wait_for_each_other(node: NetnsNode) -> None:
    began = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda n: node.run(["sh", "-c", f"sleep 0.5; echo {n}"]).stdout, range(8)))
    assert done == [f"{n}\n" for n in range(8)]
    assert time.monotonic() - began < 8 * 0.5


def test_no_descriptor_of_one_command_is_left_in_another_or_in_the_resident(node: NetnsNode) -> None:
    def held() -> list[str]:
        return node.run(["sh", "-c", "ls /proc/$PPID/fd; ls /proc/self/fd"]).stdout.split()

    before = held()
    for _ in range(5):
        node.start(["sleep", "7394"], name="held")
        node.run(["false"], check=False)
        node.run(["no-such-program"], check=False)
        node.write("/run/held", "x")
        node.read("/run/held")
    daemons = 5  # each is watched by one descriptor
    assert len(held()) == len(before) + daemons


def test_a_daemon_whose_program_is_not_there_is_one_that_ended(node: NetnsNode) -> None:
    pid = node.start(["/no/such/daemon"], name="missing")
    assert Deadline(5).poll(lambda: not node.run(["test", "-e", f"/proc/{pid}"], check=False).ok)
    assert b"/no/such/daemon" in node.read("/var/log/missing.log")


def test_without_its_resident_a_node_is_entered(node: NetnsNode) -> None:
    resident = node.run(["sh", "-c", "echo $PPID"]).stdout.strip()
    node.start(["sleep", "7395"], name="stays")
    node.run(["sh", "-c", f"kill -9 {resident}; sleep 5"], check=False)
    assert node.run(["echo", "there"]).stdout == "there\n"
    assert int(node.run(["sh", "-c", "echo $PPID"]).stdout) == 0
    node.write("/run/file", "data")
    assert node.read("/run/file") == b"data"
    assert pids(node, "^sleep 7395")


@pytest.mark.parametrize("first", ["read", "write", "start"])
def test_a_resident_that_is_stopped_holds_up_nobody_for_good(
    node: NetnsNode, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    monkeypatch.setattr(residents, "FILE_SECONDS", 0.5)
    node.write("/run/file", "before")
    resident = node.run(["sh", "-c", "echo $PPID"]).stdout.strip()
    ask: dict[str, Callable[[], object]] = {
        "read": lambda: node.read("/run/file"),
        "write": lambda: node.write("/run/file", "after"),
        "start": lambda: node.start(["sleep", "7398"], name="late"),
    }
    node.run(["sh", "-c", f"(sleep 0.2; kill -STOP {resident}) >/dev/null 2>&1 &"])
    assert Deadline(5).poll(lambda: stopped(node, resident) or None)
    began = time.monotonic()
    answers = {name: ask[name]() for name in dict.fromkeys([first, *ask])}
    assert answers["read"] == (b"after" if first == "write" else b"before")
    assert node.read("/run/file") == b"after"
    assert pids(node, "^sleep 7398")
    assert time.monotonic() - began < 20
    # And the lab ends: see `make_lab`.


def stopped(node: NetnsNode, pid: str) -> bool:
    """Whether a process is, seen without the resident."""
    look = [*node.entering(), "sh", "-c", f"grep -c '^State:.T' /proc/{pid}/status"]
    return subprocess.run(look, capture_output=True, check=False).stdout == b"1\n"


CALLER = """
import sys
from testbed.labs import netns
from testbed.topology import load_topology
lab = netns.bring_up(load_topology("flat", sys.argv[1]))
lab.settle(["worker1"])
lab.detach()
lab.node("worker1").start(["sleep", "7396"], name="daemon")
print("up", flush=True)
lab.node("worker1").run(["sh", "-c", "sleep 7397; true"], timeout=600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_commands_end_with_their_caller_and_daemons_do_not(flat: LabSpec, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CALLER, flat.id],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert process.stdout
        assert process.stdout.readline() == b"up\n"
        node = open_lab(flat.id).node("worker1")
        assert Deadline(10).poll(lambda: pids(node, "^sleep 7397") or None)
        os.kill(process.pid, number)
        process.wait(20)
        assert Deadline(10).poll(lambda: not pids(node, "^sleep 7397") or None)
        assert pids(node, "^sleep 7396")
    finally:
        process.kill()
        process.wait()
        open_lab(flat.id).down()


def test_much_input_takes_a_time_that_grows_with_its_length_alone(node: NetnsNode) -> None:
    """If what is left were copied for each piece, this would take a minute."""
    size = 192 << 20
    assert int(node.run(["wc", "-c"], stdin=bytes(size), timeout=15).stdout) == size
