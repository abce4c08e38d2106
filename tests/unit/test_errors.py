"""Exit codes, and what errors say."""

from __future__ import annotations

import itertools

import pytest

from testbed.errors import CommandError, Exit, Fault, InputError, LabError, TestbedError, worst
from testbed.labs.base import TIMED_OUT

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
