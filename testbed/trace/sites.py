"""The state of the places that a packet comes through, from which it can be told why it went where it did."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any

from testbed.errors import LabError
from testbed.parallel import each
from testbed.probes.iproute import documents
from testbed.probes.many import Answer, Command, run_many
from testbed.trace.layout import Layout
from testbed.trace.rules import Counted, counted_rules

COUNTERS = (
    "IpInHdrErrors", "IpInAddrErrors", "IpInDiscards", "IpOutDiscards", "IpOutNoRoutes", "IpFragFails",
    "UdpInCsumErrors", "UdpNoPorts", "IcmpInCsumErrors", "TcpExtIPReversePathFilter", "IpExtInNoRoutes",
)  # fmt: skip
COUNTERS6 = (
    "Ip6InHdrErrors", "Ip6InAddrErrors", "Ip6InDiscards", "Ip6OutDiscards", "Ip6InNoRoutes", "Ip6OutNoRoutes",
    "Ip6InTooBigErrors", "Ip6FragFails", "Udp6InCsumErrors", "Udp6NoPorts", "Icmp6InCsumErrors",
)  # fmt: skip

Question = tuple[str, ...]
"""Words behind `ip route get fibmatch`."""

RuleKey = tuple[str, str, str]

_STATE = ("address show", "route show table all", "neighbour show nud all")
_SYSCTLS = "cd /proc/sys/net/ipv4 && grep -s . ip_forward icmp_echo_ignore_all conf/*/rp_filter conf/*/forwarding"
_SYSCTLS6 = "cd /proc/sys/net/ipv6 && grep -s . icmp/echo_ignore_all conf/all/forwarding"
_FLANNELD = 'ps -o stat= -p "$(cat /run/flanneld.pid)"'


@dataclass(frozen=True, slots=True)
class Chosen:
    """What routing answered to a question: a route, or an error."""

    route: Mapping[str, Any] | None
    error: str = ""


@dataclass(slots=True)
class Before:
    """What is counted in a place before the packet is sent."""

    rules: dict[RuleKey, Counted] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Site:
    """A machine's own network, or a pod's, once the packet is gone."""

    place: str
    machine: str
    links: dict[str, dict[str, Any]] = field(default_factory=dict)
    routes: list[dict[str, Any]] = field(default_factory=list)
    neighbours: list[dict[str, Any]] = field(default_factory=list)
    fdb: list[dict[str, Any]] = field(default_factory=list)
    connections: list[str] = field(default_factory=list)
    sysctls: dict[str, str] = field(default_factory=dict)
    rules: dict[RuleKey, Counted] = field(default_factory=dict)  # with what they have counted since
    moved: dict[str, int] = field(default_factory=dict)  # counters that have risen, and by how much
    chosen: dict[Question, Chosen] = field(default_factory=dict)
    flanneld: str = ""  # a letter, as ps has it: R, S, T; "" where it does not run

    def link(self, name: str) -> dict[str, Any]:
        """The device of that name; an empty one where there is none."""
        return self.links.get(name, {})

    def kind(self, name: str) -> str:
        """What sort of device that is: bridge, veth, vxlan; "" for none."""
        return str(self.link(name).get("linkinfo", {}).get("info_kind", ""))

    def master_bridge(self, name: str) -> str:
        """The bridge that a device is a port of; "" where it is none."""
        master = str(self.link(name).get("master", ""))
        return master if master and self.kind(master) == "bridge" else ""

    def up(self, name: str) -> bool:
        """Whether a device is there, set up, and has its carrier."""
        return {"UP", "LOWER_UP"} <= set(self.link(name).get("flags", ()))

    def mtu(self, name: str) -> int:
        """A device's MTU; 0 where there is none."""
        return int(self.link(name).get("mtu", 0))

    def owns(self, address: str) -> bool:
        """Whether an address is one of this place's own."""
        return any(info["local"] == address for link in self.links.values() for info in link.get("addr_info", ()))

    def neighbour(self, address: str, dev: str) -> dict[str, Any] | None:
        """The entry of a neighbour on a device, or None."""
        return next((one for one in self.neighbours if one["dst"] == address and one.get("dev") == dev), None)

    def forwarding(self, mac: str, dev: str) -> dict[str, Any] | None:
        """The entry of a tunnel device's table for a MAC, or the one for all others."""
        mine = [one for one in self.fdb if one["ifname"] == dev and "dst" in one]
        exact = next((one for one in mine if one["mac"] == mac), None)
        return exact or next((one for one in mine if one["mac"] == "00:00:00:00:00:00"), None)

    def port(self, mac: str, bridge: str) -> dict[str, Any] | None:
        """The entry of a bridge's table for a MAC, which says behind which port it is."""
        listed = (one for one in self.fdb if one["mac"] == mac and one.get("master") == bridge)
        return next((one for one in listed if "self" not in one.get("flags", ())), None)

    def longest(self, address: str) -> dict[str, Any] | None:
        """The main table's route with the longest prefix for an address, whatever its type; dead ones too."""
        wanted = ip_address(address)
        fitting = []
        for route in self.routes:
            anywhere = "::/0" if wanted.version == 6 else "0.0.0.0/0"
            net = ip_network(anywhere if route["dst"] == "default" else route["dst"], strict=False)
            if route.get("table", "main") == "main" and wanted in net:
                fitting.append((net.prefixlen, route))
        return max(fitting, key=lambda pair: pair[0])[1] if fitting else None


