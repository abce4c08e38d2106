"""What this machine lacks for a lab: tools, kernel features, limits and policies, each with its cure and its cost.

Kernel features are found out by using them in thrown-away namespaces (`featureprobe.py`), never by a version.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from testbed.errors import Exit, LabError
from testbed.flannelspec import BACKENDS, Backend

LAB_RUNS = ("vxlan", "vxlan_direct", "host_gw", "udp")
"""The runs of the embedded lab; the verdict of `doctor` is about these."""

SYSTEM_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin")
"""Where tools are that an ordinary user's PATH often leaves out."""

PROBE_SECONDS = 60.0
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Tool:
    """A program that labs call. `places` are paths to look at besides PATH; `optional` ones stop no run.

    `runs` are those that need it, () for all; `others` are names that will do as well.
    """

    program: str
    package: str
    places: tuple[str, ...] = ()
    optional: str = ""  # what it is good for, where no run needs it
    runs: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


_FRR = ("/usr/lib/frr", "/usr/libexec/frr")
_CNI = ("/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni")
_STRONGSWAN = ("/usr/lib/strongswan", "/usr/lib/ipsec", "/usr/libexec/strongswan", "/usr/libexec/ipsec")

TOOLS = (
    *(Tool(program, "iproute2") for program in ("ip", "bridge", "ss", "tc")),
    *(Tool(program, "util-linux") for program in ("unshare", "nsenter")),
    *(Tool(program, "frr", _FRR) for program in ("zebra", "bgpd", "vtysh")),
    Tool("etcd", "etcd-server"),
    *(Tool(p, "containernetworking-plugins", _CNI) for p in ("bridge", "host-local", "portmap", "loopback")),
    *(Tool(program, "iptables") for program in ("iptables-nft", "iptables-nft-restore", "iptables-legacy")),
    Tool("nft", "nftables"),
    Tool("conntrack", "conntrack"),
    Tool("tcpdump", "tcpdump"),
    Tool("ping", "iputils-ping"),
    Tool("ethtool", "ethtool"),
    Tool("sysctl", "procps"),
    Tool("wg", "wireguard-tools", runs=("wireguard",)),
    Tool("charon", "charon-systemd", _STRONGSWAN, runs=("ipsec",), others=("charon-systemd",)),
    Tool("openssl", "openssl", optional="testing TLS to etcd"),
    Tool("iperf3", "iperf3", optional="benchmarks"),
    Tool("go", "golang", ("/usr/local/go/bin",), optional="building containerlab and kind"),
    Tool("docker", "docker.io", optional="labs of containerlab and kind"),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `needed_by` are run names; empty where no run needs it."""

    kind: str  # tool, kernel, limit, policy or containers
    name: str
    ok: bool
    needed_by: tuple[str, ...] = ()
    detail: str = ""
    cure: str = ""
    cost: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All that was found, and which runs can work here."""

    machine: Mapping[str, Any]
    findings: tuple[Finding, ...]
    reasons: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # run → why it cannot work; () if it can

    @property
    def exit_code(self) -> Exit:
        """HELD where every run of the embedded lab can work, else LAB."""
        return Exit.LAB if any(self.reasons[run] for run in LAB_RUNS) else Exit.HELD


def search_path() -> str:
    """PATH with the system's folders, which hold most of the tools."""
    return os.pathsep.join(dict.fromkeys([*os.environ.get("PATH", os.defpath).split(os.pathsep), *SYSTEM_FOLDERS]))


def find_tool(tool: Tool) -> str | None:
    """Return the path of a tool; None where it is missing.

    A CNI plugin or an FRR daemon is looked for only in its own folders: on PATH, `bridge` is something else.
    """
    if tool.package == "containernetworking-plugins":
        where = os.pathsep.join(tool.places)
    else:
        where = os.pathsep.join([search_path(), *tool.places])
    found = (shutil.which(name, path=where) for name in (tool.program, *tool.others))
    return next((path for path in found if path), None)


def missing_tools(*runs: str) -> list[Tool]:
    """The tools that every run needs, or one of these, and that are not here. Cheap: no process is started."""
    needed = [tool for tool in TOOLS if not tool.optional and (not tool.runs or set(tool.runs) & set(runs))]
    return [tool for tool in needed if find_tool(tool) is None]


def require_tools(*runs: str) -> None:
    """Raise LabError naming every tool at once that these runs need and that is missing."""
    missing = missing_tools(*runs)
    if missing:
        raise LabError(f"this machine lacks {', '.join(tool.program for tool in missing)}", hint=_install(missing))


def _install(tools: Iterable[Tool]) -> str:
    packages = " ".join(sorted({tool.package for tool in tools}))
    return f"as root, on Debian and Ubuntu: apt-get install --no-install-recommends {packages}"


def _tools() -> list[Finding]:
    findings = []
    for tool in TOOLS:
        path = find_tool(tool)
        findings.append(
            Finding(
                "tool",
                f"{tool.program} (CNI plugin)" if tool.places == _CNI else tool.program,
                path is not None,
                () if tool.optional else tool.runs or tuple(BACKENDS),
                path or (f"only for {tool.optional}" if tool.optional else "not found"),
                "" if path else _install([tool]),
                "" if path else "disk space; its service, if it has one, can stay off",
            )
        )
    return findings


def probe_features() -> dict[str, dict[str, Any]]:
    """Run the feature probe; returns what it found, name → ok and detail.

    Raises LabError where it does not answer.
    """
    program = Path(__file__).with_name("featureprobe.py")
    argv = [sys.executable, "-I", "-S", str(program)]
    env = {**os.environ, "PATH": search_path()}
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=PROBE_SECONDS, env=env, check=False)
        found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LabError(f"cannot probe the kernel: {error}") from error
    except json.JSONDecodeError as error:
        raise LabError(f"the kernel probe gave no answer: {done.stderr.strip()[-500:]}") from error
    return found


