"""Builds the guest kernel from Debian's source, once, and keeps it in the user's cache folder.

A build is named by a hash of the configuration, the source's version and the compiler.  It is made in a folder beside
its final place, under a lock, and renamed when it is whole; what a killed build left is removed by the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from testbed.errors import LabError
from testbed.guest.source import TESTED, GuestUnavailable, Source, fetch_source, unpack
from testbed.labs import Progress, Quiet

NEEDED_BYTES = 2 << 30
"""What a build takes in the cache folder while it runs; 14 MB of it stay."""

FULL_BYTES = 16 << 20
"""A build that fails with less than this left has filled the disk, whatever its compiler says."""

MORE_SPACE = "free some space there, or set XDG_CACHE_HOME to a folder with more"

OBJECTS = 1400
"""About how many files are compiled; only for telling how far a build is."""

#: Program → Debian's package.
PROGRAMS = {
    "gcc": "gcc",
    "make": "make",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "xz": "xz-utils",
    "strip": "binutils",
    "tar": "tar",
    "dpkg-deb": "dpkg",
}
HEADER = Path("/usr/include/stdio.h")


@dataclass(frozen=True, slots=True)
class Kernel:
    """A guest kernel that can be booted."""

    path: Path  # a program; for QEMU the folder of all that it boots
    version: str
    way: str  # "built", "given", "packaged" for Debian's user-mode-linux, or "qemu"
    built: str = ""  # from which source, by which compiler
    lacks: tuple[str, ...] = ()  # features, as the feature probe calls them


def cache_folder() -> Path:
    """Where guest kernels are kept. Raises GuestUnavailable where no such folder can be made."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = (Path(base) if base.startswith("/") else Path("~/.cache").expanduser()) / "testbed" / "guest-kernel"
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "it may not be written to", str(folder))
        if os.statvfs(folder).f_flag & os.ST_NOEXEC:
            raise PermissionError(13, "it is mounted noexec, and a kernel is a program", str(folder))
    except (OSError, RuntimeError) as error:
        raise GuestUnavailable(
            f"there is no folder to keep a guest kernel in: {error}", hint="set XDG_CACHE_HOME to a folder of yours"
        ) from None
    return folder


def configuration_folder() -> Path:
    """Where the kernel's configuration lies: in the installed package, or in a checkout. Raises LabError."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "guest-kernel", package.parent / "tools" / "guest-kernel"):
        if (candidate / "fragment").is_file():
            return candidate
    raise LabError("the guest kernel's configuration is missing", where=str(package), hint="install the test-bed again")


def fragment_settings(text: str) -> tuple[str, ...]:
    """The settings of a configuration fragment, without comments on them."""
    return tuple(
        line
        for line in text.splitlines()
        if line.startswith("CONFIG_") or re.fullmatch(r"# CONFIG_\w+ is not set", line)
    )


def must_have() -> tuple[str, ...]:
    """The symbols without which a guest kernel is no use."""
    text = (configuration_folder() / "must-have").read_text()
    return tuple(line.split()[0] for line in text.splitlines() if line.strip() and not line.startswith("#"))


def lacking(config: str, symbols: tuple[str, ...]) -> list[str]:
    """The symbols that a kernel's configuration does not have built in."""
    there = {line[7:-2] for line in config.splitlines() if line.startswith("CONFIG_") and line.endswith("=y")}
    return [symbol for symbol in symbols if symbol not in there]


def require_compiler() -> None:
    """Raise GuestUnavailable naming everything at once that a build needs and that is not here."""
    if platform.machine() != "x86_64":
        raise GuestUnavailable(
            f"user-mode-linux, which the guest kernel is, does not exist for {platform.machine()}",
            hint="QEMU is the one way to a guest here: `testbed kernel check --way qemu` tries it",
        )
    missing = {package for program, package in PROGRAMS.items() if shutil.which(program) is None}
    if not HEADER.exists():
        missing.add("libc6-dev")
    if missing:
        raise GuestUnavailable(
            "the guest kernel cannot be built: a compiler, or what goes with it, is missing here",
            hint=f"as root: apt-get install --no-install-recommends {' '.join(sorted(missing))}",
        )


