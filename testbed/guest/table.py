"""What this machine's kernel and the guest can do, feature by feature, and which rows of the catalogue that lets run.

Nothing is built or booted for it: a guest that is not there yet is told as what it will have.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Set
from dataclasses import dataclass

from testbed.checks import KERNEL_NEEDS, Row, implemented, load_catalogue
from testbed.collecting import IPV6_NEEDED
from testbed.doctor import Diagnosis
from testbed.errors import LabError
from testbed.flannelspec import BACKENDS
from testbed.guest.build import Kernel, must_have
from testbed.guest.features import SYMBOLS
from testbed.guest.kernels import ready_kernel

LAB = "netns"
"""The lab whose rows these are."""


@dataclass(frozen=True, slots=True)
class Guest:
    """The guest that runs would get: the kernel that is there, or None and what one will have."""

    kernel: Kernel | None
    features: frozenset[str]
    words: str

    @property
    def ready(self) -> bool:
        """Whether it is there already."""
        return self.kernel is not None


def guest() -> Guest:
    """Look for the guest. What is wrong with one is said where it is used."""
    try:
        kernel = ready_kernel()
    except LabError:
        kernel = None
    if kernel:
        features = frozenset(SYMBOLS) - set(kernel.lacks)
        words = (
            f"guest kernel {kernel.version}, {kernel.built or kernel.path}; `testbed kernel check` proves what it has"
        )
        if kernel.way == "qemu":
            words += ". It is slow: a whole run takes patience, `testbed kernel run` and `check` do not"
        return Guest(kernel, features, words)
    asked = set(must_have())
    features = frozenset(feature for feature, symbols in SYMBOLS.items() if asked.issuperset(symbols))
    if platform.machine() == "x86_64":
        words = "no guest kernel yet: the first run that needs one builds it, or `testbed kernel build` ahead of time"
    else:
        words = (
            f"no guest yet, and on {platform.machine()} QEMU with Debian's kernel is the only one: the first use "
            "fetches it; without KVM it is slow, enough for `testbed kernel run` and `check`"
        )
    return Guest(None, features, words)


@dataclass(frozen=True, slots=True)
class Feature:
    """A feature of kernels: which runs need it, and who has it."""

    name: str
    needed_by: tuple[str, ...]
    host: bool
    guest: bool


def features(found: Diagnosis, there: Guest) -> tuple[Feature, ...]:
    """The table of features that the probe tries."""
    return tuple(
        Feature(finding.name, finding.needed_by, finding.ok, finding.name in there.features)
        for finding in found.findings
        if finding.kind == "kernel"
    )


@dataclass(frozen=True, slots=True)
class RunRows:
    """The rows of the catalogue that a run can check on this machine's kernel, and in the guest."""

    run: str
    host: tuple[str, ...]
    guest: tuple[str, ...]


def _runs(row: Row, run: str, features: Set[str]) -> bool:
    """Whether that run, with its usual options, can check a row on a kernel with these features."""
    if run not in row.backends:
        return False
    if not row.reason:
        return True
    return (row.needs in KERNEL_NEEDS and row.needs in features) or (row.needs == IPV6_NEEDED and BACKENDS[run].dual)


def rows(found: Diagnosis, there: Guest) -> tuple[RunRows, ...]:
    """Which rows each run can check where, by what the row declares and what its backend needs.

    What stops a run on this machine besides its kernel, such as a tool, stops it in the guest, too.
    """
    table = features(found, there)
    has = {
        "host": {feature.name for feature in table if feature.host},
        "guest": {feature.name for feature in table if feature.guest},
    }
    stopped = {
        run for finding in found.findings if finding.kind == "tool" and not finding.ok for run in finding.needed_by
    }
    written = implemented()
    catalogue = [row for row in load_catalogue().values() if row.id in written and LAB in row.lab]
    needs: Mapping[str, set[str]] = {
        run: {feature.name for feature in table if run in feature.needed_by} for run in BACKENDS
    }

    def can(run: str, where: str) -> tuple[str, ...]:
        backend_works = run not in stopped and needs[run] <= has[where]
        if where == "host":
            backend_works = backend_works and not found.reasons[run]
        if not backend_works or not BACKENDS[run].implemented:
            return ()
        return tuple(row.id for row in catalogue if _runs(row, run, has[where]))

    return tuple(RunRows(run, can(run, "host"), can(run, "guest")) for run in BACKENDS)
