"""The names of container images, from the one file that has them, and as a user wants them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from testbed.errors import Fault
from testbed.options import raise_faults

FILE = Path(__file__).with_name("images.yml")

REFERENCE = re.compile(
    r"(?:[A-Za-z0-9][A-Za-z0-9.-]*(?::[0-9]+)?/)?[a-z0-9]+(?:[._/-]+[a-z0-9]+)*"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64})?"
)
PREFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*(?::[0-9]+)?(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)*/?")


@dataclass(frozen=True, slots=True)
class Named:
    """An image of the file. `made` names the kind of image that is made here instead of pulled; "" for a pulled one."""

    name: str
    digest: str = ""
    made: str = ""

    def reference(self, prefix: str = "") -> str:
        """The image as an engine is asked for it, behind a mirror's prefix where it is pulled."""
        front = "" if self.made or not prefix else prefix.rstrip("/") + "/"
        return f"{front}{self.name}{'@' if self.digest else ''}{self.digest}"


def checked_name(option: str, name: str) -> str:
    """Return an image's name if an engine would take it. Raises InputError."""
    if not REFERENCE.fullmatch(name) or "@" in name:
        hint = "for example testbed-node:latest"
        raise_faults([Fault("command line", 0, option, f"{name!r} is no name of an image", hint)])
    return name


@cache
def named_images() -> Mapping[str, Named]:
    """Every image that is named, by what it is for."""
    content: Mapping[str, Mapping[str, Any]] = yaml.safe_load(FILE.read_text())
    return {key: Named(**entry) for key, entry in content.items()}


def references(prefix: str = "", given: Mapping[str, str] | None = None) -> dict[str, str]:
    """Every image by what it is for: as the file has it, behind `prefix`, or the one that is `given` in its place.

    Raises InputError for a prefix or a name that no engine would take, and for one that no file names.
    """
    given, known = given or {}, named_images()
    faults = []
    if prefix and not PREFIX.fullmatch(prefix):
        hint = "a host or a path of one, such as mirror.example/hub/"
        faults.append(Fault("command line", 0, "--image-prefix", f"{prefix!r} cannot stand before an image", hint))
    for key, reference in given.items():
        if key not in known:
            faults.append(Fault("command line", 0, "--image", f"no image is for {key!r}", f"one of {', '.join(known)}"))
        elif not REFERENCE.fullmatch(reference):
            hint = "for example frr=frrouting/frr:v8.4.0"
            faults.append(Fault("command line", 0, "--image", f"{reference!r} is no name of an image", hint))
    raise_faults(faults)
    return {key: given.get(key) or image.reference(prefix) for key, image in known.items()}
