"""The containerlab binary: found or built, its version checked, run where it changes nothing of this machine."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from testbed.engine.find import Engine
from testbed.errors import LabError
from testbed.labs import interpreter
from testbed.render import CLAB
from testbed.tools import build_tool

OLDEST = (0, 64)
"""The first version whose links take a MAC and an MTU, and whose management network is made only where it is used."""

DEPLOY_SECONDS = 300.0
WORKERS = 16
SAID_TAIL = 3000


@dataclass(frozen=True, slots=True)
class Containerlab:
    """A containerlab that was found; `version` is "" for one that does not say it."""

    path: Path
    version: str

    def deploy(self, folder: Path, engine: Engine, lock: int) -> None:
        """Deploy the rendered topology of a folder; it holds the descriptor `lock` as long as any part of it runs.

        Raises LabError with what containerlab said.
        """
        self._run(folder, engine, lock, "deploy", "--max-workers", str(WORKERS), "--skip-post-deploy")

    def destroy(self, folder: Path, engine: Engine, lock: int) -> None:
        """Remove what was deployed from a folder; `lock` as for `deploy`. Raises LabError as it does."""
        self._run(folder, engine, lock, "destroy", "--cleanup", "--max-workers", str(WORKERS))

    def _run(self, folder: Path, engine: Engine, lock: int, *words: str) -> None:
        program = resources.files("testbed.clab").joinpath("box.py").read_text()
        # It ends with this process, or what it goes on to make would be nobody's.
        tied = ("setpriv", "--pdeathsig", "KILL", "--")
        argv = [
            *((*tied, *engine.private.entering(), *tied) if engine.private else tied),
            *(interpreter(), "-I", "-S", "-c", program, str(folder)),
            *(str(self.path), *words, "--topo", str(folder / CLAB), "--log-level", "warn"),
        ]
        env = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(folder),
            "DOCKER_HOST": engine.address,
            "CLAB_VERSION_CHECK": "disable",
            "CLAB_LABDIR_BASE": str(folder),
        }
        try:
            done = subprocess.run(
                argv, env=env, capture_output=True, text=True, timeout=DEPLOY_SECONDS, check=False, pass_fds=[lock]
            )
        except subprocess.TimeoutExpired as error:
            raise LabError(
                f"`containerlab {words[0]}` took more than {DEPLOY_SECONDS:.0f} s", where=str(folder)
            ) from error
        if done.returncode:
            said = "\n".join(line for line in (done.stderr + done.stdout).splitlines() if line.strip())
            raise LabError(f"`containerlab {words[0]}` failed with {done.returncode}\n{said[-SAID_TAIL:]}")


def find_containerlab() -> Containerlab:
    """The containerlab on PATH, or the one that this project pins, built once.

    Raises LabError where there is none and none can be built, or where the one on PATH is too old.
    """
    found = shutil.which("containerlab")
    path = Path(found) if found else build_tool("containerlab")
    return Containerlab(path, _checked_version(path))


def _checked_version(path: Path) -> str:
    try:
        done = subprocess.run(
            [str(path), "version"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            env={"CLAB_VERSION_CHECK": "disable", "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LabError(f"containerlab cannot be run: {error}", where=str(path)) from error
    match = re.search(r"^\s*version:\s*v?(\d+)\.(\d+)\.(\d+)", done.stdout, re.MULTILINE)
    if match is None:
        said = (done.stderr or done.stdout).strip()[:300]
        raise LabError(f"this is no containerlab: its version says {said!r}", where=str(path))
    version = tuple(map(int, match.groups()))
    if version[:2] < OLDEST:
        raise LabError(
            f"containerlab {'.'.join(map(str, version))} is too old",
            where=str(path),
            hint=f"{'.'.join(map(str, OLDEST))} or newer; taken off PATH, the one that this project pins is built",
        )
    return ".".join(map(str, version))
