"""Where a flow was lost: the furthest interface of its way that saw it, and the next one, which did not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_SHARE = re.compile(r"(\d+) of (\d+)")


@dataclass(frozen=True, slots=True)
class Station:
    """An interface on a flow's way, with how often it was seen there. `kind` is pod, veth, bridge, tunnel or wire."""

    at: str
    machine: str
    kind: str
    readable: bool
    there: int
    back: int
    errors: int
    tunnelled: bool


@dataclass(frozen=True, slots=True)
class Lost:
    """Where a flow ends. `direction` is there or back; `after` saw it last, `before` is the next one on its way."""

    direction: str
    after: Station | None
    before: Station | None
    came: int  # how many got as far as `after`
    went: int  # how many of them got to `before`

    @property
    def segment(self) -> str:
        """The segment in words, the same for all flows that end there."""
        if self.after is None:
            return f"before {self.before.at}" if self.before else "before its way"
        return f"{self.after.at} → {self.before.at}" if self.before else f"beyond {self.after.at}"

    @property
    def sentence(self) -> str:
        """What happened, for somebody in a hurry."""
        what = "requests" if self.direction == "there" else "answers"
        if self.after is None:
            return f"No {what} were seen on any interface of the way."
        if self.before is None:
            return f"All requests came through to {self.after.at}; none was answered."
        inside = ", inside the tunnel's packets" if self.after.tunnelled else ""
        share = "none" if not self.went else f"only {self.went}"
        return f"{self.came} {what} were last seen on {self.after.at}{inside}; {share} came to {self.before.at}."


SUSPECTS: Mapping[tuple[str, str], tuple[str, tuple[str, ...]]] = {
    ("pod", "veth"): ("one end of the veth is down", ("ip -d link",)),
    ("veth", "bridge"): (
        "the veth is no port of the bridge, or the pod sends to another MAC than the bridge's",
        ("bridge link", "bridge fdb show br {bridge}"),
    ),
    ("veth", "veth"): ("the bridge does not forward between its ports", ("bridge link", "bridge fdb show br {bridge}")),
    ("bridge", "tunnel"): (
        "no route to the target's subnet by the tunnel, forwarding is off, or a FORWARD rule drops it",
        ("ip route get {target}", "{forward}", "sysctl net.ipv4.ip_forward"),
    ),
    ("bridge", "wire"): (
        "no route to the target's subnet, forwarding is off, or a FORWARD rule drops it",
        ("ip route get {target}", "{forward}", "sysctl net.ipv4.ip_forward"),
    ),
    ("tunnel", "wire"): (
        "no forwarding or neighbour entry for the other end, no route to its node, or the packet is too large",
        ("bridge fdb show dev {tunnel}", "ip neighbour show dev {tunnel}", "ip -s -d link show {tunnel}"),
    ),
    ("wire", "wire"): (
        "the fabric between the nodes: a link, a route of a leaf or spine, or an MTU",
        ("ip neighbour", "ip route", "ip -s link"),
    ),
    ("wire", "tunnel"): (
        "the receiving node drops the tunnel's packets: a rule on its port, a wrong checksum, another VNI, or its "
        "tunnel device is down or missing",
        ("{input}", "ip -s -d link show {tunnel}", "nstat -az UdpInCsumErrors UdpNoPorts"),
    ),
    ("tunnel", "bridge"): (
        "the inner MAC is not the device's, the reverse path filter or a FORWARD rule drops it, or the subnet is "
        "another node's",
        ("ip route get {target}", "{forward}", "nstat -az TcpExtIPReversePathFilter"),
    ),
    ("wire", "bridge"): (
        "the reverse path filter or a FORWARD rule drops it, or the subnet is another node's",
        ("ip route get {target}", "{forward}", "nstat -az TcpExtIPReversePathFilter"),
    ),
    ("bridge", "veth"): (
        "the bridge does not know the pod's MAC, or the veth is no port of it",
        ("ip neighbour show dev {bridge}", "bridge fdb show br {bridge}"),
    ),
    ("veth", "pod"): ("the pod's end of the veth is down", ("ip -d link",)),
}
"""What loses packets between two kinds of interface, and what to look at on the node that does, its source first."""


