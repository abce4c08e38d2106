"""What a path trace found: one packet with a nonce, every interface it was seen on, and where it was lost.

As JSON (`Trace.to_json`; `testbed trace --json` prints one, `checks.json` has those of a run in `run.traces`, and that
of a failed check in its `evidence.trace`):

    {"schema": 1, "lab": "vxlan-1f", "backend": "vxlan",
     "source": "worker1/client", "target": "worker3/testapp",       # endpoints
     "packet": {"protocol": "icmp",                                 # icmp, udp, tcp
                "size": 56, "dont_fragment": false,                 # payload in bytes
                "nonce": "9f…", "source_address": "10.244.1.3", "target_address": "10.244.3.2"},
     "delivered": true,             # the request arrived, and its answer too
     "seconds": 0.00031,            # from the first hop to the last one, null where it was lost
     "notes": ["outer packets are matched by time and size only: wireguard encrypts"],
     "request": {"delivered": true, "hops": [HOP, …]},              # in the order in which they were seen
     "answer": {"delivered": true, "hops": [HOP, …]},
     "errors": [HOP, …],            # ICMP errors about it, with "error": "fragmentation needed, MTU 1400"
     "strays": [HOP, …],            # where it was seen although that is on no way to its target
     "missing": null}

    HOP = {"machine": "worker1",        # a machine of the lab
           "place": "worker1/client",   # the machine or the pod on it, in whose network the interface is
           "interface": "eth0", "way": "out",           # out or in
           "kind": "pod",               # pod, veth, bridge, tunnel, underlay, fabric (a router's port), other
           "at": 0.000012, "length": 98,                # seconds since the first hop; bytes on the wire
           "pieces": 1,                 # more where it is in fragments; the first one is shown
           "frame": {"src": "02:…", "dst": "02:…"},     # MACs; null on a device without
           "outer": null,               # PACKET, of the tunnel's ends
           "encapsulation": null,       # {"kind": "vxlan", "port": 8472, "vni": 1}; vxlan, udp, ipip, wireguard, esp
           "inner_frame": null,         # MACs inside vxlan
           "packet": {"src": "10.244.1.3", "dst": "10.244.3.2", "protocol": "icmp", "sport": 0, "dport": 0,
                      "ttl": 64, "dont_fragment": true, "checksum": "good"},  # good, bad, offloaded, none
           "matched": "nonce",          # or "time and size", for what is encrypted; "packet" is null then
           "error": "",
           "route": null,               # what the place's tables chose before it sent it here (out only):
                                        # {"text": "10.244.3.0/24 via 10.244.3.0 dev flannel.1 onlink", "type", "table"}
           "neighbour": null,           # {"text": "10.244.3.0 lladdr 3a:… PERMANENT", "mac", "state": ["PERMANENT"]}
           "fdb": null,                 # {"text": "3a:… dev flannel.1 dst 172.18.3.11 self permanent", "dst"}
           "nat": null}                 # {"kind": "source", "before": "10.244.1.3", "after": "172.18.1.11",
                                        #  "rule": "-A FLANNEL-POSTRTG …", "conntrack": "icmp 1 29 src=…"}

    `missing`, where it was lost: {"direction": "request",          # or answer
         "last": {"machine", "place", "interface", "way"},          # where it was last seen; null: nowhere
         "place": "worker3", "machine": "worker3", "interface": "flannel.1", "way": "in",   # the first that misses it
         "cause": {"code": "port_blocked",              # one of CAUSES
                   "text": "worker3 drops UDP port 8472", "evidence": ["-A INPUT …"], "certain": true}}

Readers ignore keys they do not know.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA = 1

CAUSES = {
    "port_blocked": "a rule drops the packets of the tunnel's port",
    "firewall_rule": "a rule drops it",
    "forward_policy": "the FORWARD chain's policy drops it",
    "mtu": "it is larger than an MTU on its way",
    "checksum": "its checksum is wrong: a device was to compute it and did not",
    "rp_filter": "the reverse path filter drops it",
    "no_forwarding": "the machine does not forward",
    "no_fdb": "the tunnel device has no forwarding entry for the MAC",
    "no_neighbour": "the neighbour's MAC is not known",
    "no_route": "there is no route",
    "blackhole_route": "a blackhole route swallows it",
    "unreachable_route": "an unreachable or prohibit route refuses it",
    "nexthop_dead": "the route's next hop is dead",
    "wrong_mac": "it carries another machine's MAC",
    "wrong_vtep": "it was sent to a machine that is not its target's",
    "interface_down": "an interface is down",
    "tunnel_missing": "there is no tunnel device",
    "no_listener": "nobody listens there",
    "not_answered": "the target got it and did not answer",
    "flanneld_gone": "flanneld, which carries the packets, does not run or is stopped",
    "ttl": "its TTL ran out",
    "unknown": "nothing that is looked at explains it",
}
"""Why a packet is lost, by code."""


@dataclass(frozen=True, slots=True)
class Frame:
    """The MACs of an Ethernet header."""

    src: str
    dst: str


@dataclass(frozen=True, slots=True)
class PacketFacts:
    """An IP packet's headers. `checksum` is good, bad, offloaded (a device is still to compute it) or none."""

    src: str
    dst: str
    protocol: str
    sport: int = 0
    dport: int = 0
    ttl: int = 0
    dont_fragment: bool = False
    checksum: str = "none"


