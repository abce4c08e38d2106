"""Which kernel a run's lab is on, and the run in a guest: only its inner pytest is in there."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from testbed.checks import KERNEL_NEEDS, load_catalogue
from testbed.console import Ticks
from testbed.doctor import diagnose, search_path
from testbed.errors import Exit, InputError
from testbed.flannelspec import BACKENDS
from testbed.guest.build import Kernel
from testbed.guest.kernels import obtain_kernel, ready_kernel
from testbed.guest.run import run as run_in_guest
from testbed.guest.source import GuestUnavailable
from testbed.options import IN_GUEST, KERNELS
from testbed.report.parts import VARIABLE
from testbed.tools import build_tool, variable_of

__all__ = ["IN_GUEST", "VARIABLE", "choose", "in_guest", "lacking", "value_of", "without"]


def value_of(option: str, options: Sequence[str]) -> str | None:
    """The last value given to an option, written `--option VALUE` or `--option=VALUE`; None where there is none."""
    return next(reversed(values_of(option, options)), None)


def values_of(option: str, options: Sequence[str]) -> list[str]:
    """Every value given to an option that may be given several times, in order."""
    found = []
    for position, word in enumerate(options):
        if word == option and position + 1 < len(options):
            found.append(options[position + 1])
        elif word.startswith(f"{option}="):
            found.append(word.partition("=")[2])
    return found


def without(option: str, options: Sequence[str]) -> list[str]:
    """The options but for that one and its value."""
    kept: list[str] = []
    skip = False
    for word in options:
        if skip or word.startswith(f"{option}="):
            skip = False
        elif word == option:
            skip = True
        else:
            kept.append(word)
    return kept


def topology_features(options: Sequence[str]) -> tuple[str, ...]:
    """What a run's topology takes of the kernel beside what every lab does: netem for its links' faults, say."""
    name = value_of("--topology", options)
    if name is None:
        return ()  # the backends' own take nothing more
    from testbed.topology import load_topology

    settings = [word.partition("=") for word in values_of("--set", options)]
    try:
        overrides = {key: value for key, _, value in settings}
        return load_topology(name, "features", overrides=overrides).kernel_features
    except InputError:
        return ()  # the run itself says what is wrong


def lacking(run: str, features: Sequence[str] = ()) -> tuple[str, ...]:
    """What this machine's kernel lacks of what a run's backend needs and of these features, found out by using it."""
    return tuple(
        finding.name
        for finding in diagnose().findings
        if finding.kind == "kernel" and not finding.ok and (run in finding.needed_by or finding.name in features)
    )


def checked_kernel(options: Sequence[str]) -> str:
    """The kernel that is asked for. Raises InputError for one that is none."""
    wanted = value_of("--kernel", options) or "auto"
    if wanted not in KERNELS:
        raise InputError(f"{wanted!r} is no kernel", where="--kernel", hint=f"one of {', '.join(KERNELS)}")
    return wanted


def choose(run: str, options: Sequence[str]) -> str:
    """The kernel that a run's lab is on, "host" or "guest", by what was asked for and what this machine lacks.

    Raises InputError where a kernel is asked for that there is not.
    """
    wanted = checked_kernel(options)
    if os.environ.get(IN_GUEST):
        return "host"  # this is the guest
    if wanted != "auto" or (value_of("--lab", options) or "netns") != "netns":
        return "guest" if wanted == "guest" else "host"
    missing = lacking(run, topology_features(options))
    if missing:
        click.echo(f"this machine's kernel lacks {', '.join(missing)}: {run} runs in the guest kernel", err=True)
    return "guest" if missing else "host"


SLOWER = {"packaged": {"TESTBED_TIME_SCALE": "3"}, "qemu": {"TESTBED_TIME_SCALE": "10"}}
"""What deadlines are multiplied by in guests that are slower than the one that is built here."""


def needs(run: str, options: Sequence[str]) -> tuple[str, ...]:
    """The features that a run needs of a guest kernel: for its backend, its rules and its topology."""
    asked = "EnableNFTables=true" in values_of("--net-conf", options)
    rules = (value_of("--rules", options) or ("nftables" if asked else "iptables-nft")).replace("-", "_")
    return (*BACKENDS[run].kernel_features, rules, *topology_features(options))


def environment(kernel: Kernel) -> dict[str, str]:
    """What a run in that guest finds in its environment."""
    # The caller's record of labs is not the guest's root's own, and its labs end with it.
    own = {IN_GUEST: kernel.version, "PATH": search_path(), "TESTBED_STATE": "/run/testbed"}
    return {**SLOWER.get(kernel.way, {}), **os.environ, **own}


def refuse_what_guests_cannot(options: Sequence[str]) -> None:
    """Raise InputError for an option that makes no sense in a guest."""
    if "--keep" in options:
        raise InputError("a lab ends with its guest, so it cannot be kept", where="--keep", hint="--kernel host")
    if (value_of("--lab", options) or "netns") != "netns":
        what = "containers run on this machine's kernel, not in a guest of it"
        raise InputError(what, where="--kernel guest", hint="--kernel host, or --lab netns")


def kernel_for(run: str, options: Sequence[str]) -> Kernel:
    """The guest kernel for a run, built now where it has to be. Raises LabError where there is no way to one."""
    kernel = obtain_kernel(Ticks(), needs=needs(run, options))
    if kernel.lacks:
        click.echo(f"the guest kernel {kernel.version} has no {', '.join(kernel.lacks)}", err=True)
    return kernel


def named_paths(options: Sequence[str]) -> list[Path]:
    """The files and folders that options name, as far as they are there."""
    # os.path, since an expression of -k may be longer than a name can be, which Path.exists() takes for an error.
    return [Path(path) for path in (word.rpartition("=")[2] for word in options) if os.path.exists(path)]  # noqa: PTH110


def in_guest(run: str, options: Sequence[str], kernel: Kernel, part: Path) -> int:
    """Run a backend's checks in a guest, which writes that part of the report; returns pytest's exit code.

    Raises LabError where the guest cannot be started or dies.
    """
    inner = [*without("--kernel", options), "--kernel", "guest"]
    # Built out here: what is built in a guest ends with it, and root's guest cannot look into root's cache.
    tools = [("kubernetes", build_tool("kubernetes"))] if value_of("--store", options) == "kubernetes" else []
    code = run_in_guest(
        [sys.executable, "-m", "testbed", "run", run, "--", *inner],
        kernel=kernel.path,
        writable=[part],
        readable=[*named_paths(options), *(path for _, path in tools)],
        env={**environment(kernel), VARIABLE: str(part), **{variable_of(name): str(path) for name, path in tools}},
    )
    return code if code < 128 or code == Exit.INTERRUPTED else int(Exit.LAB)


def deferrable(run: str, options: Sequence[str]) -> tuple[str, ...]:
    """The features that checks of a run need of their own and this machine's kernel lacks.

    None where all of the run is to be on this kernel, or no guest kernel is there, or only a slow one: for a few checks
    none is built, and no whole lab brought up in QEMU.
    """
    if (value_of("--kernel", options) or "auto") != "auto" or (value_of("--lab", options) or "netns") != "netns":
        return ()
    wanted = {row.needs for row in load_catalogue().values() if run in row.backends and row.needs in KERNEL_NEEDS}
    missing = lacking("", sorted(wanted)) if wanted else ()
    try:
        kernel = ready_kernel((*needs(run, options), *missing)) if missing else None
    except GuestUnavailable:
        return ()  # the run itself can do without
    return missing if kernel and kernel.way not in SLOWER else ()
