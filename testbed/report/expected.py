"""What a run is expected to find: how many checks hold in each group, and which are skipped, by a committed file.

A check that silently stops being run is worse than one that fails: so a new skip, or a row that has gone missing,
is a failure in CI and a warning elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from testbed.checks import KERNEL_NEEDS, load_catalogue
from testbed.data import folder
from testbed.errors import LabError
from testbed.report.record import Outcome, RunRecord, Verdict


@dataclass(frozen=True, slots=True)
class Expected:
    """One run's expectation. `held` counts checks by group; `skipped` names the items that are, with the reason."""

    topology: str
    held: Mapping[str, int]
    skipped: Mapping[str, str]


def load_expected(run: str, selection: str, path: Path | None = None) -> Expected | None:
    """The committed expectation of a run (`vxlan`) and selection (`smoke`); None where there is none.

    Raises LabError for a broken file.
    """
    path = path or folder("suites") / "expected-counts.yaml"
    try:
        item = yaml.safe_load(path.read_text(encoding="utf-8"))["runs"].get(run, {}).get(selection)
        if item is None:
            return None
        return Expected(str(item["topology"]), dict(item["held"]), dict(item["skipped"] or {}))
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise LabError(f"the expected counts are broken: {error!r}", where=str(path)) from error


def stable(item: str) -> str:
    """An item without the names of its path's ends: `NAT-03[host_gw-XS]`."""
    head, bracket, rest = item.partition("[")
    return f"{head}[{'-'.join(rest.rstrip(']').split('-')[:2])}]" if bracket else head


def waits_for_kernel(outcome: Outcome) -> bool:
    """Whether a check was skipped for what only some kernels have; elsewhere it runs, so it is expected to."""
    row = load_catalogue().get(outcome.id)
    return row is not None and row.needs in KERNEL_NEEDS and outcome.reason == row.reason


def deviations(record: RunRecord, expected: Expected) -> list[str]:
    """What differs from the expectation, one line each; a check that failed speaks for itself."""
    waiting = [o for o in record.outcomes if o.verdict is Verdict.SKIPPED and waits_for_kernel(o)]
    found = [
        f"{stable(outcome.item)} is skipped, which is new: {outcome.reason}"
        for outcome in record.outcomes
        if outcome.verdict is Verdict.SKIPPED
        and outcome not in waiting
        and stable(outcome.item) not in expected.skipped
    ]
    ran = {stable(o.item) for o in record.outcomes if o.verdict is not Verdict.SKIPPED}
    found += [f"{item} ran, but is expected to be skipped" for item in expected.skipped if item in ran]
    groups = record.by_group()
    for group in [*expected.held, *(g for g in groups if g not in expected.held)]:
        counts = groups.get(group, Counter[Verdict]())
        number = sum(count for verdict, count in counts.items() if verdict is not Verdict.SKIPPED)
        number += sum(outcome.group == group for outcome in waiting)
        wanted = expected.held.get(group, 0)
        if number < wanted:
            found.append(f"{group}: {number} checks ran where {wanted} are expected")
        elif number > wanted:
            found.append(f"{group}: {number} checks ran, more than the {wanted} expected: raise the expected count")
    return found
