"""No input makes a parser of flannel fail in any way but its own: no traceback, no hang.

Some thousand inputs each; the soak makes a million. TESTBED_SEED repeats a run, TESTBED_FUZZ_INPUT (in hexadecimal) one
input.
"""

from __future__ import annotations

import os
import random

import pytest

from tests.fuzz.fuzzer import Found, Fuzzer, HangError, Target
from tests.fuzz.targets import TARGETS

FULL = os.environ.get("TESTBED_SOAK", "") not in ("", "0")
INPUTS = int(os.environ.get("TESTBED_FUZZ", "1000000" if FULL else "4000"))
SEED = int(os.environ.get("TESTBED_SEED", "0")) or random.SystemRandom().randrange(1 << 32)
ONE = bytes.fromhex(os.environ.get("TESTBED_FUZZ_INPUT", ""))


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Millions of refusals are not worth a line each."""
    monkeypatch.setattr("flannel.log._write", lambda *_: None)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name.replace(" ", "-"))
def test_no_input_breaks_the_parser(target: Target) -> None:
    print(f"TESTBED_SEED={SEED}")
    fuzzer = Fuzzer(target._replace(seeds=(ONE,)) if ONE else target, SEED)
    fuzzer.run(1 if ONE else INPUTS)
    if not ONE:
        assert len(fuzzer.corpus) > len(target.seeds), "no input has reached anything new: the parser is not reached"
        assert not target.refuses or 0 < fuzzer.refused < INPUTS, f"{fuzzer.refused} of {INPUTS} were refused"


def careless(data: bytes) -> None:
    """A parser that fails in three ways, deep within."""
    import flannel.subnetenv

    flannel.subnetenv.nothing if data.startswith(b"{}") else None  # type: ignore[attr-defined]


def test_the_fuzzer_finds_what_is_wrong_says_how_to_repeat_it_and_makes_it_small() -> None:
    target = Target("careless", careless, (b"{x}" * 4,), (ValueError,))
    with pytest.raises(Found, match=r"TESTBED_SEED=7, .*AttributeError[^\n]*\nTESTBED_FUZZ_INPUT=7b7d  #") as first:
        Fuzzer(target, 7).run(20000)
    with pytest.raises(Found) as second:
        Fuzzer(target, 7).run(20000)
    assert str(first.value) == str(second.value)


def test_the_fuzzer_notices_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(data: bytes) -> None:
        while True:
            pass

    monkeypatch.setattr("tests.fuzz.fuzzer.HANGS_AFTER", 0.2)
    with pytest.raises(Found, match=HangError.__name__):
        Fuzzer(Target("slow", slow, (b"",)), 1).run(1)


def test_the_fuzzer_is_led_by_what_it_reaches() -> None:
    """A few bytes in a row are found because each of them by itself reaches a new line."""

    def run(count: int) -> int:
        fuzzer = Fuzzer(TARGETS[0], 3)
        fuzzer.run(count)
        return len(fuzzer.lines)

    assert run(3000) > run(20)
