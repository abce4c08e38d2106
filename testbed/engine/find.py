"""Which Docker engine labs of containers run on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import docker
from docker.errors import DockerException
from requests.exceptions import RequestException

from testbed.engine import private
from testbed.errors import LabError

DEFAULT_SOCKET = Path("/var/run/docker.sock")
ENGINE_ERRORS = (DockerException, RequestException)
"""What the SDK raises where an engine refuses something, or has gone."""

UP_HINT = "`testbed engine up` starts a private one, which needs root and Debian's docker.io"


FAR = "TESTBED_ENGINE_FAR"
"""Set in the environment, every engine is taken for one that is elsewhere; for tests."""


@dataclass(frozen=True)
class Engine:
    """An engine that answers."""

    address: str  # as DOCKER_HOST has it
    client: docker.DockerClient
    private: private.PrivateEngine | None

    @property
    def local(self) -> bool:
        """Whether its containers' processes are this kernel's, and this user may enter their namespaces."""
        return FAR not in os.environ and self.address.startswith("unix://") and os.geteuid() == 0 and self._same_kernel

    @property
    def room(self) -> int | None:
        """Bytes that are left where it keeps images and containers; None where that cannot be seen from here."""
        folder = str(self._info["DockerRootDir"])
        try:
            # As the engine sees it, whose mounts may be others than ours.
            seen = os.statvfs(f"/proc/{self.private.holder.pid}/root{folder}" if self.private else folder)
        except OSError:
            return None
        return seen.f_bavail * seen.f_frsize if self.local else None

    @property
    def _same_kernel(self) -> bool:
        return bool(self._info["KernelVersion"] == os.uname().release)

    @cached_property
    def _info(self) -> dict[str, Any]:
        """What it says of itself, which takes it a while."""
        return dict(self.client.info())


def find_engine(address: str | None = None) -> Engine:
    """The engine of that address, else that which DOCKER_HOST names, else the private one, else the machine's.

    Raises LabError where none answers, or where this user may not speak with it.
    """
    own = private.running()
    named = address or os.environ.get("DOCKER_HOST")
    if named:
        address, mine = named, own if own and named == own.address else None
    elif own:
        address, mine = own.address, own
    else:
        address, mine = f"unix://{DEFAULT_SOCKET}", None
    _look_at_socket(address)
    try:
        client = docker.DockerClient(base_url=address, version="auto", timeout=60)
        client.ping()
    except ENGINE_ERRORS as error:
        raise LabError(f"no Docker engine answers at {address}: {_first_line(error)}", hint=UP_HINT) from error
    return Engine(address, client, mine)


def _look_at_socket(address: str) -> None:
    """Say what the SDK says in many words."""
    if not address.startswith("unix://"):
        return
    path = Path(address.removeprefix("unix://"))
    if not path.exists():
        raise LabError(f"no Docker engine runs here: there is no {path}", hint=UP_HINT)
    if not os.access(path, os.R_OK | os.W_OK):
        raise LabError(
            f"no rights to the Docker engine's socket {path}",
            hint="sudo, or be a member of its group: `sudo usermod -aG docker $USER`, then log in again",
        )


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:300]