# --- asking

Wanted = Callable[[str, str], Mapping[Any, Command]]


def _ask(layout: Layout, places: Collection[str], wanted: Wanted) -> dict[str, dict[Any, Answer]]:
    """Ask these places, those of each machine at once; by place and what was asked. Raises LabError."""
    found: dict[str, dict[Any, Answer]] = {}

    def ask(machine: str) -> None:
        asked = [
            (place, what, command)
            for place, netns in layout.spaces(machine).items()
            if place in places
            for what, command in wanted(place, netns).items()
        ]
        answers = run_many(layout.lab.node(machine), [command for _, _, command in asked])
        for (place, what, _), answer in zip(asked, answers, strict=True):
            found.setdefault(place, {})[what] = answer

    each(ask, list(dict.fromkeys(layout.node_of(place).name for place in places)))
    return found


def _is_node(layout: Layout, place: str) -> bool:
    return place in {node.name for node in layout.lab.spec.cluster_nodes}


def _counting(layout: Layout, place: str, netns: str) -> dict[Any, Command]:
    """What is asked before and after the packet."""
    commands = {
        "nft": Command(("nft", "list", "ruleset"), netns),
        "counters": Command(("nstat", "-a", "-s", "-z", "-j", *(COUNTERS6 if layout.six else COUNTERS)), netns),
    }
    if _is_node(layout, place) and layout.rules != "nftables":
        program = layout.rules.replace("iptables", "ip6tables") if layout.six else layout.rules
        commands["iptables"] = Command((f"{program}-save", "-c"), netns)
    return commands


def count(layout: Layout, places: Collection[str]) -> dict[str, Before]:
    """What is counted in these places now. Raises LabError."""
    asked = _ask(layout, places, lambda place, netns: _counting(layout, place, netns))
    return {place: Before(_rules(answers), _counters(answers)) for place, answers in asked.items()}


@dataclass(frozen=True, slots=True)
class Looking:
    """What to look at: how routing decides, by place, and `all` that may explain a loss, or where addresses change."""

    questions: Mapping[str, Iterable[Question]]
    translating: Collection[str] = ()
    all: bool = False


