"""The end of a run: compare it with what is expected, settle the exit code, write the report, show the table."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from testbed import checks
from testbed.errors import Exit, TestbedError
from testbed.report.expected import deviations, load_expected
from testbed.report.record import RunRecord
from testbed.report.terminal import Screen
from testbed.report.write import ReportFolder


@dataclass(frozen=True, slots=True)
class Ending:
    """What is known of a run at its end, beside its record."""

    backend: str
    selection: str  # under which name its expected counts are
    comparable: bool  # it is a run that expected counts are committed for
    stopped: bool = False  # before its last check, so that fewer ran than expected
    refused: bool = False  # the lab's name was in use: the report that is there belongs to whoever uses it


def conclude(record: RunRecord, ending: Ending, screen: Screen, report: ReportFolder | None) -> int:
    """Return the run's exit code, with everything written and shown."""
    expected = None
    try:
        expected = load_expected(ending.backend, ending.selection) if ending.comparable else None
        if expected and expected.topology != record.facts.get("topology"):
            expected = None
        # Where a run was stopped, as by a lab that did not come up, its end says why there are fewer.
        if expected and not (record.interrupted or ending.stopped):
            record.problems = deviations(record, expected)
        code = record.finish(strict=os.environ.get("CI", "").lower() in ("1", "true"))
        place = _settle(report, record, ending)
    except TestbedError as error:
        screen.close_bar()
        screen.say(f"error: {error}", "bold red")
        code, place = int(error.exit_code), None
    order = list(dict.fromkeys(row.group for row in checks.load_catalogue().values()))
    screen.summary(record, expected, order, str(place or ""))
    if code == Exit.NOTHING_RAN and not record.outcomes:
        screen.say("nothing ran: no check is selected; `testbed checks` lists them", "yellow")
    return code


def _settle(report: ReportFolder | None, record: RunRecord, ending: Ending) -> Path | None:
    """Put the report in its place and return where; nothing is replaced by a run that did nothing."""
    if report is None:
        return None
    empty = record.exit == Exit.NOTHING_RAN and not record.outcomes
    if ending.refused or (empty and report.folder.exists()):
        report.discard()
        return None
    return report.write(record)
