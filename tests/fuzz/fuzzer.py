"""A small coverage-guided fuzzer: inputs that reach new lines of the parser are kept, and made into others.

Everything follows from the seed, so that a run can be made again. Only some inputs are watched line by line, for that
is slow; a long run watches fewer.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

#: Seconds that one input may take.
HANGS_AFTER = 5.0
_LONGEST = 4096
_WATCHED_FIRST, _WATCHED_EVERY = 300, 40
_INTERESTING = (
    b"0", b"-1", b"255", b"256", b"65536", b"4294967296", b"9" * 30, b"1e400", b"NaN", b"null", b"true", b"[]", b"{}",
    b'""', b"\x00", b"\xff", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xc3\x28", b"\\ud800", b"\n", b"\r\n", b" ",
    b"[" * 200, b'{"a":' * 200, b"/", b"::", b"0.0.0.0/0", b"127.0.0.1", b"224.0.0.1", b"fe80::1%eth0", b"\xe2\x80\xa8",
)  # fmt: skip

_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1 << 31, 1 << 64, 10**400, 0.5, float("inf"), float("nan"), "", "0", "-1", "A", "\0",
    "\ud800", "9" * 5000, "YQ==", "10.0.0.1", "fd00::1", [], {}, [[]], [{}], {"": None}, ["a"], {"error": "x"},
)  # fmt: skip


class Target(NamedTuple):
    """A parser: valid inputs to begin with, words of its language, and the errors by which it may refuse."""

    name: str
    run: Callable[[bytes], object]
    seeds: tuple[bytes, ...]
    refuses: tuple[type[Exception], ...] = ()
    words: tuple[bytes, ...] = ()


class HangError(BaseException):
    """An input took too long. No Exception, so that no parser can take it for one of its own."""


class Found(AssertionError):
    """An input that a parser did not stand."""


class Fuzzer:
    """One run over one parser."""

    def __init__(self, target: Target, seed: int) -> None:
        self.target, self.seed = target, seed
        self._dice = random.Random(f"{seed}/{target.name}")
        self.corpus = list(target.seeds)
        self.lines: set[tuple[str, int]] = set()
        self.refused = 0

    def run(self, count: int) -> None:
        """Try so many inputs. Raises Found."""
        before = signal.signal(signal.SIGALRM, _hang)
        try:
            for number in range(count):
                data = self.target.seeds[number] if number < len(self.target.seeds) else self._mutate()
                watched = number < _WATCHED_FIRST or number % _WATCHED_EVERY == 0
                fault = self._try(data, watched=watched)
                if fault is not None:
                    self._report(data, fault, number)
        finally:
            signal.signal(signal.SIGALRM, before)

    def _try(self, data: bytes, *, watched: bool = False) -> BaseException | None:
        known = len(self.lines)
        signal.setitimer(signal.ITIMER_REAL, HANGS_AFTER)
        try:
            if watched:
                sys.settrace(self._enter)
            self.target.run(data)
        except self.target.refuses:
            self.refused += 1
        except (Exception, HangError) as error:  # noqa: BLE001 - this is what is looked for
            return error
        finally:
            sys.settrace(None)
            signal.setitimer(signal.ITIMER_REAL, 0)
        if len(self.lines) > known:
            self.corpus.append(data)
        return None

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if "/flannel/" in frame.f_code.co_filename else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        self.lines.add((frame.f_code.co_filename, frame.f_lineno))
        return self._line

    # -- making inputs -------------------------------------------------------------------------------------------------

    def _mutate(self) -> bytes:
        dice = self._dice
        chosen = dice.choice(self.corpus)
        if chosen[:1] in (b"{", b"[") and dice.random() < 0.5:
            return self._mutate_json(chosen)
        data = bytearray(chosen)
        for _ in range(dice.choice((1, 1, 2, 3, 6))):
            at, end = sorted((dice.randint(0, len(data)), dice.randint(0, len(data))))
            kind = dice.randrange(8)
            if kind == 0 and data:
                data[min(at, len(data) - 1)] ^= 1 << dice.randrange(8)
            elif kind == 1 and data:
                data[min(at, len(data) - 1)] = dice.randrange(256)
            elif kind == 2:
                data[at:at] = dice.choice(_INTERESTING)
            elif kind == 3:
                data[at:end] = dice.choice((*self.target.words, *_INTERESTING))
            elif kind == 4:
                del data[at : min(end, at + 16)]
            elif kind == 5:
                data[at:at] = data[at:end]
            elif kind == 6:
                other = dice.choice(self.corpus)
                data[at:] = other[dice.randint(0, len(other)) :]
            else:
                data[at:end] = bytes(dice.randrange(256) for _ in range(min(end - at, 8)))
        return bytes(data[:_LONGEST])

    def _mutate_json(self, data: bytes) -> bytes:
        """Put something else in the place of a value anywhere in JSON, or take it away."""
        dice = self._dice
        try:
            value = [json.loads(data)]
        except (ValueError, RecursionError):
            return data[: dice.randint(0, len(data))]
        at: Any = value
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            key = dice.choice(keys)
            if not isinstance(at[key], dict | list) or not at[key] or dice.random() < 0.2:
                break
            at = at[key]
        if dice.random() < 0.1 and at is not value:
            del at[key]
        else:
            at[key] = dice.choice((*_VALUES, self._text(), at[key] if at is value else [at[key]]))
        return json.dumps(value[0]).encode()

    def _text(self) -> str:
        dice = self._dice
        words = (*self.target.words, *_INTERESTING)
        return b"".join(dice.choice(words) for _ in range(dice.randint(0, 2))).decode("utf-8", "surrogateescape")

    # -- telling -------------------------------------------------------------------------------------------------------

    def _report(self, data: bytes, fault: BaseException, number: int) -> None:
        small = self._shrink(data, type(fault))
        fault = self._try(small) or fault
        told = "".join(traceback.format_exception(fault)[-6:])
        raise Found(
            f"{self.target.name}, TESTBED_SEED={self.seed}, input {number}: {type(fault).__name__}: {fault}\n"
            f"TESTBED_FUZZ_INPUT={small.hex()}  # {small[:300]!r}\n{told}"
        ) from None

    def _shrink(self, data: bytes, kind: type[BaseException]) -> bytes:
        if issubclass(kind, HangError):
            return data
        size = max(1, len(data) // 2)
        while True:
            for at in range(0, len(data), size):
                shorter = data[:at] + data[at + size :]
                if isinstance(self._try(shorter), kind):
                    data = shorter
                    break
            else:
                if size == 1:
                    return data
                size //= 2


def _hang(number: int, frame: FrameType | None) -> None:
    raise HangError(f"it takes longer than {HANGS_AFTER:.0f} s")
