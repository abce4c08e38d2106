"""A machine whose container's namespaces this user cannot enter: commands by `docker exec`, files by the archive calls.

It is for engines that are elsewhere, and for members of the group docker.  A command takes some 0.2 s.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from docker.errors import NotFound

from testbed.engine.find import ENGINE_ERRORS
from testbed.errors import LabError
from testbed.labs import interpreter
from testbed.labs.netnsnode import NetnsNode

MADE_UP = ("/proc/", "/sys/", "/dev/")
"""Where files are that an engine does not see: they are of the container's own mounts."""


def docker_program() -> str:
    """Docker's command line, for what the SDK has no half-closed streams for. Raises LabError."""
    found = shutil.which("docker")
    if found is None:
        raise LabError("there is no `docker` on this machine", hint="apt-get install docker.io (or docker-cli)")
    return found


@dataclass(frozen=True)
class FarNode(NetnsNode):
    """A machine of a containerlab lab, reached through its engine."""

    container: str = ""
    address: str = ""  # the engine's, as DOCKER_HOST has it
    client: Any = field(default=None, compare=False, repr=False)

    def entering(self, *, stay: bool = False) -> list[str]:
        """The words that put a command into this container, ended with whoever started it or not."""
        program = str(resources.files("testbed.labs").joinpath("relay.py"))
        # What the command finds in its environment is not what Docker's own program has to.
        own = [f"{key}={value}" for key, value in os.environ.items() if key.startswith(("DOCKER_", "HOME", "SSH_"))]
        docker = ["env", *own, docker_program(), "--host", self.address]
        far = [*docker, "exec", "-i", self.container, interpreter(), "-I", "-S", "-c"]
        return [sys.executable, "-I", "-S", program, "outer", *far, "--", *self.inner]

    def read(self, path: str) -> bytes:
        """Return a file of this node. Raises FileNotFoundError."""
        if path.startswith(MADE_UP):
            return super().read(path)
        try:
            pieces, _ = self.client.api.get_archive(self.container, path)
            with tarfile.open(fileobj=io.BytesIO(b"".join(pieces))) as archive:
                found = archive.extractfile(archive.next() or "")
                if found is not None:
                    return found.read()
        except NotFound as error:
            raise FileNotFoundError(f"{self.name}:{path}: No such file or directory") from error
        except KeyError:  # a link, and what it leads to is not in the archive
            return super().read(path)
        except ENGINE_ERRORS as error:
            raise LabError(f"{path} cannot be read: {error}", where=self.name) from error
        raise FileNotFoundError(f"{self.name}:{path}: no file")

    def write(self, path: str, data: bytes | str, *, mode: int = 0o644) -> None:
        """Write a file on this node, making its folder where it is missing."""
        content = data.encode() if isinstance(data, str) else data
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            info = tarfile.TarInfo(Path(path).name)
            info.size, info.mode = len(content), mode
            archive.addfile(info, io.BytesIO(content))
        folder = str(Path(path).parent)
        try:
            try:
                self.client.api.put_archive(self.container, folder, buffer.getvalue())
            except NotFound:
                self.run(["mkdir", "-p", folder])
                self.client.api.put_archive(self.container, folder, buffer.getvalue())
        except ENGINE_ERRORS as error:
            raise LabError(f"{path} cannot be written: {error}", where=self.name) from error

    def interactive(self, argv: Sequence[str]) -> int:
        """Run a command on the caller's own terminal; returns its exit code."""
        terminal = "-it" if sys.stdin.isatty() else "-i"
        words = [docker_program(), "--host", self.address, "exec", terminal, self.container]
        return subprocess.run([*words, *self.inner, *self.via, *argv], check=False).returncode
