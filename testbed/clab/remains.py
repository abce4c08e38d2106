"""What labs of containers leave on a machine: containers in an engine, files in our state; and how it goes for good.

The order is: containers first, since an engine makes again what a container of it binds, then files, then the record.
So a lab whose removal is cut short is still known.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path

from docker.errors import APIError, NotFound
from docker.models.containers import Container

from testbed.deadline import Deadline
from testbed.engine.find import ENGINE_ERRORS, Engine, find_engine
from testbed.errors import LabBusyError, LabError
from testbed.labs import state
from testbed.model import LabSpec
from testbed.parallel import each
from testbed.render import cluster_name

LABEL = "containerlab"  # the lab's name, on each of its containers
TOPOLOGY_FILE = "clab-topo-file"
"""Label with the path of the file that it was deployed from: below our state, for a container of ours."""

GONE_SECONDS = 60.0
QUIET_SECONDS = 1.0
"""How long an engine may still be making the container that a killed containerlab asked it for."""


def folders() -> Path:
    """Where the rendered files of all labs are."""
    return state.state_folder() / "clab"


def folder_of(lab_id: str) -> Path:
    """Where a lab's rendered files are."""
    return folders() / lab_id


def container_name(spec: LabSpec, node: str) -> str:
    """What containerlab calls the machine's container."""
    return f"clab-{cluster_name(spec)}-{node}"


@contextmanager
def one_at_a_time() -> Iterator[int]:
    """Hold the lock that every deploy and removal of this user takes: side by side they hang or race.

    It gives the descriptor that has the lock: it is held as long as any process has it open, so a containerlab that was
    given it is waited for, even if whoever started it was killed.
    """
    lock = os.open(state.state_folder(), os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
    finally:
        os.close(lock)


def remove(engine: Engine, lab_id: str, *, complete: bool) -> None:
    """Remove a lab's containers and files, however far it came; whether it was `complete`, as far as anybody knows.

    Raises LabError where something stays.
    """
    with one_at_a_time():
        try:
            _remove_containers(engine, lab_id, 0 if complete else QUIET_SECONDS)
        except ENGINE_ERRORS as error:
            raise LabError(f"lab {lab_id} cannot be removed: {error}", hint="is the Docker engine well?") from error
        remove_files(lab_id)


def _remove_containers(engine: Engine, lab_id: str, quiet: float) -> None:
    """Remove the lab's containers, and look again until for so many seconds there were none."""
    deadline, calm = Deadline(GONE_SECONDS), Deadline(quiet)

    def gone() -> bool:
        nonlocal calm
        found = containers(engine, lab_id)
        if not found:
            return calm.passed
        each(_kill, found)
        calm = Deadline(quiet)
        return not containers(engine, lab_id) and calm.passed

    if not deadline.poll(gone):
        left = " ".join(str(container.name) for container in containers(engine, lab_id))
        raise LabError(f"lab {lab_id} left containers behind: {left}", hint="`docker inspect`, and the engine's log")


def remove_files(lab_id: str) -> None:
    """Remove a lab's folder. Raises LabError where that cannot be done."""
    place = folder_of(lab_id)
    try:
        shutil.rmtree(place)
    except FileNotFoundError:
        pass
    except OSError as error:
        what = f"the files of lab {lab_id} cannot be removed: {error.strerror}"
        raise LabError(what, where=str(error.filename or place)) from error
    with suppress(OSError):  # another lab's are in there
        place.parent.rmdir()


def containers(engine: Engine, lab_id: str) -> list[Container]:
    """The lab's containers: those that were deployed from its folder, whatever their names."""
    # One that goes while the list is made is no error.
    found = engine.client.containers.list(all=True, filters={"label": TOPOLOGY_FILE}, ignore_removed=True)
    place = f"{folder_of(lab_id)}/"
    return [container for container in found if container.labels.get(TOPOLOGY_FILE, "").startswith(place)]


def _kill(container: Container) -> None:
    with suppress(NotFound):
        try:
            container.remove(force=True, v=True)
        except APIError as error:
            if error.status_code != HTTPStatus.CONFLICT:  # it is being removed already
                raise


def sweep() -> list[str]:
    """Remove folders that no record speaks of, with their containers; returns the labs' ids. Raises LabError."""
    swept = []
    for place in sorted(folders().iterdir()) if folders().is_dir() else ():
        # Who makes a lab has written its record before its files.
        with suppress(LabBusyError), state.locked(place.name):
            if place.name in state.known_ids():
                continue
            engine = None
            with suppress(LabError):  # no engine, no containers
                engine = find_engine()
            if engine:
                remove(engine, place.name, complete=False)
            else:
                remove_files(place.name)
            swept.append(place.name)
    return swept
