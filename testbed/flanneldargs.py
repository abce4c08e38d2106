"""flanneld's command line, read as Go's flag package reads it: arguments win over FLANNELD_* variables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BOOLEAN_FLAGS = frozenset(
    {
        "ip-masq",
        "ip-masq-fully-random-disable",
        "kube-subnet-mgr",
        "version",
        "iptables-forward-rules",
        "ip-blackhole-route",
        "set-node-network-unavailable",
        "help",
        "h",
    }
)

INTEGER_FLAGS = frozenset({"subnet-lease-renew-margin", "healthz-port", "iptables-resync", "v"})

STORE_FLAGS = frozenset(
    {
        "etcd-endpoints",
        "etcd-prefix",
        "etcd-keyfile",
        "etcd-certfile",
        "etcd-cafile",
        "etcd-username",
        "etcd-password",
        "kube-subnet-mgr",
        "kube-api-url",
        "kube-annotation-prefix",
        "kubeconfig-file",
        "net-config-path",
        "set-node-network-unavailable",
    }
)
"""What chooses the store or only means something to one; a lab has a store of its own."""

OTHER_FLAGS = frozenset(
    {
        "iface",
        "iface-regex",
        "iface-can-reach",
        "subnet-file",
        "public-ip",
        "public-ipv6",
        "healthz-ip",
        "vmodule",
        "log_backtrace_at",
    }
)

FLAGS = BOOLEAN_FLAGS | INTEGER_FLAGS | STORE_FLAGS | OTHER_FLAGS

_TRUE = frozenset({"1", "t", "T", "TRUE", "true", "True"})
_FALSE = frozenset({"0", "f", "F", "FALSE", "false", "False"})


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag as given: its value, and the words that it took of the command line, from `position` on."""

    name: str
    value: str | None
    position: int
    words: tuple[str, ...]

    @property
    def problem(self) -> str:
        """What is wrong with it; empty where nothing is."""
        if self.name not in FLAGS:
            return f"flanneld has no flag --{self.name}"
        if self.value is None:
            return f"--{self.name} needs a value"
        if self.name in BOOLEAN_FLAGS and self.value not in _TRUE | _FALSE:
            return f"--{self.name} takes true or false, not {self.value!r}"
        if self.name in INTEGER_FLAGS and not _is_integer(self.value):
            return f"--{self.name} takes a number, not {self.value!r}"
        return ""


@dataclass(frozen=True, slots=True)
class Flags:
    """A parsed command line; `rest` are the words that Go leaves unread, from the first that is no flag."""

    given: tuple[Flag, ...]
    rest: tuple[str, ...]
    env: Mapping[str, str]

    def all(self, name: str) -> list[str]:
        """Every value of a flag; the environment's where the command line has none."""
        values = [flag.value for flag in self.given if flag.name == name and flag.value is not None]
        from_env = self.env.get("FLANNELD_" + name.replace("-", "_").upper(), "")
        return values or ([from_env] if from_env else [])

    def last(self, name: str) -> str | None:
        """The value that counts; None where the flag is not given at all."""
        values = self.all(name)
        return values[-1] if values else None

    def boolean(self, name: str, *, default: bool) -> bool:
        """A boolean flag's value."""
        value = self.last(name)
        return default if value is None else value in _TRUE


def _is_integer(text: str) -> bool:
    try:
        int(text, 0)
    except ValueError:
        return False
    return True


def parse_flags(args: Sequence[str], env: Mapping[str, str] | None = None) -> Flags:
    """Read flanneld's arguments: `-x`, `--x`, `--x=v` and `--x v` are the same, and a boolean takes no word."""
    given: list[Flag] = []
    position = 0
    while position < len(args):
        word = args[position]
        if not word.startswith("-") or word in ("-", "--"):
            rest = position + 1 if word == "--" else position
            return Flags(tuple(given), tuple(args[rest:]), dict(env or {}))
        name, equals, value = word.removeprefix("-").removeprefix("-").partition("=")
        taken: str | None = value
        words = 1
        if not equals and name in BOOLEAN_FLAGS:
            taken = "true"
        elif not equals and name in FLAGS and position + 1 < len(args):
            taken, words = args[position + 1], 2
        elif not equals:
            taken = None
        given.append(Flag(name, taken, position, tuple(args[position : position + words])))
        position += words
    return Flags(tuple(given), (), dict(env or {}))


def without_store(flags: Flags, *, besides: frozenset[str] = frozenset()) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split a command line into the words that a lab keeps, and the flags that it replaces.

    Those are the flags of a store, as a lab has its own, and the ones named by `besides`.
    """
    kept: list[str] = []
    dropped: list[str] = []
    for flag in flags.given:
        if flag.name in STORE_FLAGS | besides:
            dropped.append(f"--{flag.name}")
        else:
            kept += flag.words
    return tuple(kept), tuple(dropped)


def without_store_env(env: Mapping[str, str]) -> dict[str, str]:
    """The environment less the variables that set a store's flag."""
    names = {variable_of(flag) for flag in STORE_FLAGS}
    return {name: value for name, value in env.items() if name not in names}


def variable_of(flag: str) -> str:
    """The environment variable that sets a flag."""
    return "FLANNELD_" + flag.replace("-", "_").upper()
