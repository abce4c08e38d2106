"""Exit codes, and what errors say."""

from __future__ import annotations

import io
import itertools

import pytest
from rich.console import Console

from testbed.cli import complain
from testbed.errors import CommandError, Exit, Fault, InputError, LabError, TestbedError, printable, worst
from testbed.labs.base import TIMED_OUT
from testbed.trace.model import Cause, Hop, Missing, Trace
from testbed.trace.show import rendered

ORDER = (130, 3, 2, 1, 5, 0)


@pytest.mark.parametrize("pair", list(itertools.combinations(ORDER, 2)))
def test_the_worst_of_two_is_the_one_that_stands_first(pair: tuple[int, int]) -> None:
    assert worst(pair) == worst(reversed(pair)) == pair[0]


def test_the_worst_of_all_and_of_none() -> None:
    assert worst(ORDER) == 130
    assert worst([]) == Exit.NOTHING_RAN
    assert worst([0, 0]) == 0


def test_a_code_that_is_none_of_ours_is_the_lab_s() -> None:
    assert worst([-9]) == Exit.LAB
    assert worst([139]) == Exit.LAB


def test_whose_fault_decides_the_exit_code() -> None:
    assert InputError("x").exit_code == 3
    assert LabError("x").exit_code == CommandError("n", ["a"], 1, "").exit_code == 2
    assert issubclass(LabError, TestbedError)


def test_an_error_says_what_where_and_what_to_do() -> None:
    assert str(LabError("no answer", where="worker1", hint="look")) == "worker1: no answer\n  hint: look"


def test_a_failed_command_says_its_output_and_how_it_ended() -> None:
    text = str(CommandError("leaf1", ["ip", "link"], 2, "out\nCannot find device\n"))
    assert text.startswith("leaf1: `ip link` exited 2\n")
    assert "Cannot find device" in text
    assert "timed out" in str(CommandError("leaf1", ["ip"], TIMED_OUT, ""))


def test_every_fault_of_an_input_is_told_with_its_place() -> None:
    faults = [Fault("a.yml", 3, "mtu", "too big", "at most 9216"), Fault("a.yml", 0, "", "no spine")]
    text = str(InputError(faults=faults))
    assert "a.yml:3: mtu: too big\n  hint: at most 9216" in text
    assert "a.yml: no spine" in text


EVIL = "\x1b]0;owned\x07 \x1b[2J\x9b31m \u202e\ud800\r it said"


def test_a_message_obeys_nobody_but_keeps_its_lines() -> None:
    assert printable("a\tb\nµ → ✓ 中 e\u0301") == "a\tb\nµ → ✓ 中 e\u0301"
    assert all(char.isprintable() for char in printable(EVIL))
    assert printable(EVIL).endswith(" it said")


def test_errors_are_printed_without_what_steers_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    complain(CommandError("worker1", ["cat", "/etc/motd"], 1, EVIL))
    shown = capsys.readouterr().err
    assert "it said" in shown
    assert not [char for char in shown if char != "\n" and not char.isprintable()], ascii(shown)


def test_a_trace_is_shown_without_what_steers_a_terminal() -> None:
    hop = Hop("worker1", "worker1", "flannel.1", "out", "tunnel", 0.0, 98, None, None, fdb={"text": EVIL})
    facts = {"protocol": "icmp", "size": 56, "dont_fragment": False, "source_address": "a", "target_address": "b"}
    cause = Cause("firewall_rule", "a rule drops it", (EVIL,))
    missing = Missing("request", None, "worker3", "worker3", "eth0", "in", cause)
    stream = io.StringIO()
    traced = Trace("lab", "vxlan", "worker1/client", "worker3/testapp", facts, request=[hop], missing=missing)
    Console(file=stream, width=200).print(rendered(traced))
    shown = stream.getvalue()
    assert shown.count("it said") == 2
    assert not [char for char in shown if char != "\n" and not char.isprintable()], ascii(shown)
