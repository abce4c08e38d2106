"""A cluster whose flanneld is watched while somebody damages what it made: what is there, and how long until it is
whole again.

A damage is done while the node's flanneld is stopped by a signal, so that the test can see that it did harm; the time
to heal counts from the moment it goes on.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest

from testbed.deadline import Deadline
from testbed.flannelspec import NFTABLES, FlannelSpec
from testbed.nodes import deploy
from testbed.nodes.deploy import Cluster
from testbed.nodes.etcd import PREFIX
from testbed.nodes.store import EtcdLeases
from testbed.parallel import each
from testbed.probes.flows import http_get

#: The soak does everything in full; otherwise a short form of it is done, for CI.
FULL = os.environ.get("TESTBED_SOAK", "") not in ("", "0")
#: Seconds within which the kernel's state has to be whole again, where the kernel tells of the damage.
HEALS_WITHIN = 2.0
#: Nothing tells of a change of legacy iptables: it is looked at every 5 s.
RESYNC = 5.0
#: Seconds within which a restarted flanneld has to be at work, with peers and all.
RESTARTS_WITHIN = 8.0
#: These have one route for the whole Network, and not one for each peer.
ONE_ROUTE = ("udp", "wireguard")

State = frozenset[str]

_STATE = r"""
network=$1; shift
ip -4 route show table main; ip -6 route show table main root fd00::/8 2>/dev/null
for device; do
  ip -d -o link show dev "$device" 2>/dev/null | sed -E 's/^[0-9]+: //; s/ state [A-Z]+ / /'
  ip -o addr show dev "$device" scope global 2>/dev/null | sed -E 's/^[0-9]+: //'
  ip neigh show dev "$device" nud permanent 2>/dev/null | sed "s/^/$device neighbour /"
  ip -6 neigh show dev "$device" nud permanent 2>/dev/null | grep -v ^ff | sed "s/^/$device neighbour /"
  bridge fdb show dev "$device" 2>/dev/null | sed "s/^/$device fdb /"
