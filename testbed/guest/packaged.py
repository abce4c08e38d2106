"""Debian's own user-mode-linux: older and slower than the kernel that is built here, and without some features.

It is taken from PATH, or its package is unpacked into the user's cache folder, without being installed.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from testbed.guest.build import Kernel, cache_folder, faults_of_disk, locked, require_space
from testbed.guest.features import lacking_features
from testbed.guest.source import Apt, GuestUnavailable, debian_suites, unpack_package
from testbed.labs import Progress, Quiet

PACKAGE = "user-mode-linux"
PROGRAM = "linux.uml"
NEEDED_BYTES = 256 << 20


def user_mode_linux(path: Path) -> Kernel | None:
    """The kernel at that path, with what it lacks by its configuration; None where it does not run here."""
    said = []
    for option in ("--version", "--showconfig"):
        try:
            done = subprocess.run([path, option], capture_output=True, text=True, check=False, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        said.append(done.stdout if done.returncode == 0 else "")
    version, config = said
    if "CONFIG_" not in config:
        return None
    lacks = lacking_features(config)
    return Kernel(path.resolve(), version.strip() or "unknown", "packaged", f"package {PACKAGE}", lacks)


def find_packaged() -> Kernel | None:
    """The kernel that is installed, or was unpacked before; None where there is none."""
    installed = shutil.which(PROGRAM)
    if installed:
        return user_mode_linux(Path(installed))
    try:
        places = sorted(cache_folder().glob(f"packaged-*/usr/bin/{PROGRAM}"))
    except GuestUnavailable:
        return None
    return user_mode_linux(places[-1]) if places else None


def obtain_packaged(progress: Progress | None = None) -> Kernel:
    """Return Debian's guest kernel, fetched now unless it is here. Raises GuestUnavailable where it cannot be had."""
    if platform.machine() != "x86_64":
        raise GuestUnavailable(
            f"Debian has no {PACKAGE} for {platform.machine()}", hint="QEMU is the one way to a guest here"
        )
    if kernel := find_packaged():
        return kernel
    progress = progress or Quiet()
    folder = cache_folder()
    require_space(folder, NEEDED_BYTES, f"fetching Debian's {PACKAGE}")
    with locked(folder, progress), faults_of_disk(folder, f"Debian's {PACKAGE} cannot be fetched"):
        return find_packaged() or _fetch(folder, progress)


def _fetch(folder: Path, progress: Progress) -> Kernel:
    faults: list[GuestUnavailable] = []
    for suite in debian_suites():
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder) as name:
            scratch = Path(name)
            try:
                with progress.step(f"Fetching Debian's {PACKAGE} of {suite}, 41 MB"):
                    apt = Apt(scratch / "apt", suite)
                    apt.update()
                    version = apt.shown(PACKAGE, "Version")
                    unpack_package(apt.download(PACKAGE), scratch / "root")
            except GuestUnavailable as error:
                faults.append(error)
                continue
            if kernel := user_mode_linux(scratch / "root" / "usr" / "bin" / PROGRAM):
                place = folder / f"packaged-{version}"
                shutil.rmtree(place, ignore_errors=True)
                (scratch / "root").rename(place)
                return Kernel(place / "usr" / "bin" / PROGRAM, kernel.version, kernel.way, kernel.built, kernel.lacks)
            faults.append(GuestUnavailable(f"Debian's {PACKAGE} of {suite} does not start here", hint="see its words"))
    raise GuestUnavailable("\n".join(dict.fromkeys(fault.what for fault in faults)), hint=faults[0].hint)
