"""What the guest can do, proven by use in it: the table of `testbed kernel check`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from testbed.errors import LabError
from testbed.flannelspec import BACKENDS
from testbed.guest.build import Kernel
from testbed.guest.run import run
from testbed.labs import interpreter

ALL, CHECKS = "every run", "checks"

#: Feature → what needs it: every run, a feature of backends (its runs), checks of the catalogue, or words.
NEEDS: Mapping[str, str] = {
    **dict.fromkeys(("user_namespace", "nested_user_namespace", "namespaces", "more_user_namespaces"), ALL),
    **dict.fromkeys(("tmpfs", "proc", "sysfs", "overlay", "veth", "bridge", "multipath", "hash_policy", "ipv6"), ALL),
    **dict.fromkeys(("packet", "seccomp", "conntrack", "iptables_nft", "peer", "conntrack_entry", "tcpdump"), ALL),
    "masquerade_nft": ALL,
    **dict.fromkeys(("iptables_legacy", "masquerade_legacy"), "--rules iptables-legacy"),
    "nftables": "--rules nftables",
    "br_netfilter": CHECKS,
    **dict.fromkeys(("vxlan", "vxlan_through"), "vxlan"),
    "tun": "tun",
    **dict.fromkeys(("ipip", "ipip_through"), "ipip"),
    **dict.fromkeys(("wireguard", "wireguard_through"), "wireguard"),
    **dict.fromkeys(("xfrm", "esp4", "esp_gcm", "esp_cbc", "esp_chacha", "strongswan"), "esp4"),
    **dict.fromkeys(("sit_through", "gre_through", "ipset", "bridge_vlan", "dummy"), CHECKS),
    **dict.fromkeys(("netem", "netem_delay", "vrf"), CHECKS),
    **dict.fromkeys(("etcd", "frr"), ALL),
}


@dataclass(frozen=True, slots=True)
class Row:
    """A feature, and how it went as root and as an ordinary user: "" for well, None for not tried, else why not."""

    feature: str
    needed_by: str
    root: str | None
    user: str | None

    @property
    def ok(self) -> bool:
        """Whether nothing that was tried failed."""
        return not self.root and not self.user

    @property
    def tried(self) -> bool:
        """Whether there was a tool to try it with."""
        return self.root is not None or self.user is not None


@dataclass(frozen=True, slots=True)
class Checked:
    """All rows, and the kernel that they are about."""

    kernel: Kernel
    release: str
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether the guest has everything that could be tried."""
        return all(row.ok for row in self.rows)


def needed_by(need: str) -> str:
    """Words for the runs that a need stands for."""
    runs = [run for run, backend in BACKENDS.items() if need in backend.kernel_features]
    return ", ".join(runs) or need


def rows(answer: Mapping[str, Any]) -> tuple[Row, ...]:
    """The table of what the program inside found."""

    def outcome(found: Mapping[str, Mapping[str, Any]], name: str) -> str | None:
        if name not in found:
            return None
        return "" if found[name]["ok"] else str(found[name]["detail"]) or "failed"

    root, user, services = answer["root"], answer["user"], answer["services"]
    names = [*NEEDS, *(name for name in root if name not in NEEDS)]
    table = []
    for name in names:
        where = services if name in ("etcd", "frr", "strongswan") else root
        table.append(Row(name, needed_by(NEEDS.get(name, CHECKS)), outcome(where, name), outcome(user, name)))
    return tuple(table)


def check(kernel: Kernel) -> Checked:
    """Try everything in the guest. Takes some ten seconds. Raises LabError where the guest gives no answer."""
    package = resources.files("testbed")
    inside = package.joinpath("guest", "checkinside.py").read_text()
    probe = package.joinpath("featureprobe.py").read_text()
    with tempfile.TemporaryFile() as out:
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "HOME": "/root"}
        argv = [interpreter(), "-I", "-S", "-c", inside, probe]
        code = run(argv, kernel=kernel.path, env=environment, cwd=Path("/"), out=out.fileno())
        out.seek(0)
        text = out.read().decode(errors="replace")
    try:
        answer = json.loads(text)
        return Checked(kernel, answer["release"], rows(answer))
    except (ValueError, KeyError) as error:
        raise LabError(f"the check inside the guest ended with {code} and no answer\n{text[-1000:]}") from error
