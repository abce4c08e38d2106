"""Which labs of this user are there: one small file a lab, so that later commands find it from any terminal.

A lab is named by the pid of its first process *and* that process's start time and PID namespace, since a pid alone
may belong to somebody else by the time it is used.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from testbed.errors import InputError, LabBusyError, LabError
from testbed.model import LabSpec

_SPEC: TypeAdapter[LabSpec] = TypeAdapter(LabSpec)
_ID = re.compile(r"[a-z0-9][a-z0-9_.-]{0,47}")


def checked_id(lab_id: str) -> str:
    """Return a lab's id if it is one. Raises InputError."""
    if not _ID.fullmatch(lab_id):
        raise InputError(
            f"{lab_id!r} cannot name a lab", hint="lower-case letters, digits, _ . and -, at most 48 of them"
        )
    return lab_id


def state_folder() -> Path:
    """The folder of this user's labs, or TESTBED_STATE. Raises LabError where it is somebody else's."""
    uid = os.getuid()
    runtime = Path(f"/run/user/{uid}")
    if "TESTBED_STATE" in os.environ:
        folder = Path(os.environ["TESTBED_STATE"])
    elif uid == 0:
        folder = Path("/run/testbed")
    elif runtime.is_dir() and os.access(runtime, os.W_OK):
        folder = runtime / "testbed"
    else:
        folder = Path(f"/tmp/testbed-{uid}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        hint = "TESTBED_STATE names another folder; the one that it is in has to be there"
        raise LabError(f"cannot keep track of labs in {folder}: {error.strerror}", hint=hint) from error
    if folder.is_symlink() or not folder.is_dir() or found.st_uid != uid:
        hint = "name a folder of your own by TESTBED_STATE"
        raise LabError(f"cannot keep track of labs in {folder}: it is no folder of yours", hint=hint)
    if found.st_mode & 0o077:
        raise LabError(f"{folder}, which keeps track of labs, is open to others", hint=f"chmod 700 {folder}")
    return folder


@dataclass(frozen=True, slots=True)
class Holder:
    """A lab's first process, by everything that tells it from another with the same pid."""

    pid: int
    start_time: int  # clock ticks since boot
    pid_namespace: int  # inode

    @classmethod
    def of(cls, pid: int) -> Holder:
        """Look at a live process. Raises ProcessLookupError or PermissionError."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
            namespace = cls._namespace(pid)
        except FileNotFoundError as error:
            raise ProcessLookupError(pid) from error
        return cls(pid, int(stat.rpartition(")")[2].split()[19]), namespace)

    @staticmethod
    def _namespace(pid: int) -> int:
        try:
            return Path(f"/proc/{pid}/ns/pid_for_children").stat().st_ino
        except PermissionError:
            if pid != 1:  # the machine's own, which is nobody's to look into, is the same for as long as the machine is
                raise
            return 0

    @property
    def alive(self) -> bool:
        """Whether this very process still runs; a zombie does not."""
        try:
            return Holder.of(self.pid) == self
        except (ProcessLookupError, PermissionError, OSError):
            return False

    @property
    def user_namespace(self) -> int | None:
        """The inode of its user namespace, also while it is dying; None where it is gone, or in this process's own."""
        try:
            place = Path(f"/proc/{self.pid}")
            started = int((place / "stat").read_text().rpartition(")")[2].split()[19])
            own = started == self.start_time and (place / "ns/pid").stat().st_ino == self.pid_namespace
            found = (place / "ns/user").stat().st_ino
        except OSError:
            return None
        return found if own and found != Path("/proc/self/ns/user").stat().st_ino else None

    def kill(self, timeout: float) -> bool:
        """Kill it, and with it all that is in its PID namespace; returns whether it is gone in time (seconds)."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        try:
            if not self.alive:
                return True
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            # Readable once every process of the namespace is gone: the first one waits for the others.
            return bool(select.select([handle], [], [], timeout)[0])
        finally:
            os.close(handle)


@dataclass(frozen=True, slots=True)
class LabRecord:
    """What is known of a lab that was brought up."""

    spec: LabSpec
    holder: Holder
    pids: dict[str, int]  # each node's first process, as numbered inside the box
    facts: dict[str, Any]  # what else later commands want: backend, pods, …
    kind: str = "netns"

    @property
    def path(self) -> Path:
        """The record's file."""
        return state_folder() / f"{self.spec.id}.json"

    def save(self) -> None:
        """Write the record, whole or not at all."""
        record = {
            "schema": 1,
            "kind": self.kind,
            "spec": _SPEC.dump_python(self.spec, mode="json"),
            "holder": [self.holder.pid, self.holder.start_time, self.holder.pid_namespace],
            "pids": self.pids,
            "facts": self.facts,
        }
        aside = self.path.with_suffix(".tmp")
        try:
            aside.write_text(json.dumps(record))
            aside.replace(self.path)
        except OSError as error:
            raise LabError(f"cannot keep track of the lab: {error.strerror}", where=str(self.path)) from error

    def forget(self) -> None:
        """Remove the record."""
        self.path.unlink(missing_ok=True)


def read_record(lab_id: str) -> LabRecord | None:
    """The record of a lab, or None where there is none. Raises LabError where it cannot be read."""
    path = state_folder() / f"{checked_id(lab_id)}.json"
    try:
        record = json.loads(path.read_text())
        spec = _SPEC.validate_python(record["spec"])
        return LabRecord(spec, Holder(*record["holder"]), record["pids"], record["facts"], record["kind"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabError(
            f"the record of lab {lab_id} cannot be read", where=str(path), hint="testbed down --all"
        ) from error


def known_ids() -> tuple[str, ...]:
    """The ids of all labs with a record, alive or not."""
    return tuple(sorted(path.stem for path in state_folder().glob("*.json")))


@contextmanager
def locked(lab_id: str) -> Iterator[None]:
    """Hold the lab's name while it is brought up or down. Raises LabError where somebody else does."""
    path = state_folder() / f"{checked_id(lab_id)}.lock"
    file = _lock(path, lab_id)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held, so that nobody can hold the name by an older file
        os.close(file)


def _lock(path: Path, lab_id: str) -> int:
    while True:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.fstat(file).st_ino == path.stat().st_ino:
                return file
        except BlockingIOError:
            os.close(file)
            raise LabBusyError(
                f"lab {lab_id} is being brought up or down by another command",
                hint="wait for it, or give this one another --name",
            ) from None
        except FileNotFoundError:
            pass  # removed between the two looks
        os.close(file)


def salvage(lab_id: str) -> None:
    """Remove a record that cannot be read, and kill the lab's holder if at least that can be told."""
    path = state_folder() / f"{lab_id}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        Holder(*json.loads(path.read_text())["holder"]).kill(10)
    path.unlink(missing_ok=True)


def sweep() -> None:
    """Remove the files of commands that were killed; what is in use stays."""
    for path in state_folder().glob("*.tmp"):
        path.unlink(missing_ok=True)
    for path in state_folder().glob("*.lock"):
        with contextlib.suppress(LabError), locked(path.stem):
            pass