done
"""
_RULES = {
    "iptables": r"iptables-save 2>/dev/null | grep FLANNEL | sed -E 's/ \[[0-9:]+\]$//'",
    "nftables": "nft list table ip flannel-ipv4 2>/dev/null",
}


class Heal(NamedTuple):
    """A damage, where it was done, and after how many seconds there was nothing left of it."""

    run: str
    what: str
    seconds: float


class HealLab:
    """A cluster, and how it heals."""

    def __init__(self, cluster: Cluster, record: Callable[[Heal], None]) -> None:
        self.cluster = cluster
        self.record = record
        self.flannel: FlannelSpec = cluster.flannel
        self.names = [node.name for node in cluster.members]
        self.victim = deploy.client_node(cluster)
        self.run = cluster.flannel.backend.run
        if cluster.flannel.rules != "iptables-nft":
            self.run += f" {cluster.flannel.rules}"

    # -- looking ---------------------------------------------------------------------------------------------------

    @property
    def devices(self) -> list[str]:
        """The tunnel devices of this configuration."""
        first = self.flannel.tunnel_device
        return [] if first is None else [first, *(["flannel-v6.1"] if self.flannel.backend.dual else [])]

    @property
    def device(self) -> str:
        """The tunnel device, which the test is about."""
        assert self.devices, f"{self.run} has no tunnel device"
        return self.devices[0]

    def sh(self, script: str, *words: str, node: str = "", check: bool = True) -> str:
        """Run a shell script on a node, by default the victim; returns what it printed."""
        return self.cluster.lab.node(node or self.victim).run(["sh", "-c", script, "sh", *words], check=check).stdout

    def ip(self, words: str, node: str = "") -> str:
        """Run `ip` on a node."""
        return self.cluster.lab.node(node or self.victim).run(["ip", *words.split()]).stdout

    def state(self, node: str = "", *, rules: bool = False) -> State:
        """What of flannel is in a node's kernel, as lines; with its rules if they are asked for."""
        script = _STATE
        if rules:
            script += _RULES["nftables" if self.flannel.rules == NFTABLES else "iptables"]
        shown = self.sh(script, str(self.flannel.network), *self.devices, node=node, check=False)
        return frozenset(re.sub(r"\s+", " ", line).strip() for line in shown.splitlines() if line.strip())

    def peers_routes(self, node: str = "") -> list[str]:
        """The routes into the Network that do not go to the node's own bridge."""
        shown = self.ip("-4 route show table main", node).splitlines()
        lines = [line.strip() for line in shown if f"dev {self.flannel.bridge}" not in line]
        base = str(self.flannel.network.network_address).rsplit(".", 2)[0]
        return [line for line in lines if line.startswith(f"{base}.")]

    def link(self, node: str = "") -> dict[str, Any]:
        """What `ip -d -j link` says of the tunnel device."""
        return dict(json.loads(self.ip(f"-d -j link show {self.device}", node))[0])

    def answers(self, names: Iterable[str] = ()) -> bool:
        """Whether the client gets an answer from the pods of these nodes, by default of all."""
        client = self.cluster.pod(f"{self.victim}/client")
        wanted = [self.cluster.pod(f"{name}/testapp").address for name in names or self.names]
        return all(not http_get(client, address).error for address in wanted)

    # -- damaging --------------------------------------------------------------------------------------------------

    @contextmanager
    def stopped(self, node: str = "") -> Iterator[None]:
        """While this lasts, the node's flanneld does nothing."""
        self.cluster.signal_flanneld(node or self.victim, "STOP")
        try:
            yield
        finally:
            self.cluster.signal_flanneld(node or self.victim, "CONT")

    def settled(self, node: str = "", *, rules: bool = False) -> State:
        """The state once two looks show the same, with every peer in it."""
        seen: list[State] = []

        def same() -> State | None:
            seen.append(self.state(node, rules=rules))
            return seen[-1] if seen[-2:-1] == seen[-1:] and self._complete(node) else None

        found = Deadline(RESTARTS_WITHIN).poll(same)
        if found is None:
            pytest.fail(f"nothing to damage: the state does not settle\n{self.log(node)}\n" + "\n".join(seen[-1]))
        return found

    def _complete(self, node: str) -> bool:
        wanted = 1 if self.flannel.backend.type in ONE_ROUTE else len(self.names) - 1
        return len(self.peers_routes(node)) >= wanted

    def heals(
        self, what: str, damage: Callable[[], object], *, node: str = "", rules: bool = False,
        within: float = HEALS_WITHIN,
    ) -> float:  # fmt: skip
        """Do some damage, and wait until everything is as it was before; returns and records after how long."""
        before = self.settled(node, rules=rules)
        with self.stopped(node):
            damage()
            after = self.state(node, rules=rules)
            assert after != before, f"{what}: this damages nothing"
        began = time.monotonic()
        whole = Deadline(within).poll(lambda: self.state(node, rules=rules) == before or None, every=0.005)
        seconds = time.monotonic() - began
        if not whole:
            now = self.state(node, rules=rules)
            difference = [f"- {line}" for line in sorted(before - now)] + [f"+ {line}" for line in sorted(now - before)]
            pytest.fail(f"{what}: not within {within} s\n" + "\n".join(difference) + f"\n{self.log(node)}")
        self.record(Heal(self.run, what, seconds))
        return seconds

    def eventually(self, what: str, holds: Callable[[], object], within: float) -> float:
        """Wait until something holds; returns and records after how long."""
        began = time.monotonic()
        if not Deadline(within).poll(lambda: bool(holds()) or None, every=0.01):
            pytest.fail(f"{what}: not within {within} s\n{self.log()}\n" + "\n".join(sorted(self.state())))
        seconds = time.monotonic() - began
        self.record(Heal(self.run, what, seconds))
        return seconds

    def log(self, node: str = "") -> str:
        """The end of flanneld's log on a node."""
        return self.cluster.flanneld_log(node or self.victim, 12)

    # -- configuration ---------------------------------------------------------------------------------------------

    def configure(self, net_conf: Mapping[str, Any]) -> None:
        """Put another configuration into etcd; it counts from the next start of a flanneld."""
        store = self.cluster.store
        assert isinstance(store, EtcdLeases)
        store.etcd.put(f"{PREFIX}/config", json.dumps(net_conf))

    def restart(self, names: Sequence[str] = (), signal: str = "TERM") -> None:
        """Restart flanneld on these nodes, by default on all, and wait until it is ready."""
        wanted = list(names or self.names)
        each(lambda name: self.cluster.stop_flanneld(name, signal), wanted)
        self.start(wanted)

    def start(self, names: Sequence[str]) -> None:
        """Start flanneld on these nodes, and wait until it is ready."""
        for name in names:
            self.sh('log=/var/log/flanneld.log; cat "$log" >>"$log.before"; : >"$log"', node=name)
        each(self.cluster.start_flanneld, names)
        ready = Deadline(deploy.READY_SECONDS).poll(lambda: all(map(self.serves, names)) or None)
        if not ready:
            late = next(name for name in names if not self.serves(name))
            pytest.fail(f"flanneld of {late} does not get ready\n{self.log(late)}")

    def serves(self, name: str) -> bool:
        """Whether the node's flanneld has come to run its backend since its log began."""
        return "Running backend." in self.sh("cat /var/log/flanneld.log", node=name, check=False)
