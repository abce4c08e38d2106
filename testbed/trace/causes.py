"""Why a packet was lost: from the last interface that saw it to the first that did not, and what lies between.

Each step on a packet's way can lose it in a few ways only, so what is looked at depends on the step: over a wire, over
a bridge, into a tunnel, out of one, through a machine's routing, or at the target itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from testbed.trace.copies import Sorted
from testbed.trace.decisions import seen_by_ip
from testbed.trace.layout import Layout
from testbed.trace.loss import Loss
from testbed.trace.model import Cause, Hop, Missing, Trace
from testbed.trace.reasons import forwarding, size, target, tunnels, wires
from testbed.trace.sites import Question, Site

Reason = Callable[[Loss], Cause | None]


@dataclass(frozen=True, slots=True)
class Step:
    """Where the packet should have been seen next, and what can keep it from there, the likeliest first."""

    machine: str
    place: str
    interface: str
    way: str
    reasons: tuple[Reason, ...]


def failing(trace: Trace) -> tuple[str, Hop | None]:
    """The direction in which the packet was lost, and where it was last seen; None where it was never sent."""
    if not trace.arrived:
        return "request", trace.request[-1] if trace.request else None
    return "answer", (trace.answer or trace.request)[-1]


def questions(trace: Trace, layout: Layout) -> dict[str, set[Question]]:
    """What to ask routing about where a packet was lost, by place."""
    _, last = failing(trace)
    address = trace.packet["target_address"]
    if last is None:
        return {trace.source: {(address,)}}
    packet = seen_by_ip(last)
    found: dict[str, set[Question]] = {last.place: set()}
    if packet is None:
        return found
    asked = found[last.place]
    asked.add((packet.src,))  # where the reverse path filter would have it come from
    if last.way == "in":
        asked.add((packet.dst, "from", packet.src, "iif", last.interface))
    else:
        asked.add((packet.dst,))
        asked |= {(layout.address_of(node),) for node in layout.lab.spec.cluster_nodes if last.kind == "tunnel"}
    return found


def find(
    trace: Trace, layout: Layout, found: Sorted, sites: Mapping[str, Site], error: str, mtu: int
) -> Missing | None:
    """Where a packet was lost, and why; None where it was not, as when only the sender missed its answer."""
    direction, last = failing(trace)
    loss = Loss(trace, layout, found, sites, direction, last, error, mtu)
    if found.refused:
        loss = Loss(trace, layout, found, sites, "request", trace.request[-1], error, mtu)
    elif direction == "answer" and last is not None and last.place == trace.source and trace.answer:
        return None
    step = next_step(loss)
    if (by_default := _took_default(loss)) is not None:
        return by_default
    if loss.refused:
        step = Step(step.machine, step.place, step.interface, step.way, (forwarding.dropped, target.nobody_listens))
    loss = loss.expecting(step.machine, step.place, step.interface)
    every = (wires.went_astray, size.too_large_by_error, *step.reasons, target.by_error)
    cause = next((cause for reason in every if (cause := reason(loss)) is not None), None)
    cause = cause or Cause("unknown", "nothing that is looked at explains it", loss.hints(), certain=False)
    return Missing(loss.direction, loss.last, step.machine, step.place, step.interface, step.way, cause)


def _took_default(loss: Loss) -> Missing | None:
    """A packet for a pod elsewhere that left its node by the default route: the pod's own route is what is missing."""
    trace, layout = loss.trace, loss.layout
    source, target = (trace.source, trace.target) if loss.direction == "request" else (trace.target, trace.source)
    node, hops = layout.node_of(source).name, trace.request if loss.direction == "request" else trace.answer
    if target not in layout.pods or layout.pods[target].node == node or loss.last is None or loss.last.machine == node:
        return None
    for before, hop in pairwise(hops):
        plain = hop.machine == node and hop.kind == "underlay" and hop.outer is None and hop.matched == "nonce"
        if plain and hop.route and hop.route["text"].startswith("default "):
            device = layout.carrier or hop.interface
            text = f"{node} has no route to {target}'s subnet, and sends the packet by the default route"
            cause = Cause("no_route", text, (hop.route["text"],))
            return Missing(loss.direction, before, node, node, device, "out", cause)
    return None


