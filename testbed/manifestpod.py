"""The flannel container of a DaemonSet: which arguments and environment flanneld gets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from testbed.errors import Fault
from testbed.flanneldargs import Flags, parse_flags, variable_of, without_store, without_store_env
from testbed.model import UNDERLAY
from testbed.yamlmarks import Document, Path

FROM_KUBERNETES = frozenset({"POD_NAME", "POD_NAMESPACE", "NODE_NAME"})
"""Variables that only flannel's Kubernetes store reads."""

SHELLS = frozenset({"sh", "bash", "ash", "dash", "busybox", "env"})


@dataclass(frozen=True, slots=True)
class Container:
    """flanneld's arguments and environment in a lab, and what of the manifest the lab replaces."""

    args: tuple[str, ...]
    env: Mapping[str, str]
    notes: tuple[str, ...]
    path: Path = ()  # where in the document it is
    words: tuple[str, ...] = ()  # flanneld's arguments as the manifest gives them
    variables: Mapping[str, str] = field(default_factory=dict)  # and its environment
    hidden: bool = False  # a script starts flanneld, so its arguments are not known


def read_container(
    document: Document, pod: Path, faults: list[Fault], lab_faults: list[Fault] | None = None
) -> Container | None:
    """Return the container of a pod specification that runs flanneld; None where there is none.

    Init containers are left aside: the lab installs plugins and the conflist by itself.  Appends to `faults`, and to
    `lab_faults` what is wrong in a lab only.
    """
    spec = _at(document.value, pod)
    containers = spec.get("containers") if isinstance(spec, dict) else None
    if not isinstance(containers, list):
        faults.append(document.fault((*pod, "containers"), "has to be a list of containers"))
        return None
    for position, container in enumerate(containers):
        if isinstance(container, dict) and _runs_flanneld(container):
            place = (*pod, "containers", position)
            return _Reading(document, place, container, faults, faults if lab_faults is None else lab_faults).read()
    return None


def _at(value: Any, path: Path) -> Any:
    for part in path:
        if isinstance(part, int):
            value = value[part] if isinstance(value, list) else None
        else:
            value = value.get(part) if isinstance(value, dict) else None
    return value


def _program(words: Any) -> str:
    return words[0].rsplit("/", 1)[-1] if isinstance(words, list) and words and isinstance(words[0], str) else ""


def _runs_flanneld(container: Mapping[str, Any]) -> bool:
    program = _program(container.get("command"))
    if program == "flanneld":
        return True
    # The image's own entry point is flanneld; and a script may start it.
    looks_like_it = container.get("name") == "kube-flannel" or "flanneld" in str(container.get("command"))
    return looks_like_it and (not container.get("command") or program in SHELLS)


