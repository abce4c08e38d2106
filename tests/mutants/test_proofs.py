"""Every check of the suites has a proof that is of today, or is listed with why it has none."""

from __future__ import annotations

from testbed.checks import implemented
from testbed.mutants.proven import proven_rows, unproven_reasons

AT_MOST = 5
"""So many rows may stay without a proof."""


def test_every_check_is_proven_or_says_why_not() -> None:
    written, proven, excused = set(implemented()), proven_rows(), unproven_reasons()
    missing = sorted(written - proven - set(excused))
    cure = f"`./run mutants -- --only {','.join(missing)}`, or say why not in suites/unproven.yaml"
    assert not missing, cure


def test_few_rows_have_no_proof_and_each_says_why() -> None:
    excused = unproven_reasons()
    assert len(excused) <= AT_MOST
    assert all(excused.values())
    assert not set(excused) & proven_rows(), "these are proven by now"
    assert set(excused) <= set(implemented())
