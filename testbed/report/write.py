"""Writing a run's report: aside, under a lock, and then renamed, so that a reader sees the old one or the new one."""

from __future__ import annotations

import errno
import fcntl
import glob
import html
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from testbed.deadline import Deadline
from testbed.errors import InputError, LabError
from testbed.report.junit import to_junit
from testbed.report.page.build import page_of
from testbed.report.parts import CHECKS, Part
from testbed.report.record import RunRecord

LOCK_SECONDS = 30.0

PARTS = frozenset({"checks.json", "junit.xml", "index.html", "checks", "failures"})
"""What a report consists of, `failures` one of an earlier version.

A folder with anything else in it is somebody's, and never replaced.
"""

_UNSAFE = re.compile(r"[^A-Za-z0-9._+=@-]+")


def safe_name(text: str) -> str:
    """A file name for a check or an interface: without separators, and never empty or hidden."""
    return _UNSAFE.sub("_", text).strip("._")[:120] or "unnamed"


def _said(error: OSError, folder: Path) -> LabError:
    """The one error for whatever keeps a report from being written."""
    hints = {
        errno.ENOSPC: "free some space there, or give another folder by --reports",
        errno.EDQUOT: "your quota there is used up; give another folder by --reports",
        errno.EACCES: "give a folder that you may write to by --reports",
        errno.EPERM: "give a folder that you may write to by --reports",
        errno.EROFS: "give a folder that you may write to by --reports",
    }
    what = f"the report cannot be written: {error.strerror or error}"
    return LabError(what, where=str(folder), hint=hints.get(error.errno or 0, "give another folder by --reports"))


def _refuse_what_is_no_report(folder: Path) -> None:
    """A report takes the place of an earlier one, and of nothing else. Raises InputError."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError("this is no folder", where=str(folder), hint="give another one by --reports")
    strangers = sorted({path.name for path in folder.iterdir()} - PARTS)
    if strangers:
        what = f"this is no report but holds {', '.join(strangers[:3])}{', …' * (len(strangers) > 3)}"
        hint = "a report would replace the whole folder: give one of its own by --reports"
        raise InputError(what, where=str(folder), hint=hint)


class ReportFolder:
    """The report of one run while it grows beside its final place, `folder`.

    Raises LabError where nothing can be written there, and InputError where something else than a report is there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(os.path.abspath(folder))  # noqa: PTH100 (without the links: the last one is replaced)
        try:
            _refuse_what_is_no_report(self.folder)
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._sweep()
                self.staging = Path(tempfile.mkdtemp(prefix=self._prefix, dir=self.folder.parent))
                self.staging.chmod(0o755)
                self._held = os.open(self.staging, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                fcntl.flock(self._held, fcntl.LOCK_EX)
        except OSError as error:
            raise _said(error, self.folder) from error

    def _sweep(self) -> None:
        """Remove what runs left behind that were killed.

        A run that goes on holds a lock on its folder.  Its pid would not do: another machine, container or guest that
        writes to this place has pids of its own.
        """
        for path in self.folder.parent.glob(f"{glob.escape(self._prefix)}*"):
            with suppress(OSError):
                with _open_folder(path) as descriptor:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)

    @property
    def _prefix(self) -> str:
        """How the names of this report's folders begin while they grow."""
        return f".{self.folder.name}.growing-"

    def part(self, number: int) -> Part:
        """A new folder in the growing report for one part of it."""
        folder = self.staging / f"part-{number}"
        try:
            folder.mkdir()
        except OSError as error:
            raise _said(error, self.folder) from error
        return Part(folder)

    def write(self, record: RunRecord) -> Path:
        """Write everything and put it in its place; returns the folder. Raises LabError, and leaves nothing then."""
        try:
            document = record.to_json()
            _write(self.staging / "checks.json", to_text(document))
            _write(self.staging / "index.html", _page(document))
            _write(self.staging / "junit.xml", to_junit(record))
            with self._locked():
                self._replace()
        except OSError as error:
            self.discard()
            raise _said(error, self.folder) from error
        self._release()
        return self.folder

    def _replace(self) -> None:
        """Swap the finished report in; the earlier one disappears only once the new one stands there."""
        old = self.staging.with_name(f"{self.staging.name}.old")
        if self.folder.exists():
            self.folder.rename(old)
        try:
            self.staging.rename(self.folder)
        except OSError:
            with suppress(OSError):
                old.rename(self.folder)
            raise
        shutil.rmtree(old, ignore_errors=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder.parent / f".{self.folder.name}.lock").open("w") as lock:
            taken = Deadline(LOCK_SECONDS).poll(lambda: _try_lock(lock.fileno()))
            if not taken:
                raise LabError("another run is writing its report there", where=str(self.folder), hint="try again")
            yield

    def discard(self) -> None:
        """Give the report up."""
        shutil.rmtree(self.staging, ignore_errors=True)
        self._release()

    def _release(self) -> None:
        """Let go of the lock on the folder."""
        if self._held >= 0:
            os.close(self._held)
            self._held = -1


@contextmanager
def _open_folder(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _page(document: Mapping[str, Any]) -> str:
    """The page of a run; where it cannot be made, a page that says so, since a run is more than its page."""
    try:
        return page_of(document)
    except Exception as error:  # noqa: BLE001 (whatever it is, checks.json is there and says more)
        said = html.escape(f"{type(error).__name__}: {error}")
        return f"<!doctype html><title>no page</title><p>This page could not be made ({said}); see checks.json.\n"


def to_text(document: Mapping[str, Any]) -> str:
    """The run as the text of checks.json: a line a check, since what they did would make thousands of lines."""

    def line(value: object) -> str:
        return json.dumps(value, ensure_ascii=False)

    parts = []
    for key, value in document.items():
        if key == "checks":
            rows = ",\n".join(f"  {line(check)}" for check in value)
            parts.append(f' "checks": [\n{rows}\n ]')
        else:
            parts.append(f" {line(key)}: {line(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def save_artefacts(staging: Path, item: str, files: Mapping[str, bytes]) -> list[str]:
    """Keep a failed check's files in its folder under `checks/`; returns their paths inside the report.

    Raises LabError, with nothing half-written, where they cannot be kept.
    """
    folder = staging / CHECKS / safe_name(item)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for name, content in sorted(files.items()):
            path = folder / name
            path.write_bytes(content)
            written.append(str(path.relative_to(staging)))
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise _said(error, staging.parent) from error
    return written