def next_step(loss: Loss) -> Step:
    """The step that was not seen."""
    last = loss.last
    if last is None:
        place = loss.trace.source
        device = loss.chosen_device((loss.trace.packet["target_address"],)) or "eth0"
        return Step(loss.layout.node_of(place).name, place, device, "out", SENDING)
    return _inwards(loss, last) if last.way == "in" else _outwards(loss, last)


def _inwards(loss: Loss, last: Hop) -> Step:
    """What follows once a packet has come into a place."""
    here, site, packet = (last.machine, last.place), loss.site, seen_by_ip(last)
    bridge = site.master_bridge(last.interface) if site else ""
    if site is None or packet is None:
        return Step(*here, "?", "out", ())
    if bridge:
        if last.frame is not None and last.frame.dst != site.link(bridge).get("address"):
            return Step(*here, _port(loss, last, bridge), "out", ACROSS)
        return Step(*here, bridge, "in", UP_FROM_PORT)
    if last.outer is not None and site.owns(last.outer.dst):
        return Step(*here, loss.layout.carrier or "?", "in", OUT_OF_TUNNEL)
    if site.owns(packet.dst):
        return Step(*here, loss.chosen_device((packet.src,)) or last.interface, "out", AT_TARGET)
    return Step(*here, loss.egress() or "?", "out", THROUGH)


def _outwards(loss: Loss, last: Hop) -> Step:
    """What follows once a packet has left by an interface."""
    layout, here = loss.layout, (last.machine, last.place)
    if last.kind == "tunnel":
        return Step(*here, layout.lab.spec.node(last.machine).underlay.name, "out", INTO_TUNNEL)
    if loss.site is not None and loss.site.kind(last.interface) == "bridge":
        return Step(*here, _port(loss, last, last.interface), "out", ACROSS)
    if last.place in layout.pods:
        return Step(last.machine, last.machine, loss.peer_name(last) or "veth?", "in", OVER_WIRE)
    if far := layout.cable(last.machine, last.interface):
        return Step(far.node, far.node, far.iface, "in", OVER_WIRE)
    pod = loss.pod_behind(last)
    return Step(last.machine, pod or last.machine, "eth0" if pod else "?", "in", OVER_WIRE)


def _port(loss: Loss, last: Hop, bridge: str) -> str:
    """The port behind which the packet's next receiver is; where the bridge does not know it, by the lab's cables."""
    entry = loss.site.port(last.frame.dst, bridge) if loss.site and last.frame else None
    if entry:
        return str(entry["ifname"])
    if last.kind != "fabric":
        return loss.veth_of_end() or "?"
    end = loss.trace.target if loss.direction == "request" else loss.trace.source
    node = loss.layout.lab.spec.node(loss.layout.node_of(end).name)
    far = loss.layout.cable(node.name, node.underlay.name) if node.rack else None
    return far.iface if far and far.node == last.machine else "?"


SENDING = (
    size.refused_as_too_large,
    forwarding.dropped,
    forwarding.bad_route,
    forwarding.egress_down,
    forwarding.unknown_neighbour,
)
OVER_WIRE = (wires.wire_down, size.larger_than_wire)
ACROSS = (forwarding.dropped, forwarding.egress_down, wires.wrong_mac_behind_bridge, size.larger_than_egress)
UP_FROM_PORT = (forwarding.dropped, forwarding.egress_down, wires.port_blocks)
THROUGH = (
    wires.not_its_mac,
    forwarding.dropped,
    forwarding.does_not_forward,
    forwarding.reverse_path,
    forwarding.bad_route,
    forwarding.egress_down,
    size.larger_than_egress,
    forwarding.unknown_neighbour,
    forwarding.ttl_over,
)
INTO_TUNNEL = (
    tunnels.flanneld_does_not_carry,
    tunnels.no_forwarding_entry,
    forwarding.dropped,
    tunnels.no_way_to_vtep,
    forwarding.egress_down,
    size.larger_than_tunnel,
    forwarding.unknown_neighbour,
)
OUT_OF_TUNNEL = (
    wires.bad_checksum,
    forwarding.dropped,
    tunnels.tunnel_not_there,
    tunnels.flanneld_does_not_carry,
    forwarding.reverse_path,
)
AT_TARGET = (
    wires.not_its_mac,
    forwarding.dropped,
    wires.bad_checksum,
    forwarding.reverse_path,
    target.ignores_echo,
    forwarding.bad_route,
    forwarding.unknown_neighbour,
    target.nobody_listens,
    target.not_answered,
)
