"""What a failed check leaves for its reader, and what a check left behind on the nodes.

In `checks.json` each check has two more keys:

    "leaked": ["worker1: + route 10.9.0.0/24 dev eth0", …]      # [] where it left everything as it found it;
                                                                # `-` was there before it, `+` only after it
    "evidence": null                                            # or, where it failed:
    {"folder": "checks/VXE-01_vxlan-XS-…",                      # in the report
     "files": [{"path": "checks/VXE-01_…/worker1.routes.txt",   # relative to the report
                "node": "worker1",                              # "" for what is of no single node
                "what": "routes",                               # one of WHAT, or pcap, report, state
                "bytes": 1234, "cut": 0}, …],                   # how many bytes were cut off its beginning or end
     "changes": ["worker1: - neighbour …", …],                  # against the state before the check, as in leaked
     "trace": null,                                             # or a path trace between its ends: trace.model
     "missing": ["worker2: routes: timed out", …],              # what could not be had, and why
     "seconds": 0.62}

Beyond MOST_IN_FULL failures a check has its report and its captures alone, and `missing` says so.
`run` has `"leaks"` (how many checks leaked), `"traces"` (those of --path-trace) and
`"watch": {"readings": 56, "seconds": 0.4}`, what it cost to look at the nodes' state.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.errors import TestbedError
from testbed.model import Role
from testbed.parallel import each
from testbed.probes.many import Answer, Command, run_many
from testbed.report.write import save_artefacts

if TYPE_CHECKING:
    from testbed.labs.base import Node
    from testbed.nodes.deploy import Cluster
    from testbed.probes.capture import Window

MOST_IN_FULL = 20
"""How many failures of a run have everything gathered."""

WHAT = (
    *("flanneld", "links", "addresses", "fdb", "neighbours", "routes", "rules", "associations"),
    *("conntrack", "sockets", "sysctls"),
)
"""What is gathered of a node, as files are called (`worker1.routes.txt`); what tells most comes first."""

MOST_BYTES, MOST_PCAP, MOST_PCAPS = 1 << 18, 1 << 20, 8 << 20
"""Bytes of what one command printed, of one interface's packets, and of the packets of all of them."""

GATHER_SECONDS = 8.0
"""How long the commands on a node may take together."""

_ROUTING = ("links", "addresses", "neighbours", "routes")
_POD = "ip -s -d link; ip address; ip route show table all; ip -6 route; ip -s neighbour"


@dataclass
class Evidence:
    """What was kept of a failed check; see the module's text."""

    folder: str
    files: list[dict[str, Any]] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    trace: dict[str, Any] | None = None
    missing: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "folder": self.folder,
            "files": self.files,
            "changes": self.changes,
            "trace": self.trace,
            "missing": self.missing,
            "seconds": round(self.seconds, 3),
        }


def commands_of(rules: str) -> Mapping[str, Command]:
    """What is asked of a node, by what it is called. What is long is cut at its end, a log at its beginning."""
    listing = "nft list ruleset" if rules == "nftables" else f"{rules}-save -c; nft list ruleset 2>&1"
    shell = {
        "flanneld": "cat /var/log/flanneld.log",
        "links": "ip -s -d link",
        "addresses": "ip -d address",
        "fdb": "bridge -s -d fdb; bridge -d link",
        "neighbours": "ip -s neighbour show nud all",
        "routes": "ip rule; ip route show table all; ip -6 rule; ip -6 route show table all; ip nexthop",
        "rules": listing,
        "associations": "ip -s xfrm state list nokeys; ip -s xfrm policy; cat /proc/net/xfrm_stat; wg show",
        "conntrack": "conntrack -L -o extended; conntrack -S",
        "sockets": "ss -a -n -p -e -t -u -w",
        "sysctls": "sysctl -a -r '^net[.](ipv4[.](ip_|conf[.]|fib_|icmp_)|ipv6[.]conf[.]all|netfilter)' 2>/dev/null",
    }
    return {what: Command(("sh", "-c", line), keep_end=what == "flanneld") for what, line in shell.items()}


@dataclass(frozen=True, slots=True)
class _Asked:
    node: str
    name: str  # of the file, without .txt
    what: str
    command: Command