def look(layout: Layout, places: Collection[str], before: Mapping[str, Before], looking: Looking) -> dict[str, Site]:
    """These places as they are now, and what has counted since. Raises LabError."""
    questions = {place: sorted(looking.questions.get(place, ())) for place in places}

    def wanted(place: str, netns: str) -> dict[Any, Command]:
        lines = [*_STATE, *(f"route get fibmatch {' '.join(words)}" for words in questions[place])]
        commands: dict[Any, Command] = {
            "ip": Command(("ip", "-j", "-d", "-force", "-batch", "-"), netns, stdin="\n".join(lines) + "\n"),
            "fdb": Command(("bridge", "-j", "fdb", "show"), netns),
        }
        if looking.all or place in looking.translating:
            commands |= _counting(layout, place, netns)
            family = "ipv6" if layout.six else "ipv4"
            commands["connections"] = Command(("conntrack", "-L", "-f", family, "-o", "extended"), netns)
        if looking.all:
            commands["sysctls"] = Command(("sh", "-c", _SYSCTLS6 if layout.six else _SYSCTLS), netns)
            commands["flanneld"] = Command(("sh", "-c", _FLANNELD), netns)
        return commands

    asked = _ask(layout, places, wanted)
    return {
        place: _site(layout, place, answers, before.get(place, Before()), questions[place])
        for place, answers in asked.items()
    }


# --- reading the answers


def _site(
    layout: Layout, place: str, answers: Mapping[Any, Answer], before: Before, questions: Collection[Question]
) -> Site:
    (links, routes, neighbours), chosen = _batch(answers["ip"], questions, place)
    site = Site(
        place=place,
        machine=layout.node_of(place).name,
        links={link["ifname"]: link for link in links if link},
        routes=[route for route in routes if route],
        neighbours=[one for one in neighbours if one],
        fdb=[entry for found in documents(answers["fdb"].out, place) for entry in found],
        chosen=chosen,
    )
    if "counters" in answers:
        site.rules = {
            key: Counted(rule.table, rule.chain, rule.text, rule.action, _risen(rule, before.rules.get(key)))
            for key, rule in _rules(answers).items()
        }
        counters = _counters(answers)
        site.moved = {
            key: value - old for key, value in counters.items() if value > (old := before.counters.get(key, 0))
        }
        site.connections = answers["connections"].out.splitlines()
    if "sysctls" in answers:
        lines = (line.partition(":") for line in answers["sysctls"].out.splitlines())
        site.sysctls = {name: value for name, _, value in lines}
        site.flanneld = answers["flanneld"].out.strip()[:1]
    return site


def _batch(
    answer: Answer, questions: Collection[Question], place: str
) -> tuple[list[list[dict[str, Any]]], dict[Question, Chosen]]:
    """Part what one `ip -batch` printed: documents of what went well, and lines about what did not."""
    found = documents(answer.out, place)
    failed: dict[int, str] = {}
    said = ""
    for line in answer.err.splitlines():
        if match := re.match(r"Command failed -:(\d+)", line):
            failed[int(match[1])] = said
            said = ""
        else:
            said = line.removeprefix("RTNETLINK answers: ").removeprefix("Error: ").strip()
    if len(found) < len(_STATE) or set(failed) & set(range(1, len(_STATE) + 1)):
        raise LabError(f"`ip` did not answer: {answer.fault}", where=place)
    rest = iter(found[len(_STATE) :])
    chosen: dict[Question, Chosen] = {}
    for number, words in enumerate(questions, len(_STATE) + 1):
        document: list[dict[str, Any]] = [] if number in failed else next(rest, [])
        route = document[0] if document else None
        chosen[words] = Chosen(route, "" if route else failed.get(number, "no answer"))
    return found[: len(_STATE)], chosen


def _risen(rule: Counted, before: Counted | None) -> int | None:
    if rule.packets is None:
        return None
    return rule.packets - (before.packets or 0 if before else 0)


def _rules(answers: Mapping[Any, Answer]) -> dict[RuleKey, Counted]:
    iptables = answers["iptables"].out if "iptables" in answers else ""
    listed = counted_rules(iptables, answers["nft"].out if answers["nft"].ok else "")
    return {(rule.table, rule.chain, rule.text): rule for rule in listed}


def _counters(answers: Mapping[Any, Answer]) -> dict[str, int]:
    try:
        return {key: int(value) for key, value in json.loads(answers["counters"].out)["kernel"].items()}
    except (ValueError, KeyError, TypeError):
        return {}
