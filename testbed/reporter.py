"""pytest's terminal reporter, with the run's own screen in the place of its dots and its failure sections."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pytest

from testbed.report.record import Outcome
from testbed.runstate import Run


class CheckReporter(pytest.TerminalReporter):  # type: ignore[misc]  # there is no other way to replace its output
    """Shows outcomes as the run's screen does; keeps pytest's statistics and its closing line."""

    def __init__(self, config: pytest.Config, run: Run) -> None:
        super().__init__(config)
        self.run = run

    @pytest.hookimpl(trylast=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Let pytest start its clock, without its header."""
        shown, self._tw = self._tw, type(self._tw)(io.StringIO())
        try:
            super().pytest_sessionstart(session)
        finally:
            self._tw = shown
        options, lab, screen = self.run.options, self.run.lab, self.run.screen
        assert screen is not None
        machines = f"{len(lab.cluster_nodes)} nodes, MTU {lab.mtu}"
        screen.say(
            f"{options.backend} on {lab.topology} ({machines}), lab {options.name}, {self.run.flannel.rules}", "bold"
        )
        for warning in self.run.flannel.warnings:
            screen.say(f"in a cluster: {warning}", "yellow")

    def pytest_collection(self) -> None:
        """Say nothing about collecting."""

    def report_collect(self, final: bool = False) -> None:
        """Say nothing about collecting."""

    def pytest_runtest_logstart(self, nodeid: str, location: tuple[str, int | None, str]) -> None:
        """Say nothing before a check has ended."""

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Say nothing more."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the outcome and show it."""
        self._tests_ran = True
        category = self.config.hook.pytest_report_teststatus(report=report, config=self.config)[0]
        self.stats.setdefault(category, []).append(report)
        message: dict[str, Any] | None = getattr(report, "testbed", None)
        record, screen = self.run.record, self.run.screen
        if record is not None and screen is not None and (leak := getattr(report, "testbed_leaked", None)):
            self._leaked(*leak)
        if message is None or record is None or screen is None:
            return
        outcome = Outcome.from_message(message)
        before = next((one.verdict for one in record.outcomes if one.item == outcome.item), None)
        kept = record.add(outcome)
        if self.run.part is not None:
            self.run.part.add(kept)
        if kept.verdict is before:
            screen.more(outcome)
        else:
            screen.outcome(kept, len(record.outcomes), self.run.total)

    def _leaked(self, item: str, lines: list[str]) -> None:
        """Hold against a check what it left behind."""
        record, screen = self.run.record, self.run.screen
        assert record is not None
        assert screen is not None
        outcome = next((one for one in record.outcomes if one.item == item), None)
        if outcome is None:
            return
        outcome.leaked = lines
        if self.run.part is not None:
            self.run.part.add(outcome)
        screen.leaked(outcome)

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Know an interrupt by the user from pytest's own ways to end a run."""
        if type(excinfo.value) is KeyboardInterrupt and self.run.record is not None:
            self.run.record.interrupted = True
        super().pytest_keyboard_interrupt(excinfo)

    def _report_keyboardinterrupt(self) -> None:
        """A user who stops a run wants no traceback; what ended it otherwise says why."""
        if self.run.record is None or self.run.screen is None or not self.run.record.interrupted:
            super()._report_keyboardinterrupt()
        else:
            self.run.screen.say("interrupted", "bold red")

    def summary_failures(self) -> None:
        """The reasons stand above; whole tracebacks only where they are asked for."""
        if self.config.getoption("verbose") > 0:
            super().summary_failures()

    def summary_errors(self) -> None:
        """Show what could not be collected: no outcome tells of it."""
        collecting: Sequence[Any] = [r for r in self.stats.get("error", []) if isinstance(r, pytest.CollectReport)]
        if collecting or self.config.getoption("verbose") > 0:
            super().summary_errors()

    def short_test_summary(self) -> None:
        """The table says it."""

    def summary_stats(self) -> None:
        """Of a part nobody wants to know how long it took."""
        if self.run.part is None:
            super().summary_stats()
