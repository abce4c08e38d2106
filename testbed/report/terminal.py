"""What a user sees of a run: progress while it goes on, a table by group at its end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from testbed.errors import printable
from testbed.report.expected import Expected
from testbed.report.record import Outcome, RunRecord, Verdict

STYLE = {
    Verdict.HELD: "green",
    Verdict.FAILED: "bold red",
    Verdict.SKIPPED: "yellow",
    Verdict.INCONCLUSIVE: "bold magenta",
    Verdict.LAB_ERROR: "bold red",
    Verdict.EXPECTED_FAILURE: "yellow",
    Verdict.UNEXPECTED_PASS: "bold red",
}

BAD = (Verdict.FAILED, Verdict.INCONCLUSIVE, Verdict.LAB_ERROR, Verdict.UNEXPECTED_PASS)

WIDTH = 110
"""Columns where no terminal says how many it has."""


def words(verdict: Verdict) -> str:
    """A verdict as people write it."""
    return str(verdict).replace("_", " ")


def _how_late(outcome: Outcome) -> str:
    """The latest that it waited for, where that is known."""
    late = outcome.account.get("late") or ()
    return f": {late[0]}" if late else ""


class Screen:
    """Where progress and results go: a live bar on a terminal, plain lines elsewhere and in CI."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream
        self.live = stream.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"
        colour = bool(self.live and not os.environ.get("NO_COLOR"))
        self.console = Console(
            file=stream,
            force_terminal=self.live,
            no_color=not colour,
            width=None if self.live else WIDTH,
            highlight=False,
            emoji=False,
            markup=False,
        )
        self._bar: Progress | None = None

    def outcome(self, outcome: Outcome, done: int, total: int) -> None:
        """Show that a check has ended."""
        line = Text(f"{words(outcome.verdict):>12}  ", STYLE[outcome.verdict])
        line.append(printable(outcome.item), "default").append(f"  {outcome.seconds:.2f} s", "dim")
        if outcome.slow:
            line.append(f"  slow{_how_late(outcome)}", "yellow")
        if self.live:
            self._advance(outcome, done, total)
            if outcome.verdict not in BAD:
                return
        self.console.print(line, soft_wrap=True)
        if outcome.verdict is not Verdict.HELD:
            self._reason(outcome)

    def more(self, outcome: Outcome) -> None:
        """Show trouble behind a check whose verdict stands, as in its clean-up."""
        word = f"then {words(outcome.verdict)}"
        line = Text(f"{word:>12}  ", STYLE[outcome.verdict]).append(printable(outcome.item), "default")
        self.console.print(line, soft_wrap=True)
        self._reason(outcome)

    def _reason(self, outcome: Outcome) -> None:
        skipped = outcome.verdict is Verdict.SKIPPED
        for text in [outcome.reason] if skipped else outcome.reason.strip().splitlines()[:12]:
            self.console.print(Text(f"              {printable(text)}"), soft_wrap=True)

    def leaked(self, outcome: Outcome) -> None:
        """Show what a check left behind."""
        line = Text(f"{'leaked':>12}  ", "bold magenta").append(printable(outcome.item), "default")
        self.console.print(line, soft_wrap=True)
        for text in outcome.leaked[:12]:
            self.console.print(Text(f"              {printable(text)}"), soft_wrap=True)

    def _advance(self, outcome: Outcome, done: int, total: int) -> None:
        if self._bar is None:
            columns = (TextColumn("  checks"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            # Markup is off: ids and names of ends have square brackets.
            last = TextColumn("{task.description}", markup=False)
            self._bar = Progress(*columns, last, console=self.console, transient=True)
            # A bar that comes back, behind a pause, is drawn at once, so it has to be right from the start.
            self._bar.add_task(outcome.item, completed=done, total=total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done, total=total, description=outcome.item)

    def close_bar(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, text: str, style: str = "") -> None:
        """Print a line."""
        self.console.print(Text(printable(text), style), soft_wrap=True)

    def summary(self, record: RunRecord, expected: Expected | None, order: Sequence[str], place: str) -> None:
        """Print the table, what was skipped and why, and what deviates from the expected counts."""
        self.close_bar()
        if record.outcomes:
            self.console.print(_table(record, expected, order))
        reasons: dict[str, list[str]] = {}
        for outcome in record.outcomes:
            if outcome.verdict is Verdict.SKIPPED:
                reasons.setdefault(outcome.reason, []).append(
                    outcome.item.partition("->")[0].rstrip("]").partition("[")[0]
                )
        for reason, ids in reasons.items():
            self.say(f"skipped {', '.join(dict.fromkeys(ids))}: {reason}", "yellow")
        self._remarks(record)
        if record.broken:
            self.say(record.broken, "bold red")
        if place:
            self.say(f"report: {place}")

    def _remarks(self, record: RunRecord) -> None:
        """What is to be said of checks beside their verdicts."""
        for outcome in record.outcomes:
            if outcome.verdict is Verdict.EXPECTED_FAILURE:
                self.say(f"expected failure {outcome.item}: {outcome.reason.splitlines()[0]}", "yellow")
        slow = [outcome for outcome in record.outcomes if outcome.slow]
        if slow:
            self.say(f"slow: {len(slow)} checks held only late: {', '.join(one.item for one in slow)}", "yellow")
        for problem in record.problems:
            self.say(f"not as expected: {problem}", "bold magenta")
        leaking = [outcome for outcome in record.outcomes if outcome.held_against]
        if leaking:
            self.say(f"leaked: {len(leaking)} checks left the nodes changed, which fails the run", "bold magenta")
        for outcome in leaking:
            self.say(f"  {outcome.item}: {outcome.leaked[0]}{' …' * (len(outcome.leaked) > 1)}", "magenta")


def _table(record: RunRecord, expected: Expected | None, order: Sequence[str]) -> Table:
    groups = record.by_group()
    shown = [v for v in Verdict if v in (Verdict.HELD, Verdict.FAILED, Verdict.SKIPPED) or record.count(v)]
    table = Table(show_edge=False, pad_edge=False, box=None, padding=(0, 2))
    table.add_column("group")
    for verdict in shown:
        table.add_column(words(verdict), justify="right")
    if expected:
        table.add_column("expected", justify="right")
    for group in sorted(groups, key=lambda g: order.index(g) if g in order else len(order)):
        cells = [_cell(groups[group][verdict], verdict) for verdict in shown]
        table.add_row(group, *cells, *([str(expected.held.get(group, 0))] if expected else []))
    total = [_cell(record.count(verdict), verdict) for verdict in shown]
    table.add_row("all", *total, *([str(sum(expected.held.values()))] if expected else []), style="bold")
    return table


def _cell(number: int, verdict: Verdict) -> Text:
    return Text(str(number), STYLE[verdict]) if number else Text("·", "dim")
