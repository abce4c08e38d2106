"""Which guest kernel is used: the ways to one, in order, and why each was not taken."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from testbed.guest.build import Kernel, build, find_built
from testbed.guest.source import GuestUnavailable
from testbed.labs import Progress, Quiet

VARIABLE = "TESTBED_GUEST_KERNEL"
"""The path of a guest kernel that somebody brings along, for machines that cannot build one."""


def given() -> Kernel | None:
    """The kernel that the environment names. Raises GuestUnavailable where that is no program."""
    path = os.environ.get(VARIABLE)
    if not path:
        return None
    if not os.access(path, os.X_OK):
        raise GuestUnavailable(f"{VARIABLE} names no program: {path}", hint=f"unset {VARIABLE}, or mend it")
    return Kernel(Path(path).resolve(), "given", "given")


def debian() -> Kernel | None:
    """Debian's own user-mode-linux, older and slower, and without wireguard and nftables; None where it is missing."""
    path = shutil.which("linux.uml")
    if path is None:
        return None
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return Kernel(Path(path).resolve(), done.stdout.strip() or "unknown", "debian", "package user-mode-linux")


def ready_kernel() -> Kernel | None:
    """The kernel that would be used, if it is there already; nothing is built."""
    return given() or find_built() or debian()


def obtain_kernel(progress: Progress | None = None) -> Kernel:
    """Return a guest kernel by the first way that works, building it where it was not before.

    Raises GuestUnavailable with what closes each of the ways, LabError where a build fails half-way.
    """
    progress = progress or Quiet()
    kernel = given() or find_built()
    if kernel:
        return kernel
    try:
        return build(progress)
    except GuestUnavailable as error:
        packaged = debian()
        if packaged is None:
            hint = f"{error.hint}; or, for the runs that it can do, Debian's: apt-get install user-mode-linux"
            raise GuestUnavailable(error.what, where=error.where, hint=hint) from error
        with progress.step(f"Taking Debian's user-mode-linux {packaged.version}: {error.what.splitlines()[0]}"):
            return packaged
