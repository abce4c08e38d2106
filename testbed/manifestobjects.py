"""What a manifest holds: Kubernetes objects with their places, and what of them is flannel's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from testbed.errors import Fault
from testbed.manifestjson import JsonText
from testbed.yamlmarks import Document, Path


@dataclass(frozen=True, slots=True)
class ManifestObject:
    """A Kubernetes object of a file: its document, and where in it."""

    document: Document
    path: Path
    value: Mapping[str, Any]

    def at(self, *keys: str | int) -> Any:
        """The value at a path below the object; None where there is none."""
        value: Any = self.value
        for key in keys:
            inside = isinstance(value, dict) if isinstance(key, str) else isinstance(value, list)
            try:
                value = value[key] if inside else None
            except (KeyError, IndexError):
                return None
        return value

    def each(self, *keys: str | int) -> Iterator[tuple[Path, Mapping[str, Any]]]:
        """The mappings of a list below the object, each with its path; nothing where there is no list."""
        given = self.at(*keys)
        for position, item in enumerate(given if isinstance(given, list) else ()):
            if isinstance(item, dict):
                yield (*keys, position), item

    @property
    def kind(self) -> str:
        """Its kind, such as DaemonSet."""
        return str(self.at("kind"))

    @property
    def called(self) -> str:
        """Its name without its kind."""
        return str(self.at("metadata", "name"))

    @property
    def name(self) -> str:
        """Kind and name, as people write them."""
        return f"{self.kind} {self.called}"

    @property
    def namespace(self) -> Any:
        """The namespace that it says it is in; None where it says none."""
        return self.at("metadata", "namespace")

    def fault(self, path: Path, what: str, hint: str = "") -> Fault:
        """A fault at a path below the object."""
        return self.document.fault((*self.path, *path), what, hint)


@dataclass(slots=True)
class Daemon:
    """A DaemonSet that runs flanneld: `container` is the path of that container, below the object."""

    object: ManifestObject
    container: Path
    args: Sequence[str]  # all of flanneld's words, as the manifest gives them
    env: Mapping[str, str]
    unknown_args: bool = False  # a script starts flanneld

    @property
    def pod(self) -> Path:
        """The path of the pod's specification."""
        return ("spec", "template", "spec")

    def at(self, *keys: str | int) -> Any:
        """The value at a path below flanneld's container."""
        return self.object.at(*self.container, *keys)

    def fault(self, path: Path, what: str, hint: str = "") -> Fault:
        """A fault at a path below flanneld's container."""
        return self.object.fault((*self.container, *path), what, hint)


@dataclass(slots=True)
class Manifest:
    """What was read of one manifest, which may be several files."""

    objects: list[ManifestObject] = field(default_factory=list)
    config: ManifestObject | None = None
    net_conf: JsonText | None = None
    conf: dict[str, Any] = field(default_factory=dict)  # net-conf.json in canonical spelling
    daemons: list[Daemon] = field(default_factory=list)

    def of_kind(self, *kinds: str) -> list[ManifestObject]:
        """The objects of some kinds."""
        return [found for found in self.objects if found.kind in kinds]


@dataclass(slots=True)
class Findings:
    """What is wrong, and what is only worth a word."""

    faults: list[Fault] = field(default_factory=list)
    warnings: list[Fault] = field(default_factory=list)
