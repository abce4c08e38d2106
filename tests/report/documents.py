"""Runs as `checks.json` holds them, made up: one of everything the page shows, hostile ones, and long ones.

Their rows are in no catalogue, so that what the page says of them changes with the page alone.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

WAY = (
    "worker1/client:eth0",
    "worker1:veth0a",
    "worker1:cni0",
    "worker1:flannel.1",
    "worker1:eth0",
    "worker3:eth0",
    "worker3:flannel.1",
    "worker3:cni0",
    "worker3:veth0b",
    "worker3/testapp:eth0",
)

NODES = ("master1", "worker1", "worker2", "worker3")
PING = ["ping", "-c", "3", "10.244.3.2"]
DEVICES = {"wire": "eth0", "tunnel": "flannel.1", "bridge": "cni0"}


def lab() -> dict[str, Any]:
    """A lab of two racks."""
    racks = {"master1": "leaf1", "worker1": "leaf1", "worker2": "leaf1", "worker3": "leaf2"}
    nodes = [
        {"name": name, "role": "node", "rack": rack, "address": f"10.0.0.{number}", "asn": None}
        for number, (name, rack) in enumerate(racks.items(), 11)
    ]
    routers = [
        {"name": name, "role": role, "rack": name if role == "leaf" else None, "address": "172.31.0.1", "asn": 65000}
        for name, role in (("leaf1", "leaf"), ("leaf2", "leaf"), ("spine1", "spine"), ("spine2", "spine"))
    ]
    outside = {"name": "outside", "role": "outside", "rack": None, "address": "203.0.113.8", "asn": 65099}
    cables = [[f"{name}:eth0", f"{rack}:node1"] for name, rack in racks.items()]
    cables += [[f"{leaf}:swp1", f"{spine}:swp1"] for leaf in ("leaf1", "leaf2") for spine in ("spine1", "spine2")]
    return {
        "topology": "racks",
        "mtu": 9150,
        "backend": "vxlan",
        "machines": [*nodes, *routers, outside],
        "cables": cables,
        "pods": [{"name": "worker1/client", "machine": "worker1", "address": "10.244.1.3", "veth": "veth0a"}],
        "devices": dict.fromkeys(NODES, DEVICES),
        "subnets": {name: f"10.244.{number}.0/24" for number, name in enumerate(NODES)},
        "mtus": [
            {
                "machine": name,
                "underlay": 9150,
                "tunnel": 1450 if name == "worker3" else 9100,
                "bridge": 9100,
                "pods": {f"{name}/testapp": 9100},
                "wanted": 9100,
            }
            for name in NODES
        ],
        "versions": {"flanneld": "bundled", "kernel": "6.1.0 x86_64"},
    }


def flow(last: int = 5, back_from: int | None = None, *, sent: int = 3, some: int = 0) -> dict[str, Any]:
    """Pings that came as far as the station of that number, `some` of them to the next one.

    With `back_from` all arrived, and their answers were seen from the target's end to that station.
    """
    seen = []
    arrived = back_from is not None
    for number, at in enumerate(WAY):
        there = sent if arrived or number <= last else some
        back = sent if back_from is not None and number >= back_from else 0
        if there or back:
            tunnelled = at in ("worker1:eth0", "worker3:eth0")
            row = {"at": at, "there": there, "back": back, "errors": 0, "tunnelled": tunnelled, "first": number / 1e5}
            seen.append(row)
    answered = sent if back_from == 0 else 0
    return {
        "what": f"{sent} × ping, 56 bytes",
        "source": "worker1/client",
        "target": "10.244.3.2",
        "answered": f"{answered} of {sent}",
        "marked": True,
        "route": [{"at": at, "machine": at.partition(":")[0].partition("/")[0], "readable": True} for at in WAY],
        "seen": seen,
    }


def packet(at: str = "worker3:eth0") -> dict[str, Any]:
    """An encapsulated ping."""
    ip = {"name": "IPv4", "fields": [["from", "10.244.1.3"], ["to", "10.244.3.2"], ["TTL", "63"], ["carries", "ICMP"]]}
    outer = {"name": "IPv4", "fields": [["from", "10.0.0.12"], ["to", "10.0.0.14"], ["TTL", "61"], ["carries", "UDP"]]}
    frame = {"name": "Ethernet", "fields": [["from", "02:00:00:00:00:01"], ["to", "02:00:00:00:00:02"]]}
    return {
        "at": at,
        "time": 0.0034,
        "length": 148,
        "summary": "10.244.1.3 → 10.244.3.2  ICMP echo request",
        "outer": [frame, outer, {"name": "UDP", "fields": [["ports", "57268 → 8472"]]}],
        "inner": [frame, ip, {"name": "ICMP", "fields": [["kind", "echo request"]]}],
    }


def check(row: str = "WAY-01", verdict: str = "held", **more: Any) -> dict[str, Any]:
    """One check of a run."""
    path = ["worker1/client", "worker3/testapp"]
    account = {
        "lab": "lab-1",
        "began": 1764000000.0,
        "asserted": [
            {"text": "packet.udp.dport == cluster.flannel.port", "seen": "8472", "wanted": "8472", "sign": "==",
             "held": True, "times": 6, "line": 61},
        ],
        "commands": [
            {"where": "worker1/client", "argv": PING, "rc": 0, "seconds": 0.1, "output": ""},
        ],
        "left_out": {},
        "flows": [flow(back_from=0)],
        "packets": [packet("worker1:eth0"), packet()],
        "packets_left_out": 0,
    }  # fmt: skip
    found = {
        "id": row,
        "name": f"{row}[vxlan-XS-{'->'.join(path)}]",
        "backend": "vxlan",
        "verdict": verdict,
        "seconds": 0.25,
        "reason": "",
        "nodes": ["worker1", "worker3"],
        "path": path,
        "slow": False,
        "artefacts": [],
        "leaked": [],
        "evidence": None,
        "account": account,
    }
    account |= more.pop("account", {})
    return found | more


def failed(row: str = "WAY-02", **account: Any) -> dict[str, Any]:
    """A check whose packets were lost."""
    program = "import socket\n" + "print(1)\n" * 40
    commands = [
        {
            "where": "worker1/client",
            "argv": ["ping", "-c", "3", "10.244.3.2"],
            "rc": 1,
            "seconds": 2.1,
            "output": "0 got",
        },
        {"where": "worker1/client", "argv": ["python3", "-c", program, "x y"], "rc": 0, "seconds": 0.2, "output": ""},
    ]
    asserted = [
        {"text": "answer.lost == 0", "seen": "3", "wanted": "0", "sign": "==", "held": False, "times": 1, "line": 28}
    ]
    evidence = {
        "folder": f"checks/{row}",
        "files": [
            {"path": f"checks/{row}/worker3.rules.txt", "node": "worker3", "what": "rules", "bytes": 900, "cut": 0},
            {"path": f"checks/{row}/worker3+eth0.pcap", "node": "worker3", "what": "pcap", "bytes": 500, "cut": 0},
        ],
        "changes": ["worker3: + route 10.9.0.0/24 dev eth0", "worker3: - neighbour 10.244.1.0"],
        "trace": None,
        "missing": [],
        "seconds": 0.6,
    }
    found: dict[str, Any] = {"flows": [flow()], "commands": commands, "asserted": asserted, **account}
    reason = "3 of 3 lost\nassert 3 == 0"
    return check(row, "failed", reason=reason, evidence=evidence, account=found)


def document(*checks: dict[str, Any], **run: Any) -> dict[str, Any]:
    """A run of these checks."""
    facts = {
        "name": "lab-1",
        "backend": "vxlan",
        "lab": "netns",
        "kernel": "host",
        "topology": "racks",
        "mtu": 9150,
        "rules": "iptables-nft",
        "store": "etcd",
        "implementations": dict.fromkeys(NODES, "bundled"),
        "exit": 1,
    }
    return {"schema": 1, "run": facts | run, "checks": list(checks), "labs": {"lab-1": lab()}}


def everything() -> dict[str, Any]:
    """A run with one of everything."""
    skipped = check("SKIP-04", "skipped", reason="needs kube-proxy", path=[], nodes=[], account={})
    skipped["account"] = {}
    figures = [{"figure": "TCP, 1 connection", "value": 0.82, "unit": "of the bare underlay", "bound": 0.3}]
    leaking = check("LEAK-01", leaked=["worker2: + routes 10.9.0.0/24 dev eth0"])
    late = {"late": ["it came after 3.2 s of at most 5.0 s"]}
    fast = check("FAST-01", figures=figures, slow=True, account=late)
    checks = [check(), failed(), failed("WAY-03"), skipped, leaking, fast]
    return document(*checks, problems=["WAY: 3 checks ran where 4 are expected"])


def changed(value: Any, change: Callable[[str], str], keep: tuple[str, ...] = ()) -> Any:
    """A document with every string in it changed, keys too, but for the values of some keys."""
    if isinstance(value, dict):
        return {key: item if key in keep else changed(item, change, keep) for key, item in value.items()}
    if isinstance(value, list):
        return [changed(item, change, keep) for item in value]
    return change(value) if isinstance(value, str) else value


def long(count: int = 200, bad: int = 20) -> dict[str, Any]:
    """A run of many checks, each with as much as real ones have."""
    many = [packet("worker1:eth0") for _ in range(12)]
    commands = [{"where": "worker1", "argv": ["ip", "-j", "route", f"10.{n}.0.0"], "rc": 0, "seconds": 0, "output": ""}
                for n in range(10)]  # fmt: skip
    asserted = [{"text": f"found[{n}] == wanted[{n}]", "seen": "10.0.0.1, " * 10, "wanted": "10.0.0.1", "sign": "==",
                 "held": True, "times": 3, "line": n} for n in range(8)]  # fmt: skip
    held = check(account={"packets": many, "commands": commands, "asserted": asserted})
    lost = failed(packets=many * 2)
    return document(*[copy.deepcopy(lost) for _ in range(bad)], *[copy.deepcopy(held) for _ in range(count - bad)])


class Texts(HTMLParser):
    """The text of a page as a reader sees it, a line a block; and every tag with its attributes."""

    BLOCKS = frozenset("p div li tr h1 h2 h3 h4 summary details pre table caption section article option svg".split())
    VOID = frozenset(("meta", "input", "br"))

    def __init__(self, page: str) -> None:
        super().__init__()
        self.lines: list[str] = [""]
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in self.BLOCKS:
            self.lines.append("")
        elif tag in ("td", "th", "span"):
            self.lines[-1] += " "

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes {self.open}"
        self.open.pop()
        if tag in self.BLOCKS:
            self.lines.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if not {"style", "script", "svg"} & set(self.open):
            self.lines[-1] += data.replace("\n", " ")

    @property
    def text(self) -> str:
        """The lines that are not empty, blanks made one."""
        lines = (re.sub(r"\s+", " ", line).strip() for line in self.lines)
        return "\n".join(line for line in lines if line) + "\n"
