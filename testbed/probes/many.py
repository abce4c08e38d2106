"""Several commands on a node for the price of one: it is entered once, and they run side by side there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from testbed.errors import LabError
from testbed.labs import interpreter
from testbed.labs.base import Place

LIMIT = 1 << 20
"""Bytes of a command's output that are kept, where nothing else is said."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command, where `netns` is the path of a pod's network on the node; of a long output the start or end is kept.

    `stdin` is what it reads, a few kilobytes at most.
    """

    argv: tuple[str, ...]
    netns: str = ""
    keep_end: bool = False
    stdin: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """How a command ended; `rc` is None where it was killed for lack of time. `cut` counts bytes that were not kept."""

    rc: int | None
    out: str
    err: str
    cut: int

    @property
    def ok(self) -> bool:
        """Whether it exited 0."""
        return self.rc == 0

    @property
    def fault(self) -> str:
        """What went wrong, in a few words; "" where nothing did."""
        if self.rc is None:
            return "timed out"
        return "" if self.ok else (self.err.strip() or self.out.strip())[:200] or f"exited {self.rc}"


@cache
def _program() -> str:
    return resources.files("testbed.probes").joinpath("atonce.py").read_text()


def run_many(
    place: Place, commands: Sequence[Command], *, seconds: float = 10.0, limit: int = LIMIT
) -> tuple[Answer, ...]:
    """Run commands side by side and return their answers in order. Raises LabError where the place cannot be entered.

    That a command fails, or takes longer than `seconds`, is an answer.
    """
    if not commands:
        return ()
    listed = [
        {"argv": one.argv, "stdin": one.stdin, "netns": one.netns, "keep": "end" if one.keep_end else "start"}
        for one in commands
    ]
    order = json.dumps({"commands": listed, "seconds": seconds, "limit": limit})
    argv = [interpreter(), "-I", "-S", "-c", _program()]
    result = place.run(argv, stdin=order, timeout=seconds + 20)
    try:
        return tuple(Answer(one["rc"], one["out"], one["err"], one["cut"]) for one in json.loads(result.stdout))
    except (ValueError, KeyError, TypeError) as error:
        raise LabError(f"no answers came back: {result.stdout[:200]!r}", where=place.name) from error
