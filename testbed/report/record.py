"""What a run found: one outcome a check and path, the run's facts, and the exit code that follows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from testbed.errors import Exit, TestbedError
from testbed.probes.capture import Inconclusive

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def storable(value: Any) -> Any:
    """Plain data whose texts every file can hold: half of a surrogate pair is written as its escape.

    JSON of strangers' programs may have one ("\\ud800"), and so may a file name that is not UTF-8.
    """
    if isinstance(value, str):
        return _LONE_SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", value)
    if isinstance(value, dict):
        return {storable(key): storable(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(storable(one) for one in value)
    return value


class Verdict(StrEnum):
    """How a check ended; which of them fail the run says `exit_code`."""

    HELD = "held"
    FAILED = "failed"
    SKIPPED = "skipped"
    INCONCLUSIVE = "inconclusive"
    LAB_ERROR = "lab_error"
    EXPECTED_FAILURE = "expected_failure"
    UNEXPECTED_PASS = "unexpected_pass"  # noqa: S105 (a verdict)


WEIGHT: Mapping[Verdict, int] = {
    Verdict.FAILED: 5,
    Verdict.LAB_ERROR: 5,
    Verdict.INCONCLUSIVE: 4,
    Verdict.UNEXPECTED_PASS: 3,
    Verdict.EXPECTED_FAILURE: 2,
    Verdict.HELD: 1,
    Verdict.SKIPPED: 0,
}
"""Which of two verdicts on one check stands, as of the check and of its clean-up: the heavier; of equal ones the first.

A failure that was seen is not undone by trouble in the clean-up, and what a broken lab does afterwards is no failure
of the product. What held, as expected or not, and what failed as expected, counts no more where the clean-up finds
that packets are missing from the captures, or worse.
"""


@dataclass(slots=True)
class Outcome:
    """One check along one path."""

    id: str
    item: str  # as pytest names it: VXE-01[vxlan-XS-worker1/client->worker3/testapp]
    backend: str
    verdict: Verdict
    seconds: float = 0.0
    reason: str = ""
    nodes: list[str] = field(default_factory=list)
    path: list[str] = field(default_factory=list)
    slow: bool = False
    artefacts: list[str] = field(default_factory=list)
    input_error: bool = False  # the user's input was found wrong only while the run was under way
    figures: list[dict[str, Any]] = field(default_factory=list)  # what it measured: see `testbed.fixtures.Figures`
    account: dict[str, Any] = field(default_factory=dict)  # what it did: see `testbed.report.following`
    leaked: list[str] = field(default_factory=list)  # what it left changed on the nodes: see `testbed.report.evidence`
    evidence: dict[str, Any] | None = None  # what was gathered because it failed
    sketch: dict[str, Any] | None = None  # the lab that it ran in, with the first outcome of each lab

    @property
    def group(self) -> str:
        """The row's group in the catalogue."""
        return self.id.rpartition("-")[0]

    @property
    def held_against(self) -> list[str]:
        """What it left changed and answers for: that a flannel known to fail leaves something goes with its failure."""
        return [] if self.verdict is Verdict.EXPECTED_FAILURE else self.leaked

    def to_json(self) -> dict[str, Any]:
        """The outcome as it stands in checks.json."""
        facts: dict[str, Any] = storable(asdict(self))
        item = facts["item"]
        del facts["item"], facts["input_error"], facts["sketch"]
        return facts | {"name": item} | {"verdict": str(self.verdict), "seconds": round(self.seconds, 3)}

    def to_message(self) -> dict[str, Any]:
        """The outcome as plain data, to travel from a worker process."""
        message: dict[str, Any] = storable(asdict(self))
        return message | {"verdict": str(self.verdict)}

    def with_more(self, later: Outcome) -> Outcome:
        """What this and a later outcome of the same check, as of its clean-up, say together: see `WEIGHT`."""
        first_stands = WEIGHT[self.verdict] >= WEIGHT[later.verdict]
        kept, other = (self, later) if first_stands else (later, self)
        reason = kept.reason
        if other.reason and other.reason not in reason:
            word = str(other.verdict).replace("_", " ")
            reason = f"{reason}\n{'then' if first_stands else 'before that'} {word}: {other.reason}".strip()
        return replace(
            kept,
            reason=reason,
            seconds=self.seconds + later.seconds,
            slow=(self.slow or later.slow) and kept.verdict is Verdict.HELD,
            artefacts=list(dict.fromkeys([*self.artefacts, *later.artefacts])),
            figures=[*self.figures, *(figure for figure in later.figures if figure not in self.figures)],
            account={**later.account, **self.account},
            leaked=later.leaked or self.leaked,
            evidence=_together(self.evidence, later.evidence),
            sketch=self.sketch or later.sketch,
        )

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> Outcome:
        """An outcome that travelled as plain data, such as from a worker process."""
        return cls(**{**message, "verdict": Verdict(message["verdict"])})


def _together(first: dict[str, Any] | None, later: dict[str, Any] | None) -> dict[str, Any] | None:
    """What was gathered when a check failed, and more that was once its clean-up did."""
    if first is None or later is None:
        return first or later
    paths = {file["path"] for file in first["files"]}
    return {
        **first,
        "files": [*first["files"], *(file for file in later["files"] if file["path"] not in paths)],
        "changes": first["changes"] or later["changes"],
        "trace": first["trace"] or later["trace"],
        "missing": list(dict.fromkeys([*first["missing"], *later["missing"]])),
        "seconds": round(first["seconds"] + later["seconds"], 3),
    }