def require_space(folder: Path, needed: int = NEEDED_BYTES, what: str = "building the guest kernel") -> None:
    """Raise GuestUnavailable where that would fill the disk; `needed` are bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise GuestUnavailable(
            f"{what} takes {needed >> 20} MiB for a while, and {free >> 20} MiB are free",
            where=str(folder),
            hint=MORE_SPACE,
        )


@contextmanager
def faults_of_disk(folder: Path, what: str) -> Iterator[None]:
    """What the disk refuses inside is a GuestUnavailable, which says what cannot be done for it."""
    try:
        yield
    except OSError as error:
        raise GuestUnavailable(f"{what}: {error.strerror or error}", where=str(folder), hint=MORE_SPACE) from error


def compiler() -> str:
    """The compiler by everything that changes what it makes."""
    done = subprocess.run(["gcc", "--version"], capture_output=True, text=True, check=False)
    return f"{done.stdout.splitlines()[0] if done.stdout else 'gcc'} {platform.machine()}"


def fingerprint(settings: tuple[str, ...], source: Source, built_by: str) -> str:
    """The name of a build in the cache."""
    parts = json.dumps([list(settings), source.package, source.version, built_by])
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


# --- the cache


def cached(folder: Path, settings: tuple[str, ...], built_by: str | None) -> Kernel | None:
    """The newest whole build of this configuration; a compiler that is gone does not spoil what it built."""
    found = []
    for record in folder.glob("*/build.json"):
        try:
            facts = json.loads(record.read_text())
            source = Source(facts["source"], facts["version"])
            program = record.parent / "linux"
            whole = hashlib.sha256(program.read_bytes()).hexdigest() == facts["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # half-written or spoilt: as if it were not there
        right = built_by is None or facts["compiler"] == built_by
        if whole and right and record.parent.name == fingerprint(settings, source, facts["compiler"]):
            found.append((source.series, facts["built_at"], Kernel(program, source.version, "built", _origin(facts))))
    found = [entry for entry in found if TESTED[0] <= entry[0] <= TESTED[1]]
    return max(found, key=lambda entry: entry[:2])[2] if found else None


def _origin(facts: Mapping[str, object]) -> str:
    return f"{facts['source']} {facts['version']}, {facts['compiler']}"


def find_built() -> Kernel | None:
    """The guest kernel that was built before; None where there is none. Needs neither network nor compiler."""
    built_by = compiler() if shutil.which("gcc") else None
    settings = fragment_settings((configuration_folder() / "fragment").read_text())
    return cached(cache_folder(), settings, built_by)


@contextmanager
def locked(folder: Path, progress: Progress) -> Iterator[None]:
    """Hold the right to change the cache; waits for whoever has it, and says so."""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with progress.step("Waiting for another command that builds the guest kernel"):
                fcntl.flock(lock, fcntl.LOCK_EX)
        for stale in (*folder.glob(".building-*"), *folder.glob(".fetching-*")):  # of commands that were killed
            shutil.rmtree(stale, ignore_errors=True)
        yield


# --- a build


def build(progress: Progress | None = None, *, again: bool = False) -> Kernel:
    """Return the guest kernel, built now unless it was before; `again` builds it even so.

    Raises GuestUnavailable where it cannot be built here (no compiler, no space, no source), LabError where its
    configuration or its build fails.
    """
    progress = progress or Quiet()
    require_compiler()
    folder = cache_folder()
    with locked(folder, progress):
        if not again and (kernel := find_built()):
            return kernel
        require_space(folder)
        with (
            faults_of_disk(folder, "the guest kernel cannot be built"),
            tempfile.TemporaryDirectory(prefix=".building-", dir=folder, ignore_cleanup_errors=True) as scratch,
        ):
            return _build_in(Path(scratch), folder, progress)


def _build_in(scratch: Path, folder: Path, progress: Progress) -> Kernel:
    fragment = configuration_folder() / "fragment"
    settings, built_by = fragment_settings(fragment.read_text()), compiler()
    source, package = fetch_source(scratch / "apt", progress)
    tree = scratch / "tree"
    with progress.step("Unpacking it"):
        unpack(package, source, tree)
        package.unlink()
    log = folder / "build.log"
    log.write_text(f"{source.package} {source.version}, {built_by}\n")
    with progress.step("Configuring the guest kernel"):
        configure(tree, fragment, log)
    with progress.step("Compiling the guest kernel, about 8 minutes on two free processors"):
        compile_kernel(tree, log, progress)
    program = tree / "linux"
    _make(["strip", str(program)], tree, log)
    program.chmod(0o755)
    result = scratch / "result"
    result.mkdir()
    program.rename(result / "linux")
    (tree / ".config").rename(result / "config")
    facts = {
        "schema": 1,
        "source": source.package,
        "version": source.version,
        "compiler": built_by,
        "sha256": hashlib.sha256((result / "linux").read_bytes()).hexdigest(),
        "built_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    (result / "build.json").write_text(json.dumps(facts, indent=1) + "\n")
    place = folder / fingerprint(settings, source, built_by)
    if place.exists():
        place.rename(scratch / "replaced")
    result.rename(place)
    return Kernel(place / "linux", source.version, "built", _origin(facts))


def _environment(tree: Path) -> dict[str, str]:
    # Whatever somebody set for other builds stays out of this one; the compiler's own files go where there is space.
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    own = {"TMPDIR": str(tree.parent), "KBUILD_BUILD_USER": "testbed", "KBUILD_BUILD_HOST": "testbed"}
    return {**kept, **own, "LC_ALL": "C.UTF-8"}


def _failed(what: str, log: Path) -> LabError:
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = log.read_text(errors="replace").splitlines()
    telling = [line for line in lines if re.search(r"error|Error|No space", line)] or lines
    if "No space left on device" in "\n".join(lines) or shutil.disk_usage(log.parent).free < FULL_BYTES:
        raise GuestUnavailable(f"{what}: the disk is full", where=str(log.parent), hint=MORE_SPACE)
    return LabError("\n".join([what, *telling[-8:]]), hint=f"all of its output is in {log}")


def _make(argv: list[str], tree: Path, log: Path, **variables: str) -> None:
    with log.open("a") as out:
        done = subprocess.run(
            argv,
            cwd=tree,
            env=_environment(tree) | variables,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            check=False,
        )
    if done.returncode:
        raise _failed(f"`{' '.join(argv[:3])}` failed while the guest kernel was built", log)


def configure(tree: Path, fragment: Path, log: Path) -> None:
    """Configure the source by the fragment. Raises LabError where something that is needed did not get in."""
    _make(["make", "ARCH=um", "allnoconfig"], tree, log, KCONFIG_ALLCONFIG=str(fragment))
    missing = lacking((tree / ".config").read_text(), must_have())
    if missing:
        raise LabError(
            f"this kernel source cannot be configured with {', '.join(missing)}, which the guest must have",
            where=str(fragment),
            hint="were they renamed? The fragment and the list beside it say why each is there",
        )


def compile_kernel(tree: Path, log: Path, progress: Progress) -> None:
    """Compile, telling of each tenth how long it took and where it is. Raises LabError where it fails."""
    jobs = max(1, len(os.sched_getaffinity(0)))
    # Whoever waits for a lab comes first.
    argv = ["nice", "-n", os.environ.get("TESTBED_BUILD_NICE", "15"), "setpriv", "--pdeathsig", "TERM", "--"]
    argv += ["make", "ARCH=um", f"-j{jobs}", "linux"]  # which ends those that it started
    with log.open("a") as out, contextlib.ExitStack() as stack:
        process = subprocess.Popen(
            argv,
            cwd=tree,
            env=_environment(tree),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=out,
            text=True,
        )
        stack.callback(_end, process)
        step = contextlib.ExitStack()
        stack.push(step)
        assert process.stdout
        compiled, shown = 0, -1
        for line in process.stdout:
            out.write(line)
            compiled += line.startswith("  CC ")
            tenth = min(9, compiled * 10 // OBJECTS)
            if tenth > shown and line.startswith("  CC "):
                shown = tenth
                step.close()
                step.enter_context(progress.step(f"{tenth * 10} %, at {line.split()[1].rpartition('/')[0]}"))
        step.close()
        code = process.wait()
    if code:
        raise _failed("the guest kernel does not compile", log)


def _end(process: subprocess.Popen[str]) -> None:
    """Where a build is interrupted, so is its compiler."""
    if process.poll() is None:
        process.terminate()
        process.wait()


def describe(kernel: Kernel) -> str:
    """One line about a kernel."""
    return f"{kernel.path} ({kernel.version}; {kernel.built or kernel.way})"
