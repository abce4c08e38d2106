"""The proof itself: a plugin of pytest's that makes mutations in one running lab and runs the checks under each."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from _pytest.runner import runtestprotocol

from testbed.collecting import is_disruptive, row_of, skip_reason
from testbed.data import folder
from testbed.errors import TestbedError
from testbed.fixtures import Facts
from testbed.mutants.making import made
from testbed.mutants.mutations import Mutation
from testbed.report.record import Verdict
from testbed.runstate import RUN
from testbed.statewatch import State, StateWatch, differences, tunnel_devices, with_tunnels_named

if TYPE_CHECKING:
    from testbed.nodes.deploy import Cluster

WHOLE_SECONDS = 15.0
"""How long the lab may take to be as it was once a mutation is undone."""


ACT_ON_FLANNELD = ("DEP-24", "VXE-12", "UDP-09")
"""Rows whose checks stop flanneld or let it go on, which would mend a mutation that needs it held; as bystanders they
are left out."""


@dataclass
class Proof:
    """What came of one mutation: `killed`, or what went wrong instead."""

    mutation: str
    row: str
    backend: str
    outcome: str = "killed"  # survived, other, bystanders, not whole, broken, not run
    said: str = ""
    seconds: float = 0.0

    @property
    def stands(self) -> bool:
        """Whether the row's check is proven to fail."""
        return self.outcome == "killed"

    @property
    def refutes(self) -> bool:
        """Whether it takes an older proof away: the mutation was made, and what came of it is not what it is for."""
        return self.outcome in ("survived", "other", "bystanders", "not whole")

    def to_json(self) -> dict[str, Any]:
        """The proof as plain data."""
        return asdict(self) | {"seconds": round(self.seconds, 2)}


@dataclass(frozen=True, slots=True)
class Seen:
    """How one check ended: its verdict, and its assertion's message and source."""

    item: str
    row: str
    verdict: str
    said: str


