"""The trace itself: look everywhere, send one packet, and make sense of what was seen."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from testbed.deadline import time_scale
from testbed.errors import LabError
from testbed.labs import interpreter
from testbed.model import Role
from testbed.nodes.pods import ECHO_PORT, HTTP_PORT
from testbed.trace import causes, decisions, sites
from testbed.trace.copies import Probe, Sorted, encrypted_hops, sort
from testbed.trace.layout import Layout
from testbed.trace.model import Hop, Trace
from testbed.trace.watch import Copy, Watch, program

PROTOCOLS = ("icmp", "udp", "tcp")
PORTS = {"icmp": 0, "udp": ECHO_PORT, "tcp": HTTP_PORT}
NONCE_BYTES = 8
DEFAULT_SIZE, LEAST_SIZE, MOST_SIZE = 56, 16, 65000
"""Bytes of payload; with fewer than the least the nonce would not be whole in it."""

WAIT_SECONDS = 1.0
"""How long an answer may take; a request that has to ask for MACs on its way takes milliseconds."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be sent. `size` is the payload's, in bytes; `port` the target's, 0 for the test application's own."""

    protocol: str = "icmp"
    size: int = DEFAULT_SIZE
    dont_fragment: bool = False
    wait: float = WAIT_SECONDS
    port: int = 0


@dataclass(frozen=True, slots=True)
class Sent:
    """What the sender's own kernel told."""

    answered: bool
    address: str
    error: str
    mtu: int


def trace(layout: Layout, source: str, target: str, wish: Wish | None = None) -> Trace:
    """Follow one packet from an endpoint to another and its answer back.

    Raises InputError for an endpoint that is not there, LabError where the lab cannot be looked at.
    """
    wish = wish or Wish()
    address = layout.address(target)
    layout.place(source)
    nonce = secrets.token_bytes(NONCE_BYTES)
    probe = Probe(wish.protocol, nonce, wish.port or PORTS[wish.protocol], secrets.randbits(32))
    machines = machines_between(layout, source, target)
    before = sites.count(layout, [*places_of(layout, source, target)])
    with Watch(layout, machines, probe.needles, outer_of(layout)) as watch:
        sent = send(layout, source, address, probe, wish)
        copies = watch.packets()
    found = sort(copies, layout, probe)
    if layout.encrypted:
        weave(found, copies, layout, probe)
    packet = {
        "protocol": wish.protocol,
        "size": wish.size if wish.protocol != "tcp" else 0,
        "dont_fragment": wish.dont_fragment,
        "nonce": nonce.hex(),
        "source_address": sent.address,
        "target_address": address,
    }
    notes = [*watch.faults, *notes_of(layout, wish)]
    trace = Trace(layout.lab.spec.id, layout.run, source, target, packet, notes=notes)
    part(trace, layout, found)
    trace.delivered = sent.answered and not found.refused
    state = look(trace, layout, found, before)
    decisions.decide(found, state)
    if not trace.delivered:
        trace.missing = causes.find(trace, layout, found, state, sent.error, sent.mtu)
    return trace


def machines_between(layout: Layout, source: str, target: str) -> list[str]:
    """The machines to look at: both ends' own, every router, and the other nodes, where a packet may stray to."""
    ends = [layout.node_of(source).name, layout.node_of(target).name]
    roles = (Role.LEAF, Role.SPINE, Role.OUTSIDE, Role.NODE)
    others = [node.name for role in roles for node in layout.lab.spec.of_role(role)]
    return list(dict.fromkeys([*ends, *others]))


def outer_of(layout: Layout) -> list[dict[str, int]]:
    """Which outer packets to keep although they do not show what they carry."""
    if layout.backend == "wireguard":
        return [{"port": layout.port or 0}]
    if layout.backend == "ipsec":
        return [{"protocol": 50}, *([{"port": layout.port}] if layout.port else [])]
    return []


def notes_of(layout: Layout, wish: Wish) -> list[str]:
    """What a reader has to know about the trace."""
    notes = []
    if layout.encrypted:
        notes.append(f"outer packets are matched by time and size only: {layout.backend} encrypts")
    if wish.protocol == "tcp":
        notes.append("the packet is a SYN, which has no payload; the kernel it came from resets the connection")
    return notes


