"""Every lab kind by its name: bringing up, finding again, taking down.

A kind's own module is imported when it is used: the Docker SDK alone would double a command's start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from testbed.errors import LabError
from testbed.labs import Progress, netns, state
from testbed.labs.netns import NetnsLab
from testbed.model import LabSpec

if TYPE_CHECKING:
    from testbed.labs.clab import ClabLab

AnyLab: TypeAlias = "NetnsLab | ClabLab"


def bring_up(
    kind: str, spec: LabSpec, *, progress: Progress | None = None, image: str = "", image_prefix: str = ""
) -> AnyLab:
    """Make a lab of that kind and check its wiring; see each kind's own. Images are of machines that have one."""
    if kind == "clab":
        from testbed.labs import clab

        return clab.bring_up(spec, progress=progress, image=image, image_prefix=image_prefix)
    return netns.bring_up(spec, progress=progress)


def lab_of(record: state.LabRecord) -> AnyLab:
    """The lab of a record. Raises LabError where what it runs on is gone or unwell."""
    if record.kind == "clab":
        from testbed.labs import clab

        return clab.open_record(record)
    return NetnsLab(record)


def open_lab(lab_id: str) -> AnyLab:
    """Return a lab that was brought up earlier. Raises LabError where there is none."""
    record = state.read_record(lab_id)
    if record is None or not record.holder.alive:
        others = [name for name in state.known_ids() if name != lab_id]
        known = f"labs that are up: {', '.join(others)}" if others else "no lab is up; `testbed up` makes one"
        raise LabError(f"lab {lab_id} is not up", hint=known)
    return lab_of(record)


def remove(record: state.LabRecord) -> None:
    """Remove a lab, however far it came and whatever is left of it. Raises LabError."""
    if record.kind == "clab":
        from testbed.labs import clab

        clab.remove_record(record)
    else:
        NetnsLab(record).down()


def down_all() -> list[str]:
    """Remove every lab of this user, dead or alive, and what killed commands left; returns the labs' ids."""
    removed, errors = [], []
    for lab_id in state.known_ids():
        try:
            record = state.read_record(lab_id)
        except LabError:
            state.salvage(lab_id)
            removed.append(lab_id)
            continue
        try:
            if record:
                remove(record)
                removed.append(lab_id)
        except LabError as error:  # the others can go all the same
            errors.append(error)
    if (state.state_folder() / "clab").exists():
        from testbed.clab import remains

        removed += remains.sweep()
    state.sweep()
    if errors:
        raise errors[0]
    return removed