class _Reading:
    """One reading of one container."""

    def __init__(
        self,
        document: Document,
        path: Path,
        container: Mapping[str, Any],
        faults: list[Fault],
        lab_faults: list[Fault],
    ) -> None:
        self.document = document
        self.path = path
        self.container = container
        self.faults = faults
        self.lab_faults = lab_faults
        self.notes: list[str] = []
        self.env: dict[str, str] = {}
        self.absent: set[str] = set()
        self.hidden = False

    def fault(self, path: Path, what: str, hint: str = "") -> None:
        self.faults.append(self.document.fault((*self.path, *path), what, hint))

    def lab_fault(self, path: Path, what: str, hint: str = "") -> None:
        self.lab_faults.append(self.document.fault((*self.path, *path), what, hint))

    def read(self) -> Container:
        self.read_env()
        words, places = self.words()
        flags = parse_flags(words, self.env)
        self.check(flags, places)
        foreign = self.foreign_interfaces(flags)
        args, dropped = without_store(flags, besides=frozenset({"iface"}) if foreign else frozenset())
        dropped = tuple(name for name in dropped if name != "--iface")
        env = without_store_env({k: v for k, v in self.env.items() if not (foreign and k == variable_of("iface"))})
        dropped += tuple(sorted(self.env.keys() - env.keys() - {variable_of("iface")}))
        if dropped:
            names = ", ".join(dict.fromkeys(dropped))
            self.notes.append(f"{names} replaced: the lab has a store of its own, etcd")
        notes = tuple(self.notes)
        return Container(args, env, notes, self.path, tuple(words), dict(self.env), self.hidden)

    def foreign_interfaces(self, flags: Flags) -> bool:
        """Whether --iface names only what no node of a lab has; flannel's default is right there."""
        names = flags.all("iface")
        if not names or UNDERLAY in names:
            return False
        self.notes.append(f"--iface={' and '.join(names)} left out: the lab's nodes reach each other by {UNDERLAY}")
        return True

    def read_env(self) -> None:
        given = self.container.get("env")
        if given is not None and not isinstance(given, list):
            self.fault(("env",), "has to be a list of variables")
            return
        for position, item in enumerate(given or ()):
            here = ("env", position)
            name = item.get("name") if isinstance(item, dict) else None
            if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", name):
                self.fault(here, "has to be a variable with a name")
            elif "valueFrom" in item:
                self.absent.add(name)
                if name not in FROM_KUBERNETES:
                    self.notes.append(f"{name} left out: its value comes from a cluster")
            elif isinstance(item.get("value", ""), str):
                self.env[name] = self.expand(item.get("value", ""), (*here, "value"))
            else:
                hint = f'write "{_text(item["value"])}"'
                self.fault((*here, "value"), f"{name} has to be text, not {_text(item['value'])}", hint)
        if self.container.get("envFrom"):
            self.notes.append("envFrom left out: its values come from a cluster")

    def words(self) -> tuple[list[str], list[Path]]:
        """flanneld's arguments with the place of each: what of `command` follows the program, then `args`."""
        words: list[str] = []
        places: list[Path] = []
        for key in ("command", "args"):
            given = self.container.get(key)
            if given is not None and not isinstance(given, list):
                self.fault((key,), "has to be a list of words", "one word an item, as in - --ip-masq")
                continue
            for position, word in enumerate(given or ()):
                place: Path = (key, position)
                if not isinstance(word, str):
                    self.fault(place, f"has to be text, not {_text(word)}", "put it in quotes")
                elif key == "args" or position > 0:
                    words.append(self.expand(word, place))
                    places.append(place)
        if _program(self.container.get("command")) in SHELLS:
            self.lab_fault(
                ("command",), "a script starts flanneld, so its arguments are not known", "give them in args"
            )
            self.hidden = True
            return [], []
        return words, places

    def expand(self, text: str, place: Path) -> str:
        """`$(NAME)` as Kubernetes expands it: an unknown name stays as it is, `$$` is a dollar sign."""

        def value(match: re.Match[str]) -> str:
            name = match.group(1)
            if name is None:
                return "$"
            if name in self.absent:
                self.lab_fault(place, f"$({name}) comes from a cluster, which a lab has not", "write the value")
            return self.env.get(name, match.group())

        return re.sub(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)", value, text)

    def check(self, flags: Flags, places: list[Path]) -> None:
        for flag in flags.given:
            place = places[flag.position]
            if flag.problem:
                self.fault(place, flag.problem)
            elif flag.name in ("version", "help", "h") and flag.value not in ("false", "0"):
                self.fault(place, f"--{flag.name} makes flanneld end at once", "remove it")
            elif flag.name in ("public-ip", "public-ipv6"):
                self.lab_fault(place, f"--{flag.name} gives every node of the lab one address", "remove it")
        if flags.rest:
            place = places[len(places) - len(flags.rest)]
            what = f"flanneld reads nothing from {flags.rest[0]!r} on"
            self.fault(place, what, "booleans are written --ip-masq=false; put a flag before each word")


def _text(value: Any) -> str:
    """A value of the wrong type as its author wrote it."""
    if isinstance(value, list | dict):
        return "a structure"
    if value is None:
        return "nothing"
    return str(value).lower() if isinstance(value, bool) else str(value)