def kind_of(at: str, devices: Mapping[str, str]) -> str:
    """What an interface is, from its name and the node's own devices."""
    place, _, iface = at.rpartition(":")
    if "/" in place:
        return "pod"
    known = {devices.get(kind): kind for kind in ("wire", "tunnel", "bridge")}
    return known.get(iface, "veth" if devices else "wire")  # a machine without devices of flannel's is the outside host


def stations(flow: Mapping[str, Any], lab: Mapping[str, Any]) -> list[Station]:
    """The way of a flow with what was seen on it. `outside:*` is whichever port of the outside host saw it."""
    seen = {str(row["at"]): row for row in flow.get("seen", ())}
    found = []
    for stage in flow.get("route", ()):
        at = str(stage["at"])
        if at.endswith(":*"):
            ports = [name for name in seen if name.startswith(at[:-1])]
            at = max(ports, key=lambda name: int(seen[name]["there"]), default=at)
        row = seen.get(at, {})
        machine = str(stage["machine"])
        found.append(
            Station(
                at=at,
                machine=machine,
                kind=kind_of(at, lab.get("devices", {}).get(machine, {})),
                readable=bool(stage.get("readable", True)),
                there=int(row.get("there", 0)),
                back=int(row.get("back", 0)),
                errors=int(row.get("errors", 0)),
                tunnelled=bool(row.get("tunnelled", False)),
            )
        )
    return found


def unanswered(flow: Mapping[str, Any]) -> bool:
    """Whether a flow had fewer answers than it sent packets."""
    answered = str(flow.get("answered", ""))
    share = _SHARE.fullmatch(answered)
    return int(share[1]) < int(share[2]) if share else bool(answered)


def lost(flow: Mapping[str, Any], way: Sequence[Station]) -> Lost | None:
    """Where a flow that was not answered ends; None where all was answered, or its way is not known."""
    readable = [station for station in way if station.readable]
    if not readable or not flow.get("marked", True) or not unanswered(flow):
        return None
    if found := _first_loss("there", readable):
        return found
    if found := _first_loss("back", readable[::-1]):
        return found
    return None


def _first_loss(direction: str, way: Sequence[Station]) -> Lost | None:
    counts = [getattr(station, direction) for station in way]
    most = counts[0] if direction == "there" else max(counts)
    if not most:
        if direction == "back":
            return Lost(direction, way[0], None, way[0].there, 0)
        begun = next((index for index, number in enumerate(counts) if number), None)
        if begun is None:
            return Lost(direction, None, way[0], 0, 0)
        most = max(counts)
    full = max(index for index, number in enumerate(counts) if number >= most)
    if full == len(way) - 1:
        return None
    return Lost(direction, way[full], way[full + 1], counts[full], counts[full + 1])


LISTINGS: Mapping[str, str] = {
    "nftables": "nft list ruleset",
    "iptables-legacy": "iptables-legacy -vnL {chain}",
    "iptables-nft": "iptables-nft -vnL {chain}",
}
"""How a chain's rules are shown, with their counters, by the rules of the run."""


def suspects(found: Lost, lab: Mapping[str, Any], flow: Mapping[str, Any]) -> tuple[str, list[tuple[str, list[str]]]]:
    """What usually loses packets there, and commands to look at it: each with the machine that it is for."""
    if found.after is None or found.before is None:
        return "", []
    text, commands = SUSPECTS.get((found.after.kind, found.before.kind), ("", ()))
    machine = found.before.machine if found.before.kind in ("tunnel", "bridge", "veth") else found.after.machine
    devices = {key: str(value or "") for key, value in lab.get("devices", {}).get(machine, {}).items()}
    listing = LISTINGS.get(str(lab.get("rules", "")), "iptables -vnL {chain}")
    chains = {chain.lower(): listing.format(chain=chain) for chain in ("FORWARD", "INPUT")}
    values = {"target": str(flow.get("target", "")), "tunnel": "", "bridge": ""} | chains | devices
    return text, [(machine, command.format(**values).split()) for command in commands]
