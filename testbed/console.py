"""What a user sees while something is being done: one ticked and timed line a step."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


class Ticks:
    """Progress of a lab or a run: ` ✓ Wiring 8 machines  0.12 s`, with a spinner while a terminal watches.

    Steps may be nested: an inner one is indented under the one it is part of.  Everything goes to `stream`, standard
    error unless told otherwise, so that `--json` output stays clean.
    """

    def __init__(self, stream: IO[str] | None = None) -> None:
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"
        self.depth = 0
        self._console: Console | None = None
        utf8 = "utf" in (getattr(self.stream, "encoding", None) or "").lower()
        self.held, self.failed = ("✓", "✗") if utf8 else ("ok", "FAILED")

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Show that `text` is being done, and then how it ended and how many seconds it took."""
        started = time.monotonic()
        mark = self.failed
        self.depth += 1
        try:
            with self._spinner(text):
                yield
            mark = self.held
        finally:
            self.depth -= 1
            self._line(mark, text, time.monotonic() - started)

    def _line(self, mark: str, text: str, seconds: float) -> None:
        line = f"{'  ' * self.depth} {mark} {text}  {seconds:.2f} s"
        if self._console is not None:  # above the spinner of the step that this one is part of
            self._console.print(line, markup=False, highlight=False)
            return
        if self.live and not os.environ.get("NO_COLOR"):
            line = line.replace(mark, f"\x1b[3{2 if mark == self.held else 1}m{mark}\x1b[0m", 1)
        print(line, file=self.stream, flush=True)

    @contextmanager
    def _spinner(self, text: str) -> Iterator[None]:
        if not self.live or self._console is not None:
            yield
            return
        from rich.console import Console  # costs 50 ms, which only a terminal's user has
        from rich.markup import escape

        self._console = Console(file=self.stream)
        try:
            with self._console.status(escape(text), spinner="dots"):
                yield
        finally:
            self._console = None
