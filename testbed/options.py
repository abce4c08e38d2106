"""What a run was asked to be: the options of `testbed run`, `testbed up` and the pytest plugin in one typed value."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from testbed.errors import Fault, InputError

LABS = ("netns", "clab", "kube", "kind", "cluster", "ssh")
KERNELS = ("host", "guest", "auto")
RULES = ("iptables-nft", "iptables-legacy", "nftables")
STORES = ("etcd", "kubernetes")

LABS_HERE, STORES_HERE, RULES_HERE = ("netns", "clab"), STORES, RULES
"""What works today; the rest is refused with that reason."""

IN_GUEST = "TESTBED_GUEST"
"""Set in the environment of what runs in a guest; `testbed run` starts one, a plain pytest cannot."""

KERNELS_HERE = ("guest",) if os.environ.get(IN_GUEST) else ("host", "auto")


@dataclass(frozen=True, slots=True)
class RunOptions:
    """A run's options, checked. `flanneld` and `cni_plugin` map a node's name, or "" for every node, to a path."""

    backend: str  # run name, with underscores
    name: str  # the lab's id
    topology: str | None = None  # None: the backend's default
    settings: Mapping[str, str] = field(default_factory=dict)  # --set K=V
    mtu: int | None = None  # underlay MTU; None: the topology's
    rules: str | None = None  # None: what net-conf.json says
    net_conf: Mapping[str, str] = field(default_factory=dict)  # --net-conf KEY=VALUE
    store: str = "etcd"
    manifest: Path | None = None
    flanneld: Mapping[str, Path] = field(default_factory=dict)
    cni_plugin: Mapping[str, Path] = field(default_factory=dict)
    lab: str = "netns"
    image: str = ""  # of the machines of a lab of containers; "" for the one that suits the engine
    image_prefix: str = ""  # of the registry mirror that leaves' and spines' FRR is from; "" where it is made, too
    kernel: str = "host"
    keep: bool = False
    path_traces: tuple[tuple[str, str], ...] = ()  # between which ends a packet is followed
    pause_on_fail: bool = False
    pause_seconds: float | None = None  # how long a pause lasts at most; None: until somebody ends it
    reports: Path = Path("reports")

    def implementation(self, node: str) -> Path | None:
        """The flanneld under test on that node; None for the bundled one."""
        return self.flanneld.get(node, self.flanneld.get(""))

    def plugin(self, node: str) -> Path | None:
        """The CNI plugin under test on that node; None for the bundled one."""
        return self.cni_plugin.get(node, self.cni_plugin.get(""))


def default_name(backend: str, checkout: Path) -> str:
    """The lab's id where none was given: the run's name and a hash of the checkout."""
    digest = hashlib.sha256(str(checkout.resolve()).encode()).hexdigest()[:6]
    return f"{backend.replace('_', '-')}-{digest}"


def key_values(option: str, values: Sequence[str], faults: list[Fault]) -> dict[str, str]:
    """Read repeated KEY=VALUE options; what is not of that form is added to `faults`."""
    found: dict[str, str] = {}
    for value in values:
        key, equals, rest = value.partition("=")
        if equals and key:
            found[key.strip()] = rest.strip()
        else:
            faults.append(
                Fault("command line", 0, option, f"{value!r} is not KEY=VALUE", f"for example {option} mtu=1500")
            )
    return found


def node_paths(option: str, values: Sequence[str], faults: list[Fault]) -> dict[str, Path]:
    """Read repeated [NODE=]PATH options; a path that is no executable file is added to `faults`."""
    found: dict[str, Path] = {}
    for value in values:
        node, equals, rest = value.partition("=")
        if not equals or "/" in node:
            node, rest = "", value
        path = Path(rest).expanduser().absolute()
        if not path.is_file():
            faults.append(Fault("command line", 0, option, f"there is no file {rest!r}", "give the path of a program"))
        elif not path.stat().st_mode & 0o111:
            faults.append(Fault("command line", 0, option, f"{rest!r} is not executable", f"chmod +x {rest}"))
        found[node] = path
    return found


def one_of(option: str, value: str, here: Sequence[str], known: Sequence[str], faults: list[Fault]) -> str:
    """Check a choice; one that is known but does not work yet is refused with that reason."""
    if value not in known:
        faults.append(Fault("command line", 0, option, f"{value!r} is not known", f"one of {', '.join(known)}"))
    elif value not in here:
        faults.append(Fault("command line", 0, option, f"{value} does not work yet", f"use {' or '.join(here)}"))
    return value


def image_of(image: str, lab: str, faults: list[Fault], *, option: str = "--image") -> str:
    """Check an option about the images of a lab's machines, which containers alone have."""
    if image and lab != "clab":
        what = f"the machines of {lab} have no image"
        faults.append(Fault("command line", 0, option, what, f"--lab clab, or without {option}"))
    return image


def raise_faults(faults: Sequence[Fault]) -> None:
    """Raise one InputError with every fault, if there are any."""
    if faults:
        raise InputError(faults=faults)
