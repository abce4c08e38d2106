"""From pytest's account of a check to a verdict, and what a failed check leaves for its reader."""

from __future__ import annotations

from dataclasses import replace

import pytest

from testbed.checks import PathSpec
from testbed.collecting import row_of
from testbed.errors import InputError, TestbedError
from testbed.fixtures import FIGURE
from testbed.nodes.undertest import implementations
from testbed.probes.capture import Inconclusive
from testbed.report.expectations import judged
from testbed.report.record import Outcome, Verdict, verdict_of
from testbed.runstate import Run


def outcome_of(item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport, run: Run) -> Outcome | None:
    """The outcome that one phase of a check brought; None where it brought none."""
    error = call.excinfo.value if call.excinfo is not None else None
    if error is None and call.when != "call":
        return None
    verdict, reason = Verdict.HELD, ""
    if error is not None:
        verdict, reason = verdict_of(error, skipped=pytest.skip.Exception, failed=pytest.fail.Exception)
        _short(report, error, reason)
    spec = getattr(item, "callspec", None)
    path = spec.params.get("path") if spec else None
    ends = [path.source, path.target] if isinstance(path, PathSpec) and path.source else []
    outcome = Outcome(
        id=row_of(item).id,
        item=item.name,
        backend=run.options.backend,
        verdict=verdict,
        seconds=report.duration,
        reason=reason,
        nodes=sorted({end.partition("/")[0] for end in ends}),
        path=ends,
        input_error=isinstance(error, InputError),
        figures=[value for name, value in item.user_properties if name == FIGURE and isinstance(value, dict)],
    )
    counted = as_expected(outcome, run)
    if counted.verdict is Verdict.EXPECTED_FAILURE:
        report.outcome, report.wasxfail = "skipped", counted.reason
    elif counted.verdict is Verdict.UNEXPECTED_PASS:
        report.outcome, report.longrepr = "failed", counted.reason
    return counted


def as_expected(outcome: Outcome, run: Run) -> Outcome:
    """The outcome as it counts with the implementations under test; they are asked only where it matters."""
    entries = (e for e in run.expectations if e.of_run(run.flannel.rules, run.options.store))
    matters = [e for e in entries if e.about(outcome.id, outcome.backend)]
    if not matters or run.cluster is None or outcome.verdict not in (Verdict.HELD, Verdict.FAILED):
        return outcome
    try:
        found = implementations(run.cluster, run.implementations)
    except TestbedError as error:
        return replace(outcome, reason=f"{outcome.reason}\n(no expectation could be looked up: {error})".strip())
    return judged(outcome, matters, list(found.values()))


def _short(report: pytest.TestReport, error: BaseException, reason: str) -> None:
    """Where the message says everything, no traceback."""
    if isinstance(error, (TestbedError, Inconclusive)):
        report.longrepr = reason
