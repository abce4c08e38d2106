"""Which images there are, and how each comes into an engine: made here, pulled, or imported from an archive."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import docker
from docker.errors import APIError, ImageNotFound

from testbed.engine.find import ENGINE_ERRORS
from testbed.errors import InputError, LabError
from testbed.images.packages import self_contained
from testbed.images.root import INIT, host_root

REPOSITORY = "testbed-node"
LABEL = "testbed.image"

ROOM_HINT = "is there room where the engine keeps its images? `df`, or TESTBED_ENGINE_DATA for a private one"

CHANGES = (f'CMD ["/bin/bash", "{INIT}"]', "ENV LANG=C.UTF-8")
"""What an image is told besides its files."""


@dataclass(frozen=True, slots=True)
class ImageKind:
    """One way to make a machine's image."""

    name: str
    about: str
    make: Callable[[], bytes]
    binds: tuple[str, ...] = ()  # what a container of it has to see of the host, as containerlab writes it

    @property
    def tag(self) -> str:
        """The image's name in an engine: another one for other contents."""
        return f"{REPOSITORY}:{self.name}-{hashlib.sha256(archive(self.name)).hexdigest()[:12]}"


KINDS = {
    kind.name: kind
    for kind in (
        ImageKind(
            "host", "an almost empty root; programs are this host's /usr, read-only", host_root, ("/usr:/usr:ro",)
        ),
        ImageKind("full", "self-contained: the files of the Debian packages that a machine needs", self_contained),
    )
}


def kind_of(name: str) -> ImageKind:
    """The image of that name. Raises InputError naming those there are."""
    if name not in KINDS:
        raise InputError(f"there is no image {name!r}", hint=f"one of {', '.join(KINDS)}")
    return KINDS[name]


@cache
def archive(name: str) -> bytes:
    """The root file system of an image as a tar archive; the same bytes on the same machine."""
    return KINDS[name].make()


def said(error: Exception) -> str:
    """What an engine said, without the request that it is the answer to."""
    return str(getattr(error, "explanation", None) or str(error).partition("\n")[0])[:500]


def present(client: docker.DockerClient, kind: ImageKind) -> bool:
    """Whether the engine has the image, as it would be made now."""
    try:
        client.images.get(kind.tag)
    except ImageNotFound:
        return False
    return True


def ensure(client: docker.DockerClient, kind: ImageKind) -> str:
    """Make the image in the engine unless it is there; returns its name. Raises LabError where it cannot be made."""
    try:
        if not present(client, kind):
            build(client, kind)
    except ENGINE_ERRORS as error:
        raise LabError(f"the image {kind.tag} cannot be made: {said(error)}", hint=ROOM_HINT) from error
    return kind.tag


def build(client: docker.DockerClient, kind: ImageKind) -> None:
    """Import the image, whatever there was of that name."""
    _import(client, archive(kind.name), kind.tag, f"LABEL {LABEL}={kind.name}")


def bring_in(client: docker.DockerClient, data: bytes, tag: str) -> None:
    """Make an image of a root file system that was exported elsewhere. Raises LabError where the engine refuses it."""
    try:
        _import(client, data, tag)
    except ENGINE_ERRORS as error:
        raise LabError(f"the image {tag} cannot be imported: {said(error)}", hint=ROOM_HINT) from error


def pull(client: docker.DockerClient, reference: str) -> None:
    """Fetch an image from its registry. Raises LabError where that cannot be had."""
    try:
        client.images.pull(reference)
    except ENGINE_ERRORS as error:
        hint = "--image-prefix names a mirror; `testbed images import` brings one from a file"
        raise LabError(f"the image {reference} cannot be pulled: {said(error)}", hint=hint) from error


def also_call(client: docker.DockerClient, name: str, tag: str) -> None:
    """Give an image another name. Raises LabError where the engine refuses it."""
    repository, version = _parted(tag)
    try:
        client.images.get(name).tag(repository, tag=version)
    except ENGINE_ERRORS as error:
        raise LabError(f"the image {name} cannot be called {tag}: {said(error)}") from error


def _parted(name: str) -> tuple[str, str]:
    """An image's name and its tag; a colon before a slash is a port's."""
    repository, colon, tag = name.rpartition(":")
    return (repository, tag) if colon and "/" not in tag else (name, "latest")


def _import(client: docker.DockerClient, data: bytes, name: str, *changes: str) -> None:
    repository, tag = _parted(name)
    answer = client.api.import_image_from_data(data, repository=repository, tag=tag, changes=[*CHANGES, *changes])
    for line in str(answer).splitlines():
        found = json.loads(line) if line.startswith("{") else {}
        if "error" in found:
            raise APIError(found["error"])
