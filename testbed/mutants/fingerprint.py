"""What of a lab has to be the same again once a mutation is undone, in a form that two moments can be compared by."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from testbed.model import Role
from testbed.parallel import each
from testbed.probes.iproute import Link, State, read_state

if TYPE_CHECKING:
    from testbed.labs.base import Node
    from testbed.nodes.deploy import Cluster
    from testbed.nodes.pods import Pod

SYSCTLS = ("net.ipv4.ip_forward", "net.ipv4.fib_multipath_hash_policy", "net.ipv4.conf.all.rp_filter")
FLAGS = frozenset({"UP", "LOWER_UP", "NOARP", "POINTOPOINT"})
STEADY = {"bridge": ("ageing_time", "stp_state", "vlan_filtering")}
"""The attributes of devices that do not change by themselves; all, for kinds that are not here."""
_MAC = re.compile(r"\b[0-9a-f]{2}(?::[0-9a-f]{2}){5}\b")
COUNTERS = re.compile(r" ?\[\d+:\d+\]")

Fingerprint = Mapping[str, tuple[str, ...]]
"""By place (`worker1`, `worker1/client`) what was found there, line by line, sorted where order means nothing."""


def take(cluster: Cluster) -> Fingerprint:
    """Read the state of every cluster node, leaf and pod. Raises LabError."""
    spec = cluster.lab.spec
    machines = [*cluster.members, *(cluster.lab.node(leaf.name) for leaf in spec.of_role(Role.LEAF))]
    found: dict[str, list[str]] = {}
    in_order: dict[str, tuple[str, ...]] = {}
    macs: dict[str, str] = {}

    def machine(node: Node) -> None:
        state = read_state(node)
        macs.update({link.mac: f"the MAC of {node.name}'s {link.name}" for link in state.links if link.kind == "vxlan"})
        found[node.name] = _network(state, fdb=True)
        in_order[node.name] = (*_rules(cluster, node), *_sysctls(node))

    def pod(one: Pod) -> None:
        own = str(one.address4)
        lines = _network(read_state(one, fdb=False), fdb=False)
        found[one.name] = [line.replace(own, "its own") for line in lines]

    each(machine, machines)
    each(pod, list(cluster.pods.values()))
    return {
        place: (*sorted(_with_owners(line, macs) for line in lines), *in_order.get(place, ()))
        for place, lines in sorted(found.items())
    }


def digest(fingerprint: Fingerprint) -> str:
    """A fingerprint as one hash."""
    return hashlib.sha256(repr(sorted(fingerprint.items())).encode()).hexdigest()


def differences(before: Fingerprint, after: Fingerprint) -> list[str]:
    """What is there only before (`-`) or only after (`+`), each with its place."""
    lines = []
    for place in sorted({*before, *after}):
        old, new = before.get(place, ()), after.get(place, ())
        lines += [f"{place}: - {line}" for line in old if line not in new]
        lines += [f"{place}: + {line}" for line in new if line not in old]
        if not lines and old != new:
            lines.append(f"{place}: the order is another one")
    return lines


def _network(state: State, *, fdb: bool) -> list[str]:
    lines = [_device(link) for link in state.links]
    lines += [f"route {r.dst} {r.type} {r.protocol} {r.hops} {sorted(r.flags)} {r.metric}" for r in state.routes]
    kept = (n for n in state.neighbours if "PERMANENT" in n.state and not n.address.is_multicast)
    lines += [f"neighbour {n.address} {n.dev} {n.mac}" for n in kept]
    if fdb:
        lines += [f"fdb {e.mac} {e.dev} {e.dst} {e.state}" for e in state.fdb if e.dst]
    return sorted(lines)


def _with_owners(line: str, macs: Mapping[str, str]) -> str:
    """A line with the tunnels' MACs by whose they are: one that was given anew is as good, where everybody knows it."""
    return _MAC.sub(lambda mac: macs.get(mac[0], mac[0]), line)


def _device(link: Link) -> str:
    data = {key: link.data.get(key) for key in STEADY.get(link.kind, tuple(sorted(link.data)))}
    # A pod that was made anew has other names and addresses of its own.
    name = "veth" if link.kind == "veth" and link.master else link.name
    mac = link.mac if link.kind in ("vxlan", "") else ""
    addresses = [str(address) for address in link.addresses]
    port = {key: link.port.get(key) for key in ("hairpin", "state")} if link.master else {}
    flags = sorted(link.flags & FLAGS)
    return f"link {name} {link.kind} {mac} mtu {link.mtu} {flags} {link.queue} {addresses} {data} {port}"


def _rules(cluster: Cluster, node: Node) -> Iterable[str]:
    if node.name not in {member.name for member in cluster.members}:
        return []
    rules = cluster.flannel.rules
    argv = ["nft", "list", "ruleset"] if rules == "nftables" else [f"{rules}-save"]
    text = node.run(argv).stdout
    lines = (COUNTERS.sub("", line).strip() for line in text.splitlines() if not line.startswith("#"))
    return [f"rule {line}" for line in lines if line]


def _sysctls(node: Node) -> Iterable[str]:
    return [f"sysctl {line}" for line in node.run(["sysctl", *SYSCTLS]).stdout.splitlines()]
