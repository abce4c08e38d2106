"""The parts of a run: what each pass of it writes while it goes on, and one record of them all.

A pass is one pytest, on this machine's kernel or in a guest.  It writes its outcomes one by one, so that those of a
pass that dies are not lost, and at its end the rest.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from testbed.report.record import Outcome, RunRecord

VARIABLE = "TESTBED_PART"
"""The environment's name for the folder of the part that a pass writes, instead of a report."""

SHARE = "TESTBED_SHARE"
"""Which of a run's checks a pass is for: `1/3` for every third one, from the second on."""

ONLY = "TESTBED_ONLY"
"""A file with the checks that a pass is for, as a JSON list of their names."""

DEFER = "TESTBED_DEFER"
"""Kernel features, separated by commas, whose checks a pass leaves to another one."""

CHECKS = "checks"
"""The folder of a report with a folder for each failed check."""

OUTCOMES, ENDING, DEFERRED = "outcomes.jsonl", "ending.json", "deferred.json"


class PartWriter:
    """What a pass writes; its folder exists."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of_environment(cls) -> PartWriter | None:
        """The part that this process is to write; None for a run that writes its report itself."""
        path = os.environ.get(VARIABLE)
        return cls(Path(path)) if path else None

    def add(self, outcome: Outcome) -> None:
        """Keep an outcome: all that is known of its check by now, in the place of what was written of it before."""
        with (self.folder / OUTCOMES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(outcome.to_message()) + "\n")

    def end(self, record: RunRecord, **more: Any) -> None:
        """Keep what is known at the end; a part without it is one whose pass died."""
        facts = {"facts": record.facts, "interrupted": record.interrupted, "broken": record.broken}
        (self.folder / ENDING).write_text(json.dumps(facts | more), encoding="utf-8")


class Part:
    """What a pass has written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def outcomes(self) -> list[Outcome]:
        """Its outcomes, in order, of each check the latest; the last line may be a torn one."""
        found: dict[str, Outcome] = {}
        with suppress(FileNotFoundError):
            for line in (self.folder / OUTCOMES).read_text(encoding="utf-8").splitlines():
                with suppress(ValueError, TypeError, KeyError):
                    outcome = Outcome.from_message(json.loads(line))
                    found[outcome.item] = outcome
        return list(found.values())

    @property
    def ending(self) -> Mapping[str, Any] | None:
        """What was known at its end; None where it did not get there."""
        try:
            found: dict[str, Any] = json.loads((self.folder / ENDING).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return found

    @property
    def deferred(self) -> list[str]:
        """The checks that it left to another pass."""
        try:
            return [str(name) for name in json.loads((self.folder / DEFERRED).read_text(encoding="utf-8"))]
        except (FileNotFoundError, ValueError):
            return []


def merged(parts: Iterable[Part], order: Iterable[str], facts: Mapping[str, Any]) -> RunRecord:
    """One record of all parts, the checks in the catalogue's order; `facts` stand where no part knows better."""
    record = RunRecord(dict(facts))
    for part in parts:
        ending = part.ending or {}
        record.facts |= {key: value for key, value in ending.get("facts", {}).items() if key not in record.facts}
        record.interrupted |= bool(ending.get("interrupted"))
        record.broken = record.broken or str(ending.get("broken", ""))
        for outcome in part.outcomes:
            record.add(outcome)
    position = {row: number for number, row in enumerate(order)}
    record.outcomes.sort(key=lambda outcome: position.get(outcome.id, len(position)))
    return record


def gather_files(parts: Iterable[Part], staging: Path) -> None:
    """Move what failed checks left into the report, and remove the parts."""
    for part in parts:
        for folder in sorted((part.folder / CHECKS).glob("*")):
            target = staging / CHECKS / folder.name
            target.parent.mkdir(exist_ok=True)
            with suppress(OSError):  # there already: of another pass, which failed it too
                folder.rename(target)
        shutil.rmtree(part.folder, ignore_errors=True)
