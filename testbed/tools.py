"""Builds outside programs that no package has, from their Go modules pinned in `tools/`; each is built once."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from testbed.errors import LabError

BUILD_SECONDS = 1800.0


class ToolUnavailable(LabError):
    """The tool cannot be built here: Go is missing, its modules cannot be had, or this is no checkout."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A program: the folder of `tools/` that pins it, its package, and what the linker is told."""

    folder: str
    package: str
    linker: tuple[str, ...] = ()


TOOLS = {
    "containerlab": Tool(
        "containerlab",
        "github.com/srl-labs/containerlab",
        # Its own build writes its version so; without it, it takes itself for 0.0.0.
        ("-s", "-w", "-X=github.com/srl-labs/containerlab/cmd.Version=0.79.0"),
    ),
    "kind": Tool("kind", "sigs.k8s.io/kind"),
    "kindcheck": Tool("kind", "."),
    "kubernetes": Tool(
        "kubernetes",
        ".",
        (
            *("-s", "-w"),  # a third less to copy into a lab
            # Kubernetes' own build writes its version so; without it the API server takes itself for 0.0.0.
            "-X=k8s.io/component-base/version.gitVersion=v1.36.3",
            "-X=k8s.io/component-base/version.gitMajor=1",
            "-X=k8s.io/component-base/version.gitMinor=36",
        ),
    ),
}


def build_tool(name: str) -> Path:
    """Return the program of that name (one of `TOOLS`), built now unless it was before.

    A build is kept under $XDG_CACHE_HOME/testbed/tools by a hash of its sources, pins and compiler; one that
    TESTBED_NAME names was built elsewhere.
    Raises ToolUnavailable where it cannot be built here, LabError where its build fails.
    """
    if named := _named(name):
        return named
    program, go, source = _place(name)
    if program.exists():
        return program
    with (program.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():  # someone else may have built it while this one waited
            _build(go, source, TOOLS[name], program)
    return program


def built_tool(name: str) -> Path | None:
    """The program of that name as it was built before; None where it would have to be built now.

    Raises ToolUnavailable where it cannot be built here.
    """
    if named := _named(name):
        return named
    program, _, _ = _place(name)
    return program if program.exists() else None


def variable_of(name: str) -> str:
    """The variable that names a tool's program where it was built elsewhere, such as outside of a guest."""
    return f"TESTBED_{name.upper()}"


def _named(name: str) -> Path | None:
    """The program that the environment names. Raises ToolUnavailable where that is none."""
    given = os.environ.get(variable_of(name), "")
    if given and not os.access(given, os.X_OK):
        raise ToolUnavailable(f"there is no program {given}", where=variable_of(name))
    return Path(given) if given else None


def _place(name: str) -> tuple[Path, str, Path]:
    """Where a program is kept, what Go it is built with, and where its module is. Raises ToolUnavailable."""
    tool = TOOLS[name]
    source = Path(__file__).resolve().parent.parent / "tools" / tool.folder
    if not (source / "go.mod").is_file():
        raise ToolUnavailable(f"{name} is built from a checkout, which this is not", where=str(source))
    go = shutil.which("go")
    if go is None:
        raise ToolUnavailable(f"{name} is built with Go, which is missing", hint="install golang-go, or Go from go.dev")
    cache = _cache()
    return cache / f"{name}-{_fingerprint(go, source, tool)}", go, source


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = (Path(base) if base.startswith("/") else Path("~/.cache").expanduser()) / "testbed" / "tools"
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} cannot be written")
    except (OSError, RuntimeError) as error:
        raise ToolUnavailable(
            f"no folder for builds: {error}", hint="set XDG_CACHE_HOME to a folder of yours"
        ) from None
    return folder


def _environment() -> dict[str, str]:
    # One compiler, the one that is here; and no C, so that a build depends on no header of this machine.
    return {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly -trimpath", "GOWORK": "off"}


def _go(go: str, source: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Builds take minutes of both processors, and whoever waits for a lab comes first.
    argv = ["nice", "-n", os.environ.get("TESTBED_BUILD_NICE", "19"), go, *arguments]
    try:
        return subprocess.run(
            argv, cwd=source, env=_environment(), capture_output=True, text=True, timeout=BUILD_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise ToolUnavailable(f"`go {arguments[0]}` took more than {BUILD_SECONDS:.0f} s", where=str(source)) from None


def _fingerprint(go: str, source: Path, tool: Tool) -> str:
    digest = hashlib.sha256(
        f"{tool.package}{' '.join(tool.linker)}\n{_go(go, source, 'env', 'GOVERSION', 'GOARCH').stdout}".encode()
    )
    for path in sorted([*source.glob("*.go"), source / "go.mod", source / "go.sum"]):
        digest.update(f"{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _build(go: str, source: Path, tool: Tool, program: Path) -> None:
    # Loading the packages fetches their modules, so what fails here is the network or the pins, not the build.
    loaded = _go(go, source, "list", "-deps", tool.package)
    if loaded.returncode != 0:
        hint = "its Go modules have to be downloaded once"
        raise ToolUnavailable(f"{program.name} cannot be had: {loaded.stderr.strip()[-1000:]}", hint=hint)
    number, aside = tempfile.mkstemp(dir=program.parent, prefix=f".{program.name}.")
    os.close(number)
    try:
        built = _go(go, source, "build", "-ldflags", " ".join(tool.linker), "-o", aside, tool.package)
        if built.returncode != 0:
            raise LabError(f"{tool.package} does not build: {built.stderr.strip()[-2000:]}", where=str(source))
        Path(aside).chmod(0o755)
        Path(aside).replace(program)
    finally:
        Path(aside).unlink(missing_ok=True)