@dataclass
class Driver:
    """Replaces pytest's loop over the checks. With `full` those of smoke that leave the lab alone are run as well."""

    mutations: Sequence[Mutation]
    backend: str
    full: bool
    tell: Callable[[Proof], None]
    proofs: list[Proof] = field(default_factory=list)
    _sources: dict[str, str] = field(default_factory=dict)
    _watch: StateWatch | None = None

    @pytest.fixture(autouse=True)
    def facts_are_fresh(self, facts: Facts) -> None:
        """What was known of the kernels' state was known before the mutation."""
        facts.forget()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Keep the source of the assertion that failed: the innermost statement of the suites."""
        report = yield
        if call.excinfo is not None:
            suites = folder("suites").resolve()
            inside = [one for one in call.excinfo.traceback if Path(one.path).resolve().parent == suites]
            self._sources[item.nodeid] = str(inside[-1].statement) if inside else ""
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run the checks once as they are, then under each mutation."""
        run = session.config.stash[RUN]
        if run.aftermath is not None:
            run.aftermath.watching = False  # what is wrong with the lab is no check's doing
        rows = {mutation.row for mutation in self.mutations}
        items = [item for item in session.items if item.get_closest_marker("check")]
        chosen = [item for item in items if row_of(item).smoke or row_of(item).id in rows]
        chosen = [item for item in chosen if not skip_reason(item) and (self.full or row_of(item).id in rows)]
        before = self._run(session, chosen)
        cluster = session.config.stash[RUN].cluster
        for mutation in self.mutations:
            proof = Proof(mutation.id, mutation.row, self.backend)
            self.proofs.append(proof)
            began = time.monotonic()
            mine = [one for one in before if one.row == mutation.row]
            if cluster is None or session.shouldfail or all(one.verdict != Verdict.HELD for one in mine):
                ended = "; ".join(f"{one.verdict}: {one.said}" for one in mine) or "it does not run in this lab"
                proof.outcome, proof.said = "not run", f"without the mutation: {ended}"
            else:
                self._prove(session, cluster, mutation, chosen, proof)
            proof.seconds = time.monotonic() - began
            self.tell(proof)
            if proof.outcome == "not whole":
                break  # what comes next would be judged in a lab that is not as it should be
        if self._watch is not None:
            self._watch.close()
        return True

    def _prove(
        self, session: pytest.Session, cluster: Cluster, mutation: Mutation, items: Sequence[pytest.Item], proof: Proof
    ) -> None:
        mine = [item for item in items if row_of(item).id == mutation.row]
        left_out = (mutation.row, *ACT_ON_FLANNELD)
        smoke = [item for item in items if self.full and row_of(item).smoke and not is_disruptive(item)]
        others = [item for item in smoke if row_of(item).id not in left_out]
        watch, devices = self._watching(cluster), tunnel_devices(cluster.flannel)
        before = watch.read()
        try:
            with made(mutation, cluster):
                seen = self._run(session, mine + others)
            judge(mutation, seen, proof)
        except TestbedError as error:
            proof.outcome, proof.said = "broken", str(error)

        def seen_as(state: State) -> State:
            return with_tunnels_named(state, devices)

        after = seen_as(watch.settled(before, WHOLE_SECONDS, seen_as))
        try:
            again = [one for one in self._run(session, mine) if one.verdict not in (Verdict.HELD, Verdict.SKIPPED)]
        except TestbedError as error:
            proof.outcome, proof.said = "not whole", str(error)
            return
        if again or after != seen_as(before):
            lines = [f"{one.item}: {one.said}" for one in again] + differences(seen_as(before), after)
            proof.outcome, proof.said = "not whole", "\n".join(lines[:20])

    def _watching(self, cluster: Cluster) -> StateWatch:
        if self._watch is None:
            self._watch = StateWatch(cluster)
        return self._watch

    def _run(self, session: pytest.Session, items: Sequence[pytest.Item]) -> list[Seen]:
        """Run checks; the lab and the captures stay, for what is said to come next is no check."""
        following = _After.from_parent(session, name="after")
        found = []
        for item in items:
            self._sources.pop(item.nodeid, None)
            reports = runtestprotocol(item, log=False, nextitem=following)
            messages: list[Mapping[str, Any]] = [m for r in reports if (m := getattr(r, "testbed", None))]
            worst = next((m for m in messages if m["verdict"] != Verdict.HELD), messages[0] if messages else None)
            if worst is None:
                continue
            said = f"{worst['reason']}\n{self._sources.get(item.nodeid, '')}".strip()
            found.append(Seen(item.name, worst["id"], str(worst["verdict"]), said))
        return found


class _After(pytest.Item):
    """What is named as the next to run, so that fixtures of the session live on."""

    def runtest(self) -> None:
        """Nothing: it is never run."""


def judge(mutation: Mutation, seen: Sequence[Seen], proof: Proof) -> None:
    """Whether the row failed, by the assertion that was named, and none but those that may."""
    mine = [one for one in seen if one.row == mutation.row and one.verdict not in (Verdict.HELD, Verdict.SKIPPED)]
    others = {
        one.row: one.said
        for one in seen
        if one.row not in (mutation.row, *mutation.also) and one.verdict not in (Verdict.HELD, Verdict.SKIPPED)
    }
    wrong = [one for one in mine if one.verdict != Verdict.FAILED or not re.search(mutation.assertion, one.said)]
    if not mine:
        proof.outcome, proof.said = "survived", "the check holds under it"
    elif wrong:
        proof.outcome, proof.said = "other", f"{wrong[0].item} ended otherwise ({wrong[0].verdict}): {wrong[0].said}"
    elif others:
        proof.outcome = "bystanders"
        proof.said = "\n".join(f"{row} failed too: {said.splitlines()[0]}" for row, said in others.items())
    else:
        proof.said = mine[0].said
