"""Errors that say whose fault it is, and the exit code that goes with each.

Four outcomes are kept apart down to the exit code: the product failed a check (1), the lab or the host is at
fault (2), the user's input is wrong (3), nothing ran (5).  130 is an interrupt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of ``./run`` and ``testbed``."""

    HELD = 0
    FAILED = 1
    LAB = 2
    INPUT = 3
    NOTHING_RAN = 5
    INTERRUPTED = 130


#: Of several runs the worst code is the run's, in this order.
WORST_FIRST = (Exit.INTERRUPTED, Exit.INPUT, Exit.LAB, Exit.FAILED, Exit.NOTHING_RAN, Exit.HELD)


def worst(codes: Iterable[int]) -> int:
    """Return the worst of several exit codes; no code at all means that nothing ran."""
    seen = set(codes)
    for code in WORST_FIRST:
        if code in seen:
            return int(code)
    return int(Exit.LAB if seen else Exit.NOTHING_RAN)


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but for tab and newline, and those that turn the direction of text."""


def printable(text: str) -> str:
    """The text without what a terminal would obey: messages quote what strangers' programs print and files say."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


class TestbedError(Exception):
    """What was attempted and failed, where, and what to do about it."""

    __test__ = False
    exit_code: Exit = Exit.LAB

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        self.what = what
        self.where = where
        self.hint = hint
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  hint: {self.hint}" if self.hint else text


class LabError(TestbedError):
    """The lab or the host is at fault, never the product under test."""


class LabBusyError(LabError):
    """The lab's name is in use; nothing was done, and what an earlier run left stands."""


class ProductError(TestbedError):
    """The implementation under test did not do what it has to before anything can be checked."""

    exit_code = Exit.FAILED


class CommandError(LabError):
    """A command on a node failed where it had to succeed."""

    def __init__(self, where: str, argv: Sequence[str], rc: int, output: str, *, hint: str = "") -> None:
        self.argv = tuple(argv)
        self.rc = rc
        self.output = output
        tail = output.strip()[-2000:]
        ended = "timed out" if rc == -255 else f"exited {rc}"
        super().__init__(f"`{' '.join(argv)[:400]}` {ended}" + (f"\n{tail}" if tail else ""), where=where, hint=hint)


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of a user's input: which file, line and key, what is wrong, and how to mend it."""

    file: str
    line: int  # 1-based; 0 where there is none
    key: str
    what: str
    hint: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        text = f"{place}: {self.key}: {self.what}" if self.key else f"{place}: {self.what}"
        return f"{text}\n  hint: {self.hint}" if self.hint else text


class InputError(TestbedError):
    """The user's input is wrong; carries every fault of it at once."""

    exit_code = Exit.INPUT

    def __init__(self, what: str = "", *, where: str = "", hint: str = "", faults: Sequence[Fault] = ()) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join([*([what] if what else []), *map(str, self.faults)]), where=where, hint=hint)