def verdict_of(
    error: BaseException, *, skipped: type[BaseException], failed: type[BaseException]
) -> tuple[Verdict, str]:
    """Whose fault an exception of a check is, and the reason to print.

    `skipped` and `failed` are the exceptions by which the test runner's own skip() and fail() end a test. What is
    neither an assertion nor an error of ours is a fault of the check itself, and so of the lab. Where such an error
    came up while an assertion that had failed was on its way out, as in a `finally`, the assertion is what counts.
    """
    if isinstance(error, skipped):
        return Verdict.SKIPPED, str(getattr(error, "msg", error))
    if isinstance(error, Inconclusive):
        return Verdict.INCONCLUSIVE, str(error)
    if isinstance(error, TestbedError) and error.exit_code is Exit.FAILED:
        return Verdict.FAILED, str(error)
    if isinstance(error, (AssertionError, failed)):
        # A percent sign in an assertion's message is doubled by pytest, where it tells of assertions that hold.
        return Verdict.FAILED, str(error).replace("%%", "%") or "the assertion does not hold"
    broken = f"the check itself broke: {type(error).__name__}: "
    reason = str(error) if isinstance(error, TestbedError) else f"{broken}{error}"
    if (masked := masked_assertion(error)) is not None:
        said = verdict_of(masked, skipped=skipped, failed=failed)[1]
        return Verdict.FAILED, f"{said}\nand then, while that was on its way out: {reason}"
    return Verdict.LAB_ERROR, reason


def masked_assertion(error: BaseException) -> AssertionError | None:
    """The assertion that had failed when another error came up instead of it; None where there was none."""
    seen = [error]
    while (before := seen[-1].__context__) is not None and not seen[-1].__suppress_context__ and before not in seen:
        if isinstance(before, AssertionError):
            return before
        seen.append(before)
    return None


@dataclass
class RunRecord:
    """A whole run."""

    facts: dict[str, Any]  # name, backend, lab, kernel, topology, mtu, rules, store, implementations
    outcomes: list[Outcome] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # deviations from the expected counts
    interrupted: bool = False
    broken: str = ""  # the test runner's own error
    exit: int = int(Exit.NOTHING_RAN)
    labs: dict[str, Any] = field(default_factory=dict)  # by their names: see `testbed.report.sketch`

    def add(self, outcome: Outcome) -> Outcome:
        """Keep an outcome, a second one for the same check together with the first; returns what is kept."""
        if outcome.sketch is not None:
            self.labs[str(outcome.account.get("lab", ""))] = outcome.sketch
        for position, known in enumerate(self.outcomes):
            if known.item == outcome.item:
                self.outcomes[position] = known.with_more(outcome)
                return self.outcomes[position]
        self.outcomes.append(outcome)
        return outcome

    def count(self, verdict: Verdict) -> int:
        """How many checks ended so."""
        return sum(outcome.verdict is verdict for outcome in self.outcomes)

    def by_group(self) -> Mapping[str, Counter[Verdict]]:
        """The verdicts by catalogue group, in the order in which the groups came up in the catalogue."""
        groups: dict[str, Counter[Verdict]] = {}
        for outcome in self.outcomes:
            groups.setdefault(outcome.group, Counter())[outcome.verdict] += 1
        return groups

    def finish(self, *, strict: bool) -> int:
        """Settle the exit code. With `strict` a deviation from the expected counts fails the run."""
        self.exit = int(exit_code(self.outcomes, interrupted=self.interrupted, broken=bool(self.broken)))
        if strict and self.problems and self.exit == Exit.HELD:
            self.exit = int(Exit.FAILED)
        return self.exit

    def to_json(self) -> dict[str, Any]:
        """The run as checks.json holds it."""
        ending = {"problems": self.problems, "broken": self.broken, "interrupted": self.interrupted}
        run = self.facts | {"exit": self.exit} | {key: value for key, value in ending.items() if value}
        run["leaks"] = sum(bool(outcome.held_against) for outcome in self.outcomes)
        checks = [outcome.to_json() for outcome in self.outcomes]
        return {"schema": 1, "run": storable(run), "checks": checks, "labs": storable(self.labs)}


def exit_code(outcomes: Iterable[Outcome], *, interrupted: bool = False, broken: bool = False) -> Exit:
    """The run's exit code, the worst first: interrupt, input, lab, a failed check, nothing ran."""
    seen = list(outcomes)
    verdicts = {outcome.verdict for outcome in seen}
    if interrupted:
        return Exit.INTERRUPTED
    if any(outcome.input_error and outcome.verdict is Verdict.LAB_ERROR for outcome in seen):
        return Exit.INPUT
    if broken or Verdict.LAB_ERROR in verdicts:
        return Exit.LAB
    if verdicts & {Verdict.FAILED, Verdict.INCONCLUSIVE, Verdict.UNEXPECTED_PASS} or any(o.held_against for o in seen):
        return Exit.FAILED
    return Exit.HELD if verdicts & {Verdict.HELD, Verdict.EXPECTED_FAILURE} else Exit.NOTHING_RAN
