"""A packet that was lost: where it was last seen, what is known of the places around, and what was to come next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from testbed.trace.copies import Sorted
from testbed.trace.decisions import seen_by_ip
from testbed.trace.layout import Layout
from testbed.trace.model import Hop, PacketFacts, Trace
from testbed.trace.sites import Question, Site

ETHERNET_BYTES = 14


@dataclass(frozen=True)
class Loss:
    """A packet that was lost: where it was last seen, what is known of the places around, and what was to come next."""

    trace: Trace
    layout: Layout
    found: Sorted
    sites: Mapping[str, Site]
    direction: str
    last: Hop | None
    error: str = ""  # what the sender's own kernel said, and the MTU with it
    mtu: int = 0
    machine: str = ""
    place: str = ""
    interface: str = ""

    def expecting(self, machine: str, place: str, interface: str) -> Loss:
        """The same, with what was to come next."""
        return replace(self, machine=machine, place=place, interface=interface)

    @property
    def refused(self) -> bool:
        """Whether the answer is a refusal, so that the request has arrived all the same."""
        return self.found.refused

    @property
    def site(self) -> Site | None:
        """The place where the packet was last seen, or was to be sent from."""
        return self.sites.get(self.last.place if self.last else self.trace.source)

    @property
    def packet(self) -> PacketFacts | None:
        """The packet as the last place's routing saw it."""
        return seen_by_ip(self.last) if self.last else None

    @property
    def bytes(self) -> int:
        """The length of the packet as it was last seen, from its IP header on."""
        if self.last is None:
            return 0
        return self.last.length - (ETHERNET_BYTES if self.last.frame else 0)

    @property
    def destination(self) -> str:
        """Where the packet was to go as the last place saw it."""
        return self.packet.dst if self.packet else str(self.trace.packet["target_address"])

    @property
    def question(self) -> Question:
        """The question to the last place's routing that counts."""
        if self.last is None or self.packet is None:
            return (self.destination,)
        if self.at_end:
            return (self.packet.src,)
        if self.last.way == "in":
            return self.packet.dst, "from", self.packet.src, "iif", self.last.interface
        return (self.packet.dst,)

    @property
    def at_end(self) -> bool:
        """Whether it has arrived where it was to go, so that the answer is what is missing."""
        site, packet = self.site, self.packet
        return bool(self.last and self.last.way == "in" and site and packet and site.owns(packet.dst))

    @property
    def vtep(self) -> str:
        """The tunnel's other end for the packet that went into it; "" where it is not known."""
        if self.last is not None and self.last.fdb and self.last.fdb.get("dst"):
            return str(self.last.fdb["dst"])
        end = self.trace.target if self.direction == "request" else self.trace.source
        return self.layout.address_of(self.layout.lab.spec.node(self.layout.node_of(end).name))

    def chosen_device(self, question: Question) -> str:
        """The device that routing chose; "" where it chose none, or several."""
        chosen = self.site.chosen.get(question) if self.site else None
        return str(chosen.route.get("dev", "")) if chosen and chosen.route else ""

    def egress(self) -> str:
        """The device that the packet was to leave by, also where the route to it is no good."""
        found = self.chosen_device(self.question)
        if not found and self.site is not None:
            route = self.site.longest(self.destination) or {}
            if route.get("type", "unicast") == "unicast":  # one of IPv6 that refuses has the device lo
                found = str(route.get("nexthops", [route])[0].get("dev", ""))
        return found

    def peer_name(self, hop: Hop) -> str:
        """The node's end of a pod's interface."""
        inside, node = self.sites.get(hop.place), self.sites.get(hop.machine)
        number = inside.link(hop.interface).get("link_index") if inside else None
        return next((n for n, link in node.links.items() if link.get("ifindex") == number), "") if node else ""

    def pod_behind(self, hop: Hop) -> str:
        """The end's pod whose interface is the other end of a node's veth."""
        number = self.site.link(hop.interface).get("ifindex") if self.site else None
        for end in (self.trace.source, self.trace.target):
            pod = self.sites.get(end)
            here = pod is not None and end in self.layout.pods and pod.machine == hop.machine
            if pod and here and number in {link.get("link_index") for link in pod.links.values()}:
                return end
        return ""

    def veth_of_end(self) -> str:
        """The veth of the end's pod that is on the last machine."""
        end = self.trace.target if self.direction == "request" else self.trace.source
        pod, node = self.sites.get(end), self.site
        if pod is None or node is None or pod.machine != node.machine:
            return ""
        number = pod.link("eth0").get("link_index")
        return next((name for name, link in node.links.items() if link.get("ifindex") == number), "")

    def hints(self) -> tuple[str, ...]:
        """What may help where nothing explains the loss."""
        lines = [f"{self.last.where} saw it last" if self.last else f"{self.trace.source} did not send it"]
        lines += [f"its kernel says: {self.error}"] if self.error else []
        for place, site in self.sites.items():
            moved = ", ".join(f"{key} +{value}" for key, value in sorted(site.moved.items()))
            lines += [f"{place}: {moved}"] if moved else []
        return tuple(lines)
