"""A run of several passes, or of one in a guest: started from here, its parts put together to one report.

A guest's pass writes its outcomes as they come, so that what was done by one that dies is reported all the same.
With `-n N` there are N guests, each with a lab of its own and its share of the checks.  Checks that need more of the
kernel than their backend does run, where this machine's kernel lacks it, in a guest behind the others.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from testbed import checks
from testbed.errors import Exit, InputError, LabError, TestbedError, worst
from testbed.guest import runs
from testbed.interrupts import handling, has_terminal
from testbed.report.conclude import Ending, conclude
from testbed.report.parts import DEFER, ONLY, SHARE, VARIABLE, Part, gather_files, merged
from testbed.report.terminal import Screen
from testbed.report.write import ReportFolder

HOST_PASS = Callable[[Sequence[str]], int]


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """The environment has these values inside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@dataclass
class Passes:
    """The passes of one run of a backend, and the report that they make together."""

    run: str
    options: Sequence[str]
    report: ReportFolder
    parts: list[Part] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    broken: str = ""
    interrupted: bool = False

    @classmethod
    def of(cls, run: str, options: Sequence[str]) -> Passes:
        """Open the report. Raises InputError where it cannot be written there."""
        reports = runs.value_of("--reports", options)
        return cls(run, options, ReportFolder(Path(reports) if reports else Path("reports") / run))

    def part(self) -> Part:
        """A new part."""
        self.parts.append(self.report.part(len(self.parts)))
        return self.parts[-1]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """What has been done is reported also where a guest dies or the user has had enough."""
        try:
            yield
        except LabError as error:
            self.broken = str(error)
            self.codes.append(int(error.exit_code))
        except KeyboardInterrupt:
            self.interrupted = True

    def conclude(self) -> int:
        """Put the parts together, write the report, and return the run's exit code."""
        endings = [part.ending for part in self.parts]
        outcomes = any(part.outcomes for part in self.parts)
        if not outcomes and not any(endings):  # nothing came of it, and whoever failed has said why
            self.report.discard()
            if self.broken:
                raise LabError(self.broken)
            return int(Exit.INTERRUPTED) if self.interrupted else worst(self.codes)
        facts = {"name": "", "backend": self.run, "kernel": "guest"}
        record = merged(self.parts, checks.load_catalogue(), {})
        record.facts = facts | record.facts
        record.interrupted |= self.interrupted
        record.broken = self.broken or record.broken
        if Exit.LAB in self.codes and not all(endings):  # one of several, which has said why
            record.broken = record.broken or "a guest died before the end of its checks; see above"
        known = [Ending(**ending["ending"]) for ending in endings if ending]
        first = known[0] if known else Ending(self.run, "smoke", comparable=False)
        stopped = any(ending.stopped for ending in known) or len(known) < len(self.parts)
        refused = bool(known) and all(ending.refused for ending in known)
        ending = Ending(first.backend, first.selection, first.comparable, stopped=stopped, refused=refused)
        gather_files(self.parts, self.report.staging)
        screen = Screen(os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace"))
        code = conclude(record, ending, screen, self.report)
        others = [code for code in self.codes if code not in (Exit.NOTHING_RAN, Exit.HELD)]
        return worst([code, *others])


# --- in guests


def in_guests(run: str, options: Sequence[str]) -> int:
    """All checks of a run in one guest or, with `-n N`, in N of them side by side; returns the run's exit code."""
    count = workers(options)
    options = without_workers(options)
    runs.refuse_what_guests_cannot(options)
    passes = Passes.of(run, options)
    try:
        with passes.kept():
            kernel = runs.kernel_for(run, options)
            if count > 1:
                shares = {passes.part().folder: f"{number}/{count}" for number in range(count)}
                passes.codes += side_by_side(run, options, shares)
            else:
                passes.codes.append(runs.in_guest(run, options, kernel, passes.part().folder))
        return passes.conclude()
    except TestbedError:
        passes.report.discard()
        raise


def workers(options: Sequence[str]) -> int:
    """How many labs side by side are asked for, in the words of pytest-xdist. Raises InputError for no number."""
    found = "1"
    for position, word in enumerate(options):
        if word in ("-n", "--numprocesses"):
            found = next(iter(options[position + 1 :]), "")
        elif word.startswith("--numprocesses="):
            found = word.partition("=")[2]
        elif word.startswith("-n") and word[2:].lstrip("=").isalnum():
            found = word[2:].lstrip("=")
    if found in ("auto", "logical"):
        return len(os.sched_getaffinity(0))
    if not found.isdecimal():
        raise InputError(f"{found!r} is no number of guests", where="-n", hint="-n 2, or -n auto")
    return max(1, int(found))


def without_workers(options: Sequence[str]) -> list[str]:
    """The options but for those that `workers` reads."""
    kept = runs.without("-n", runs.without("--numprocesses", options))
    return [word for word in kept if not (word.startswith("-n") and word[2:].lstrip("=").isalnum())]


def side_by_side(run: str, options: Sequence[str], shares: Mapping[Path, str]) -> list[int]:
    """Run each share in a guest of its own, all at once; returns their exit codes.

    Each is a process of its own, which ends with this one.
    """
    children: list[subprocess.Popen[bytes]] = []
    interrupts: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        interrupts.append(number)
        for child in children:
            # A terminal's Ctrl-C reaches them by itself, and a second one would cut their clean-up short.
            if child.poll() is None and not (number == signal.SIGINT and has_terminal()):
                child.send_signal(number)

    tied = ["setpriv", "--pdeathsig", "KILL", "--"]
    argv = [*tied, sys.executable, "-m", "testbed", "run", run, "--", *options, "--kernel", "guest"]
    with handling(pass_on, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        try:
            for folder, share in shares.items():
                env = {**os.environ, VARIABLE: str(folder), SHARE: share}
                children.append(subprocess.Popen(argv, stdout=subprocess.PIPE, env=env))
            show_lines({str(number): child.stdout for number, child in enumerate(children, 1) if child.stdout})
            codes = [child.wait() for child in children]
        finally:
            for child in children:
                if child.poll() is None:
                    child.kill()
                    child.wait()
    if interrupts:
        raise KeyboardInterrupt
    return [code if code >= 0 else int(Exit.LAB) for code in codes]


def show_lines(streams: Mapping[str, IO[bytes]]) -> None:
    """Pass on whole lines as they come, each behind the name of where it is from, until all have ended."""
    rest = dict.fromkeys(streams, b"")
    with selectors.DefaultSelector() as selector:
        for name, stream in streams.items():
            selector.register(stream, selectors.EVENT_READ, name)
        while selector.get_map():
            for key, _ in selector.select():
                data = os.read(key.fd, 1 << 16)
                if not data:
                    selector.unregister(key.fileobj)
                *lines, rest[key.data] = (rest[key.data] + data).split(b"\n")
                if not data and rest[key.data]:
                    lines.append(rest[key.data])
                for line in lines:
                    sys.stdout.buffer.write(f"{key.data} │ ".encode() + line + b"\n")
                sys.stdout.flush()


# --- on this kernel, and what it lacks in a guest


def on_both(run: str, options: Sequence[str], lacking: Sequence[str], host: HOST_PASS) -> int:
    """The checks that this kernel can do here, then those that need `lacking` in a guest; returns the exit code."""
    passes = Passes.of(run, options)
    try:
        part = passes.part()
        with passes.kept():
            with environment(**{VARIABLE: str(part.folder), DEFER: ",".join(lacking)}):
                passes.codes.append(host(runs.without("--kernel", options)))
            if part.deferred and _goes_on(part, passes.codes[-1]):
                rest = [word for word in without_workers(options) if word != "--keep"]
                _guest_pass(passes, part.deferred, rest, lacking)
        return passes.conclude()
    except TestbedError:
        passes.report.discard()
        raise


def _goes_on(part: Part, code: int) -> bool:
    """Whether a run goes on behind this pass: not where it was stopped."""
    ending = part.ending
    if ending is None or ending["interrupted"] or ending["ending"]["stopped"]:
        return False
    return code in (Exit.HELD, Exit.FAILED, Exit.NOTHING_RAN)


def _guest_pass(passes: Passes, names: Sequence[str], options: Sequence[str], lacking: Sequence[str]) -> None:
    ids = ", ".join(dict.fromkeys(name.partition("[")[0] for name in names))
    sys.stdout.write(f"in a guest kernel, since this machine's lacks {', '.join(lacking)}: {ids}\n")
    sys.stdout.flush()
    kernel = runs.kernel_for(passes.run, options)
    part = passes.part()
    only = part.folder / "only.json"
    only.write_text(json.dumps(names))
    with environment(**{ONLY: str(only)}):
        passes.codes.append(runs.in_guest(passes.run, options, kernel, part.folder))
