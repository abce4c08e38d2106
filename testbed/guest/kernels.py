"""Which guest kernel is used: the ways to one, in order, and why each was not taken."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

from testbed.errors import InputError, LabError
from testbed.guest.build import Kernel, build, find_built
from testbed.guest.packaged import find_packaged, obtain_packaged, user_mode_linux
from testbed.guest.qemu import find_qemu, machine_in, obtain_qemu
from testbed.guest.source import GuestUnavailable
from testbed.labs import Progress, Quiet

VARIABLE = "TESTBED_GUEST_KERNEL"
"""The path of a guest kernel that somebody brings along, for machines that cannot build one."""


def given() -> Kernel | None:
    """The kernel that the environment names: user-mode-linux, or a folder that QEMU boots from.

    Raises GuestUnavailable where it is neither.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return None
    if not os.access(path, os.X_OK):
        raise GuestUnavailable(f"{VARIABLE} names no program: {path}", hint=f"unset {VARIABLE}, or mend it")
    place = Path(path).resolve()
    kernel = machine_in(place) if place.is_dir() else user_mode_linux(place)
    if kernel is None:
        raise GuestUnavailable(f"{VARIABLE} names no guest kernel: {path}", hint=f"unset {VARIABLE}, or mend it")
    if kernel.way == "qemu" or (place.parent.parent / "lib" / "uml" / "modules").is_dir():
        return kernel  # Debian's, wherever it was unpacked
    return replace(kernel, way="given", built=f"given by {VARIABLE}")


def _uml(progress: Progress) -> Kernel:
    return find_built() or build(progress)


def _packaged(progress: Progress) -> Kernel:
    return obtain_packaged(progress)


def _qemu(progress: Progress) -> Kernel:
    return obtain_qemu(progress)


WAYS: Mapping[str, Callable[[Progress], Kernel]] = {"uml": _uml, "packaged": _packaged, "qemu": _qemu}
"""Each way to a guest kernel, the best first: built here, Debian's user-mode-linux, QEMU with Debian's kernel."""

WORDS = {
    "uml": "user-mode-linux, built from Debian's source",
    "packaged": "Debian's package user-mode-linux",
    "qemu": "QEMU with Debian's kernel",
}


def known_way(way: str) -> str:
    """Check the name of a way. Raises InputError."""
    if way not in WAYS:
        raise InputError(f"{way!r} is no way to a guest kernel", where="--way", hint=f"one of {', '.join(WAYS)}")
    return way


def ready_kernel(needs: Collection[str] = ()) -> Kernel | None:
    """The kernel that would be used, if it is there already; nothing is built or fetched."""
    for find in (given, find_built, find_packaged, find_qemu):
        kernel = find()
        if kernel and not set(needs) & set(kernel.lacks):
            return kernel
    return None


def obtain_kernel(progress: Progress | None = None, *, way: str = "", needs: Collection[str] = ()) -> Kernel:
    """Return a guest kernel, by that way or else by the first that works, built or fetched where it was not before.

    `needs` are features of the feature probe: a kernel that lacks one of them is not taken.
    Raises GuestUnavailable with what closes each of the ways, InputError for a way that there is not.
    """
    progress = progress or Quiet()
    if way:
        return _with(WAYS[known_way(way)](progress), needs)
    if kernel := given() or find_built():
        return _with(kernel, needs)
    faults: dict[str, LabError] = {}
    for name, obtain in WAYS.items():
        try:
            kernel = _with(obtain(progress), needs)
        except LabError as error:
            faults[name] = error
            continue
        if faults:
            with progress.step(f"Taking {WORDS[name]}, {kernel.version}: {_first_line(next(iter(faults.values())))}"):
                pass
        return kernel
    lines = [f"{WORDS[name]}: {_first_line(error)}" for name, error in faults.items()]
    hints = dict.fromkeys(error.hint for error in faults.values() if error.hint)
    raise GuestUnavailable("\n".join(["there is no way to a guest kernel here", *lines]), hint="; or ".join(hints))


def _with(kernel: Kernel, needs: Collection[str]) -> Kernel:
    missing = [feature for feature in kernel.lacks if feature in needs]
    if missing:
        hint = "`testbed kernel build` makes one that has everything"
        if missing == ["iptables_nft"] and "iptables_legacy" not in kernel.lacks:
            hint += "; or --rules iptables-legacy"
        words = f"the guest kernel {kernel.version} ({kernel.built or kernel.path}) has no {', '.join(missing)}"
        raise GuestUnavailable(words, hint=hint)
    return kernel


def _first_line(error: LabError) -> str:
    return error.what.splitlines()[0]
