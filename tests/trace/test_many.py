"""Several commands at once: their answers in order, none longer than wanted, none waited for too long."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence

from testbed.labs.base import Process, Result
from testbed.probes.many import Command, run_many


class Here:
    """This machine as a place."""

    name = "here"

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        timeout: float = 30.0,
        stdin: str | bytes | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Result:
        text = stdin.decode() if isinstance(stdin, bytes) else stdin
        done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=timeout, check=check)
        return Result(self.name, tuple(argv), done.returncode, done.stdout, done.stderr, 0.0)

    def spawn(self, argv: Sequence[str], *, pass_fds: Sequence[int] = (), stdin: bool = False) -> Process:
        raise NotImplementedError


def test_answers_come_in_order_with_their_codes() -> None:
    slow, failing, reading, missing = run_many(
        Here(),
        [
            Command(("sh", "-c", "sleep 0.2; echo slow")),
            Command(("sh", "-c", "echo out; echo wrong >&2; exit 3")),
            Command(("cat",), stdin="what it reads"),
            Command(("no-such-program",)),
        ],
    )
    assert (slow.rc, slow.out, slow.fault) == (0, "slow\n", "")
    assert (failing.rc, failing.out, failing.err, failing.fault) == (3, "out\n", "wrong\n", "wrong")
    assert reading.out == "what it reads"
    assert (missing.rc, missing.ok) == (127, False)
    assert "no-such-program" in missing.fault


def test_what_takes_too_long_is_killed_and_the_others_are_not() -> None:
    began = time.monotonic()
    hanging, quick = run_many(Here(), [Command(("sleep", "60")), Command(("echo", "quick"))], seconds=1.0)
    assert time.monotonic() - began < 30
    assert (hanging.rc, hanging.fault) == (None, "timed out")
    assert quick.out == "quick\n"


def test_long_outputs_are_cut_at_the_end_that_matters_less() -> None:
    printing = ("sh", "-c", "i=0; while [ $i -lt 1000 ]; do echo $i; i=$((i+1)); done")
    first, last = run_many(Here(), [Command(printing), Command(printing, keep_end=True)], limit=100)
    assert (first.out[:4], len(first.out), first.cut) == ("0\n1\n", 100, 3890 - 100)
    assert (last.out[-4:], len(last.out), last.cut) == ("999\n", 100, 3890 - 100)


def test_nothing_is_asked_of_a_place_for_nothing() -> None:
    assert run_many(Here(), []) == ()
