"""Which checks are known to fail with an implementation of flannel or a version of it: `suites/expected.yaml`.

A known failure is shown apart and fails no run; one that is `strict` and does not fail any more does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from testbed.checks import load_catalogue
from testbed.data import folder
from testbed.errors import Fault, InputError
from testbed.flannelspec import BACKENDS, RULES
from testbed.options import STORES
from testbed.report.record import Outcome, Verdict
from testbed.yamlmarks import Document, parse, read_text

KEYS = ("id", "implementation", "versions", "backends", "rules", "store", "reason", "link", "introduced", "strict")
CHOICES = {"backends": tuple(BACKENDS), "rules": RULES, "store": STORES}
"""The keys that hold a list of what a run may be, by default all of it."""
_CHOICE = {"backends": "run", "rules": "kind of rules", "store": "store"}
_TEXTS = {"id": None, "implementation": None, "reason": None, "versions": "", "link": "", "introduced": ""}

_BOUND = re.compile(r"(>=|<=|==|>|<)(\d{1,6}(?:\.\d{1,6}){0,2})")


@dataclass(frozen=True, slots=True)
class Implementation:
    """A flanneld under test: `bundled`, or the name of its file, and what it says that its version is."""

    name: str
    version: str = ""  # as it prints it: v0.28.9

    @property
    def upstream(self) -> bool:
        """Whether it numbers its versions as upstream does."""
        return self.name != "bundled" and re.match(r"v\d", self.version) is not None


@dataclass(frozen=True, slots=True)
class Expectation:
    """One entry: the row, the implementation and versions, the runs that it is about, and why it fails.

    `link` is where upstream was told, `introduced` the change by which it came in.
    """

    id: str
    implementation: str
    reason: str
    backends: tuple[str, ...] = CHOICES["backends"]
    rules: tuple[str, ...] = CHOICES["rules"]
    store: tuple[str, ...] = CHOICES["store"]
    versions: str = ""
    link: str = ""
    introduced: str = ""
    strict: bool = True

    def about(self, row: str, backend: str) -> bool:
        """Whether it is about a check of a run, whatever the implementation is."""
        return row == self.id and backend in self.backends

    def of_run(self, rules: str, store: str) -> bool:
        """Whether it is about runs with those rules and that store."""
        return rules in self.rules and store in self.store

    @property
    def why(self) -> str:
        """The reason, and where to read more of it."""
        where = [self.link, f"introduced by {self.introduced}" if self.introduced else ""]
        told = "; ".join(filter(None, where))
        return f"{self.reason} ({told})" if told else self.reason

    def meets(self, implementation: Implementation) -> bool:
        """Whether it is about an implementation."""
        named = implementation.name == self.implementation
        return (named or (self.implementation == "upstream" and implementation.upstream)) and within(
            implementation.version, self.versions
        )


def numbers(version: str) -> tuple[int, ...] | None:
    """The numbers of a version, three of them; None where it does not begin with any."""
    match = re.match(r"v?(\d{1,6})(?:\.(\d{1,6}))?(?:\.(\d{1,6}))?", version)
    return tuple(int(part or 0) for part in match.groups()) if match else None


def within(version: str, bounds: str) -> bool:
    """Whether a version keeps all bounds; one that is not known keeps none but the empty ones."""
    if not bounds.strip():
        return True
    own = numbers(version)
    if own is None:
        return False
    for sign, bound in _BOUND.findall(bounds):
        other = numbers(bound)
        assert other is not None  # the expression takes digits only
        kept = {">=": own >= other, "<=": own <= other, "==": own == other, ">": own > other, "<": own < other}
        if not kept[sign]:
            return False
    return True


def expected_path() -> Path:
    """Where the expectations are."""
    return folder("suites") / "expected.yaml"


def load_expectations(path: Path | None = None) -> tuple[Expectation, ...]:
    """The entries of a file. Raises InputError with every fault of it, each with its line."""
    path = path or expected_path()
    documents, faults = parse(read_text(str(path), what="list of expected failures"), str(path))
    found: list[Expectation] = []
    for document in documents:
        entries = document.value.get("expected") if isinstance(document.value, dict) else None
        if not isinstance(entries, list):
            faults.append(document.fault(("expected",), "has to be a list of expected failures"))
            continue
        for position, entry in enumerate(entries):
            wrong = list(_problems(document, position, entry))
            faults += wrong
            if not wrong:
                found.append(_expectation(entry))
    if faults:
        raise InputError(faults=faults)
    return tuple(found)


def _expectation(entry: Mapping[str, Any]) -> Expectation:
    facts: dict[str, Any] = {key: tuple(value) if key in CHOICES else value for key, value in entry.items()}
    return Expectation(**facts)


def _problems(document: Document, position: int, entry: Any) -> list[Fault]:
    here = ("expected", position)
    if not isinstance(entry, dict):
        return [document.fault(here, "has to be an entry with an id")]
    found = []
    for key in entry.keys() - set(KEYS):
        close = get_close_matches(str(key), KEYS, 1)
        hint = f"did you mean {close[0]}?" if close else f"its keys are {', '.join(KEYS)}"
        found.append(document.fault((*here, key), "not known", hint))
    found += [
        document.fault((*here, key), "has to be text" if key in entry else "missing")
        for key, default in _TEXTS.items()
        if not isinstance(entry.get(key, default), str)
    ]
    if not isinstance(entry.get("strict", True), bool):
        found.append(document.fault((*here, "strict"), "has to be true or false"))
    rows = load_catalogue()
    if isinstance(entry.get("id"), str) and entry["id"] not in rows:
        close = get_close_matches(entry["id"], rows, 1)
        hint = f"did you mean {close[0]}?" if close else "`testbed checks` lists the rows"
        found.append(document.fault((*here, "id"), f"{entry['id']} is not in the catalogue", hint))
    for key, known in CHOICES.items():
        given = entry.get(key, known)
        strangers = [one for one in given if one not in known] if isinstance(given, (list, tuple)) else [given]
        if strangers or not given:
            what = f"{strangers[0]!r} is no {_CHOICE[key]}" if strangers else f"names no {_CHOICE[key]} at all"
            found.append(document.fault((*here, key), what, f"{key} is a list of {', '.join(known)}"))
    bounds = entry.get("versions", "")
    if isinstance(bounds, str) and _BOUND.sub("", bounds).strip(" ,"):
        found.append(document.fault((*here, "versions"), f"{bounds!r} are no bounds", 'write ">=0.20 <0.29"'))
    return found


def judged(outcome: Outcome, expectations: Sequence[Expectation], implementations: Sequence[Implementation]) -> Outcome:
    """The outcome as it counts where `implementations`, one for each node, are under test.

    A failure is expected where an entry is about one of them.  A check that holds is unexpected only where it is about
    all of them and strict: in a mixed cluster the others may have done the work.
    """
    for expectation in expectations:
        meets = [expectation.meets(implementation) for implementation in implementations]
        if not expectation.about(outcome.id, outcome.backend) or not any(meets):
            continue
        why = expectation.why
        if outcome.verdict is Verdict.FAILED:
            reason = f"expected of {expectation.implementation}: {why}\n{outcome.reason}"
            return replace(outcome, verdict=Verdict.EXPECTED_FAILURE, reason=reason)
        if outcome.verdict is Verdict.HELD and expectation.strict and all(meets):
            reason = f"it holds, but is expected to fail with {expectation.implementation}: {why}\n"
            reason += f"take the entry out of {expected_path().name}, or give it an end by `versions`"
            return replace(outcome, verdict=Verdict.UNEXPECTED_PASS, reason=reason)
    return outcome