_MODULE_COST = "a kernel module loaded until the next boot"
_BOOT = "a reboot"
_REBUILD = "a kernel that has it (distributions' do; on Ubuntu: linux-modules-extra-$(uname -r))"

#: Feature → (what needs it, cure, cost). What needs it: "all", a feature's backends, or "" for none yet.
_FEATURES: Mapping[str, tuple[str, str, str]] = {
    "user_namespace": ("all", "see the limits and policies below; in a container: allow unshare", ""),
    "nested_user_namespace": ("all", "raise user.max_user_namespaces", "none to speak of"),
    "namespaces": ("all", "see the limits and policies below", ""),
    "tmpfs": ("all", "see the policies below", ""),
    "proc": (
        "all",
        "run it outside a container, or with /proc not masked (Docker: --security-opt systempaths=unconfined)",
        "the container may read and write what Docker hides of /proc",
    ),
    "sysfs": ("all", "as for proc", ""),
    "overlay": ("", "modprobe overlay", _MODULE_COST),
    "veth": ("all", "modprobe veth", _MODULE_COST),
    "bridge": ("all", "modprobe bridge", _MODULE_COST),
    "multipath": ("all", _REBUILD, _BOOT),
    "hash_policy": ("all", _REBUILD, _BOOT),
    "ipv6": ("all", "boot without ipv6.disable=1", _BOOT),  # BGP unnumbered speaks over link-local addresses
    "packet": ("all", "modprobe af_packet", _MODULE_COST),
    "seccomp": ("all", _REBUILD, _BOOT),
    "conntrack": ("all", "modprobe nf_conntrack_netlink", _MODULE_COST),
    "iptables_nft": ("all", "modprobe -a nft_compat nft_chain_nat xt_MASQUERADE xt_comment", _MODULE_COST),
    "iptables_legacy": ("", "modprobe iptable_nat", f"{_MODULE_COST}; needed only for --rules iptables-legacy"),
    "nftables": ("", "modprobe -a nft_chain_nat nft_masq", f"{_MODULE_COST}; needed only for --rules nftables"),
    "br_netfilter": (
        "",
        "modprobe br_netfilter",
        f"{_MODULE_COST}; bridges of this machine pass through iptables, as under Docker and Kubernetes",
    ),
    "vxlan": ("vxlan", "modprobe vxlan", _MODULE_COST),
    "tun": (
        "tun",
        "as root: modprobe tun; chmod 0666 /dev/net/tun (udev's default), or run as root",
        "any user may make tun devices in namespaces of his own",
    ),
    "ipip": ("ipip", "modprobe ipip", f"{_MODULE_COST}; a tunl0 appears in each network namespace"),
    "wireguard": ("wireguard", "modprobe wireguard", _MODULE_COST),
    "xfrm": ("xfrm", "modprobe xfrm_user", _MODULE_COST),
    "esp4": ("esp4", "modprobe -a esp4 rfc4106", _MODULE_COST),
    "netem": ("", "modprobe sch_netem", f"{_MODULE_COST}; needed only for faults of links but `down`"),
    "vrf": ("", "modprobe vrf", f"{_MODULE_COST}; needed only for topologies with leaf_vrf"),
}


def _needed_by(need: str) -> tuple[str, ...]:
    if need == "all":
        return tuple(BACKENDS)
    return tuple(run for run, backend in BACKENDS.items() if need and need in backend.kernel_features)