def _questions(cluster: Cluster, node: Node, pods: Sequence[str]) -> list[_Asked]:
    """What to ask one machine: all of a node, and of its pods that the check is about; a router's routing."""
    commands = commands_of(cluster.flannel.rules)
    wanted = WHAT if node.spec.role is Role.NODE else _ROUTING
    asked = [_Asked(node.name, f"{node.name}.{what}", what, commands[what]) for what in wanted]
    for name in pods:
        pod = cluster.pods.get(name)
        if pod is not None and pod.node.name == node.name:
            command = Command(("sh", "-c", _POD), pod.netns)
            asked.append(_Asked(node.name, f"{node.name}+{pod.pod_name}", "pod", command))
    return asked


def gather(cluster: Cluster, pods: Sequence[str]) -> tuple[dict[str, tuple[_Asked, Answer]], list[str]]:
    """Ask every machine at once; the answers by file name, and what could not be had."""
    found: dict[str, tuple[_Asked, Answer]] = {}
    missing: list[str] = []

    def ask(node: Node) -> None:
        asked = _questions(cluster, node, pods)
        try:
            answers = run_many(node, [one.command for one in asked], seconds=GATHER_SECONDS, limit=MOST_BYTES)
        except TestbedError as error:
            missing.append(f"{node.name}: {error.what}")
            return
        for one, answer in zip(asked, answers, strict=True):
            found[f"{one.name}.txt"] = one, answer
            if answer.rc is None:
                missing.append(f"{node.name}: {one.what}: timed out")

    each(ask, list(cluster.lab.nodes.values()))
    return found, missing


def keep_answers(staging: Path, item: str, evidence: Evidence, cluster: Cluster, pods: Sequence[str]) -> None:
    """Gather the state of every machine into the check's folder."""
    began = time.monotonic()
    answers, missing = gather(cluster, pods)
    evidence.missing += sorted(missing)
    texts = {name: (answer.out + answer.err).encode(errors="backslashreplace") for name, (_, answer) in answers.items()}
    for path in save_artefacts(staging, item, texts):
        one, answer = answers[path.rpartition("/")[2]]
        size = len(texts[path.rpartition("/")[2]])
        evidence.files.append({"path": path, "node": one.node, "what": one.what, "bytes": size, "cut": answer.cut})
    evidence.seconds += time.monotonic() - began


def keep_captures(
    staging: Path, item: str, evidence: Evidence, window: Window | None, names: Mapping[str, str]
) -> None:
    """Keep the packets of the check's window, the latest where there are too many; `names` are the files' by tap."""
    if window is None:
        return
    began = time.monotonic()
    pcaps = cut_pcaps(window.pcaps())
    files = {names[name]: data for name, (data, _) in pcaps.items()}
    known = {names[name]: (name, cut) for name, (_, cut) in pcaps.items()}
    for path in save_artefacts(staging, item, files):
        file = path.rpartition("/")[2]
        name, cut = known[file]
        node = name.partition(":")[0].partition("/")[0]
        evidence.files.append({"path": path, "node": node, "what": "pcap", "bytes": len(files[file]), "cut": cut})
    evidence.seconds += time.monotonic() - began


def cut_pcaps(pcaps: Mapping[str, bytes], most: int = MOST_PCAPS) -> dict[str, tuple[bytes, int]]:
    """The captures of a check, each cut where it is too long, and the longest so that all together are no longer."""
    found: dict[str, tuple[bytes, int]] = {}
    left = most
    shortest_first = sorted(pcaps, key=lambda name: len(pcaps[name]))
    for position, name in enumerate(shortest_first):
        found[name] = cut_pcap(pcaps[name], min(MOST_PCAP, left // (len(pcaps) - position)))
        left -= len(found[name][0])
    return found


def cut_pcap(data: bytes, limit: int = MOST_PCAP) -> tuple[bytes, int]:
    """A pcap file that is no longer than the limit: its last packets, and how many bytes of others were cut off."""
    if len(data) <= limit:
        return data, 0
    starts, at = [], 24
    with suppress(struct.error):
        while at < len(data):
            starts.append(at)
            at += 16 + int(struct.unpack_from("<I", data, at + 8)[0])
    keep = next((start for start in starts if len(data) - start + 24 <= limit), len(data))
    return data[:24] + data[keep:], keep - 24
