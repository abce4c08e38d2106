"""From pytest's account of a check to a verdict, and what a failed check leaves for its reader."""

from __future__ import annotations

import pytest

from testbed.checks import PathSpec
from testbed.collecting import row_of
from testbed.errors import InputError, TestbedError
from testbed.probes.capture import Inconclusive, Window
from testbed.report.record import Outcome, Verdict, verdict_of
from testbed.report.write import safe_name
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
    return Outcome(
        id=row_of(item).id,
        item=item.name,
        backend=run.options.backend,
        verdict=verdict,
        seconds=report.duration,
        reason=reason,
        nodes=sorted({end.partition("/")[0] for end in ends}),
        path=ends,
        input_error=isinstance(error, InputError),
    )


def _short(report: pytest.TestReport, error: BaseException, reason: str) -> None:
    """Where the message says everything, no traceback."""
    if isinstance(error, (TestbedError, Inconclusive)):
        report.longrepr = reason


def artefacts_of(item: pytest.Item, report: pytest.TestReport) -> dict[str, bytes]:
    """What was captured during a check, and how it ended, as files by name."""
    files = {"report.txt": report.longreprtext.encode()}
    window = getattr(item, "funcargs", {}).get("window")
    if isinstance(window, Window):
        files |= {f"{safe_name(name.replace(':', '+'))}.pcap": pcap for name, pcap in window.pcaps().items()}
    return files