def _features(found: Mapping[str, Mapping[str, Any]], root: Path = Path("/")) -> list[Finding]:
    loads_modules = (root / "proc/modules").exists()
    findings = []
    for name, (need, cure, cost) in _FEATURES.items():
        answer = found.get(name, {"ok": False, "detail": "not tried: there are no namespaces to try it in"})
        ok = bool(answer["ok"])
        if cure.startswith("modprobe") and loads_modules:
            cure = f"as root: {cure}"
        elif cure.startswith("modprobe"):
            cure, cost = f"{_REBUILD}: this one loads no modules", _BOOT
        findings.append(
            Finding(
                "kernel",
                name,
                ok,
                _needed_by(need),
                str(answer["detail"]) or "works",
                "" if ok else cure,
                "" if ok else cost,
            )
        )
    return findings


def _number(path: str, root: Path) -> int | None:
    try:
        return int((root / path.lstrip("/")).read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


#: sysctl → (least value, whether a lab needs it, what for)
_LIMITS: Mapping[str, tuple[int, bool, str]] = {
    "user.max_user_namespaces": (8, True, "a lab takes two"),
    "user.max_net_namespaces": (64, True, "a lab takes one for each machine and pod"),
    "user.max_mnt_namespaces": (64, True, "a lab takes one for each machine"),
    "user.max_pid_namespaces": (64, True, "a lab takes one for each machine"),
    "fs.inotify.max_user_instances": (256, False, "kind with several nodes runs out of them"),
    "fs.inotify.max_user_watches": (65536, False, "kind with several nodes runs out of them"),
}


def limits(root: Path = Path("/")) -> list[Finding]:
    """Limits of the kernel on namespaces and their like, read below `root`. What the kernel lacks is left out."""
    findings = []
    for name, (least, needed, why) in _LIMITS.items():
        value = _number(f"/proc/sys/{name.replace('.', '/')}", root)
        if value is None:
            continue
        ok = value >= least
        findings.append(
            Finding(
                "limit",
                name,
                ok,
                tuple(BACKENDS) if needed else (),
                f"{value}" if ok else f"{value}, but {why}",
                "" if ok else f"as root: sysctl -w {name}={max(least, 4096 if needed else least * 2)}",
                "" if ok else "kernel memory, as far as it is used",
            )
        )
    return findings


def policies(uid: int, root: Path = Path("/")) -> list[Finding]:
    """Rules of the distribution against what a lab does as that user, read below `root`."""
    runs = tuple(BACKENDS)
    findings = []
    for name, refused, cost in (
        (
            "kernel.apparmor_restrict_unprivileged_userns",
            1,
            "any program of any user can then reach kernel code that Ubuntu keeps from it; or run as root",
        ),
        (
            "kernel.unprivileged_userns_clone",
            0,
            "any program of any user can then reach kernel code that is otherwise root's; or run as root",
        ),
    ):
        value = _number(f"/proc/sys/{name.replace('.', '/')}", root)
        if value is None:
            continue
        ok = uid == 0 or value != refused
        detail = f"{value}" if ok else f"{value}: ordinary users get no rights in namespaces of their own"
        cure = "" if ok else f"as root: sysctl -w {name}={1 - refused}"
        findings.append(Finding("policy", name, ok, runs, detail, cure, "" if ok else cost))
    return findings


def _machine() -> dict[str, Any]:
    try:
        system = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        system = ""
    return {
        "kernel": platform.release(),
        "system": system,
        "architecture": platform.machine(),
        "user": "root" if os.geteuid() == 0 else "ordinary",
        "cpus": len(os.sched_getaffinity(0)),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
    }


def reasons(backend: Backend, findings: Sequence[Finding]) -> tuple[str, ...]:
    """Why a run cannot work with what was found; empty if it can."""
    why = [] if backend.implemented else ["the bundled flannel has no such backend yet"]
    for finding in findings:
        if finding.ok or backend.run not in finding.needed_by:
            continue
        why.append({"tool": "lacks", "kernel": "kernel lacks"}.get(finding.kind, "limited by") + f" {finding.name}")
    return tuple(why)


def diagnose() -> Diagnosis:
    """Look at everything. Takes about half a second. Raises LabError where the probe does not answer."""
    from testbed import containers  # which needs this module

    found = (*_tools(), *_features(probe_features()), *limits(), *policies(os.geteuid()))
    findings = (*found, *containers.findings())
    return Diagnosis(_machine(), findings, {run: reasons(backend, findings) for run, backend in BACKENDS.items()})