def send(layout: Layout, source: str, address: str, probe: Probe, wish: Wish) -> Sent:
    """Send the packet, and wait for its answer. Raises LabError where it cannot even be tried."""
    payload = (probe.nonce * (wish.size // len(probe.nonce) + 1))[: wish.size]
    order = {
        "protocol": wish.protocol,
        "target": address,
        "port": probe.port,
        "payload": payload.hex(),
        "number": probe.number,
        "dont_fragment": wish.dont_fragment,
        "wait": wish.wait * time_scale(),
    }
    argv = [interpreter(), "-I", "-S", "-c", program("sender.py")]
    result = layout.place(source).run(argv, stdin=json.dumps(order), timeout=wish.wait * time_scale() + 20)
    try:
        told: dict[str, Any] = json.loads(result.stdout)
        return Sent(told["answered"], told["address"], told["error"], told["mtu"])
    except (ValueError, KeyError) as error:
        raise LabError(f"the sender told nothing: {result.stdout[:200]!r}", where=source) from error


def places_of(layout: Layout, source: str, target: str) -> list[str]:
    """The places that a packet between these ends may come through: both, their machines, and every router."""
    routers = [node.name for node in layout.lab.spec.nodes if node.role is not Role.NODE]
    ends = [source, target]
    return list(dict.fromkeys([*ends, *(layout.node_of(end).name for end in ends), *routers]))


def look(trace: Trace, layout: Layout, found: Sorted, before: Mapping[str, sites.Before]) -> dict[str, sites.Site]:
    """Look at the places that it came through, and where it was lost at all that may explain it."""
    lost = not trace.delivered
    questions = decisions.questions(found)
    visited = {hop.place for hop in (*found.request, *found.answer)}
    translating = {hop.place for hops in (found.request, found.answer) for _, hop, _, _ in decisions.translations(hops)}
    if lost:
        for place, more in causes.questions(trace, layout).items():
            questions.setdefault(place, set()).update(more)
        visited |= set(places_of(layout, trace.source, trace.target))
    return sites.look(layout, visited, before, sites.Looking(questions, translating, lost))


def weave(found: Sorted, copies: list[Copy], layout: Layout, probe: Probe) -> None:
    """Put the encrypted packets between the hops that show what they carry."""
    began = next((copy.when for copy in copies if probe.contains(copy.data)), 0)
    outer = encrypted_hops(copies, layout, probe, began)
    nodes = {str(address): node.name for node in layout.lab.spec.cluster_nodes for address in (node.ip, node.ip6)}
    for hops in (found.request, found.answer):
        if not hops:
            continue
        first, start = hops[0], hops[0].at
        end = next((hop.at for hop in hops if hop.machine != first.machine), hops[-1].at + 0.05)
        mine = [
            hop for hop in outer
            if hop.outer is not None and start <= hop.at <= end and nodes.get(hop.outer.src) == first.machine
        ]  # fmt: skip
        least = min((hop.length for hop in mine if hop.length >= first.length), default=0)
        hops += [hop for hop in mine if hop.length in (least, least - 14, least + 14)]
        # Where a kernel shows on one device what it has decrypted there, both have one time.
        hops.sort(key=lambda hop: (hop.at, hop.matched == "nonce"))


def part(trace: Trace, layout: Layout, found: Sorted) -> None:
    """Part the hops from the strays, and say whether the request arrived."""
    ends = {trace.source, trace.target}
    nodes = {layout.node_of(end).name for end in ends}
    trace.errors = found.errors
    for direction in ("request", "answer"):
        for hop in getattr(found, direction):
            (trace.strays if is_stray(layout, hop, ends, nodes) else getattr(trace, direction)).append(hop)
    trace.arrived = any(arrives(hop, trace.target) for hop in trace.request)


def is_stray(layout: Layout, hop: Hop, ends: set[str], nodes: set[str]) -> bool:
    """Whether a hop is at a pod or a node that is neither end's, or leads to one."""
    if hop.place in layout.pods:
        return hop.place not in ends
    far = layout.cable(hop.machine, hop.interface) if hop.way == "out" else None
    machines = [hop.machine, *([far.node] if far else [])]
    return any(layout.lab.spec.node(name).role is Role.NODE and name not in nodes for name in machines)


def arrives(hop: Hop, end: str) -> bool:
    """Whether a hop is the arrival at an endpoint: what carries it may have to be opened there first."""
    return hop.place == end and hop.way == "in" and hop.outer is None and hop.packet is not None