def with_port(address: str, port: int) -> str:
    """An address as it is written with its port; alone where that is 0."""
    host = f"[{address}]" if port and ":" in address else address
    return f"{host}:{port}" if port else host


@dataclass(slots=True)
class Hop:
    """The packet as it was seen on one interface; see the module's text for the fields."""

    machine: str
    place: str
    interface: str
    way: str
    kind: str
    at: float
    length: int
    frame: Frame | None
    packet: PacketFacts | None
    outer: PacketFacts | None = None
    encapsulation: dict[str, Any] | None = None
    inner_frame: Frame | None = None
    pieces: int = 1
    matched: str = "nonce"
    error: str = ""
    route: dict[str, Any] | None = None
    neighbour: dict[str, Any] | None = None
    fdb: dict[str, Any] | None = None
    nat: dict[str, Any] | None = None

    @property
    def where(self) -> str:
        """The interface as it is written everywhere: `worker1/client:eth0`."""
        return f"{self.place}:{self.interface}"


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a packet was lost. Without `certain` it is what fits best, and nothing proves it."""

    code: str
    text: str
    evidence: tuple[str, ...] = ()
    certain: bool = True

    def to_json(self) -> dict[str, Any]:
        """The cause as plain data."""
        return asdict(self) | {"evidence": list(self.evidence)}


@dataclass(frozen=True, slots=True)
class Missing:
    """The first interface that did not see the packet, and the last that did."""

    direction: str
    last: Hop | None
    machine: str
    place: str
    interface: str
    way: str
    cause: Cause

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        last = self.last
        seen = {key: getattr(last, key) for key in ("machine", "place", "interface", "way")} if last else None
        return {
            "direction": self.direction,
            "last": seen,
            "machine": self.machine,
            "place": self.place,
            "interface": self.interface,
            "way": self.way,
            "cause": self.cause.to_json(),
        }


@dataclass(slots=True)
class Trace:
    """One packet's way there and its answer's way back."""

    lab: str
    backend: str
    source: str
    target: str
    packet: dict[str, Any]
    request: list[Hop] = field(default_factory=list)
    answer: list[Hop] = field(default_factory=list)
    errors: list[Hop] = field(default_factory=list)
    strays: list[Hop] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    arrived: bool = False  # the request, at its target
    delivered: bool = False
    missing: Missing | None = None

    @property
    def seconds(self) -> float | None:
        """The time from the first hop to the last; None where the packet was lost."""
        if not self.delivered or not self.answer:
            return None
        return self.answer[-1].at - self.request[0].at

    def to_json(self) -> dict[str, Any]:
        """The trace as plain data, as the module's text has it."""
        seconds = self.seconds
        return {
            "schema": SCHEMA,
            "lab": self.lab,
            "backend": self.backend,
            "source": self.source,
            "target": self.target,
            "packet": self.packet,
            "delivered": self.delivered,
            "seconds": None if seconds is None else round(seconds, 6),
            "notes": self.notes,
            "request": {"delivered": self.arrived, "hops": [asdict(hop) for hop in self.request]},
            "answer": {"delivered": self.delivered, "hops": [asdict(hop) for hop in self.answer]},
            "errors": [asdict(hop) for hop in self.errors],
            "strays": [asdict(hop) for hop in self.strays],
            "missing": self.missing.to_json() if self.missing else None,
        }
