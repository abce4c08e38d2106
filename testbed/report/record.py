"""What a run found: one outcome a check and path, the run's facts, and the exit code that follows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from testbed.errors import Exit, TestbedError
from testbed.probes.capture import Inconclusive


class Verdict(StrEnum):
    """How a check ended; which of them fail the run says `exit_code`."""

    HELD = "held"
    FAILED = "failed"
    SKIPPED = "skipped"
    INCONCLUSIVE = "inconclusive"
    LAB_ERROR = "lab_error"
    EXPECTED_FAILURE = "expected_failure"
    UNEXPECTED_PASS = "unexpected_pass"  # noqa: S105 (a verdict)


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

    def to_json(self) -> dict[str, Any]:
        """The outcome as it stands in checks.json."""
        facts = asdict(self)
        del facts["item"], facts["input_error"], facts["sketch"]
        return facts | {"name": self.item} | {"verdict": str(self.verdict), "seconds": round(self.seconds, 3)}

    def to_message(self) -> dict[str, Any]:
        """The outcome as plain data, to travel from a worker process."""
        return asdict(self) | {"verdict": str(self.verdict)}

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> Outcome:
        """An outcome that travelled as plain data, such as from a worker process."""
        return cls(**{**message, "verdict": Verdict(message["verdict"])})


def verdict_of(
    error: BaseException, *, skipped: type[BaseException], failed: type[BaseException]
) -> tuple[Verdict, str]:
    """Whose fault an exception of a check is, and the reason to print.

    `skipped` and `failed` are the exceptions by which the test runner's own skip() and fail() end a test. What is
    neither an assertion nor an error of ours is a fault of the check itself, and so of the lab.
    """
    if isinstance(error, skipped):
        return Verdict.SKIPPED, str(getattr(error, "msg", error))
    if isinstance(error, Inconclusive):
        return Verdict.INCONCLUSIVE, str(error)
    if isinstance(error, TestbedError):
        product = error.exit_code is Exit.FAILED
        return (Verdict.FAILED if product else Verdict.LAB_ERROR), str(error)
    if isinstance(error, (AssertionError, failed)):
        # A percent sign in an assertion's message is doubled by pytest, where it tells of assertions that hold.
        return Verdict.FAILED, str(error).replace("%%", "%") or "the assertion does not hold"
    return Verdict.LAB_ERROR, f"the check itself broke: {type(error).__name__}: {error}"


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

    def add(self, outcome: Outcome) -> None:
        """Keep an outcome; a second one for the same check, from its clean-up, counts where it is the worse."""
        if outcome.sketch is not None:
            self.labs[str(outcome.account.get("lab", ""))] = outcome.sketch
        for position, known in enumerate(self.outcomes):
            if known.item == outcome.item:
                outcome.leaked = outcome.leaked or known.leaked
                known.leaked = outcome.leaked
                if outcome.verdict is not Verdict.HELD:
                    outcome.account = {**outcome.account, **known.account}
                    self.outcomes[position] = outcome
                return
        self.outcomes.append(outcome)

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
        run["leaks"] = sum(bool(outcome.leaked) for outcome in self.outcomes)
        checks = [outcome.to_json() for outcome in self.outcomes]
        return {"schema": 1, "run": run, "checks": checks, "labs": self.labs}


def exit_code(outcomes: Iterable[Outcome], *, interrupted: bool = False, broken: bool = False) -> Exit:
    """The run's exit code, the worst first: interrupt, input, lab, a failed check, nothing ran."""
    seen = list(outcomes)
    verdicts = {outcome.verdict for outcome in seen}
    if interrupted:
        return Exit.INTERRUPTED
    if any(outcome.input_error for outcome in seen):
        return Exit.INPUT
    if broken or Verdict.LAB_ERROR in verdicts:
        return Exit.LAB
    if verdicts & {Verdict.FAILED, Verdict.INCONCLUSIVE, Verdict.UNEXPECTED_PASS} or any(o.leaked for o in seen):
        return Exit.FAILED
    return Exit.HELD if verdicts & {Verdict.HELD, Verdict.EXPECTED_FAILURE} else Exit.NOTHING_RAN
