"""What checks of IPv6 ask for: the kernel's IPv6 state, kept like `fixtures.Facts`, and what it has to be."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv6Address, IPv6Network
from typing import TYPE_CHECKING

import pytest

from testbed.errors import LabError
from testbed.fixtures import CONVERGED_SECONDS, Facts, Path
from testbed.probes.iproute6 import State6, read_state6

if TYPE_CHECKING:
    from testbed.nodes.deploy import Cluster
    from testbed.nodes.pods import Pod


def address6(pod: Pod) -> IPv6Address:
    """A pod's IPv6 address, which has to be there: an assertion about flannel."""
    assert pod.address6 is not None, f"{pod.name} has no IPv6 address"
    return pod.address6


def ends6(path: Path) -> tuple[IPv6Address, IPv6Address]:
    """The IPv6 addresses of a path's source and target."""
    from testbed.nodes.pods import Pod

    if isinstance(path.target, Pod):
        return address6(path.source), address6(path.target)
    return address6(path.source), node6(path.target_node.spec.ip6)


def node6(address: IPv6Address | None) -> IPv6Address:
    """A machine's IPv6 address; LabError in a lab without IPv6."""
    if address is None:
        raise LabError("this lab has no IPv6", hint="run dual_stack, or give EnableIPv6 and IPv6Network by --net-conf")
    return address


class Facts6:
    """IPv6 state of nodes and pods, read once and kept until `Facts.forget` or `forget`."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.cluster: Cluster = facts.cluster
        self._states: dict[str, State6] = {}
        facts.more.append(self._states)

    def node(self, name: str) -> State6:
        """State of a machine of the lab."""
        if name not in self._states:
            self._states[name] = read_state6(self.cluster.lab.node(name))
        return self._states[name]

    def forget(self) -> None:
        """Read everything anew, of IPv4 as well, when it is asked for next."""
        self.facts.forget()

    def eventually(self, look: Callable[[], None], *, seconds: float = CONVERGED_SECONDS) -> None:
        """Let assertions about state hold by a deadline; see `Facts.eventually`."""

        def attempt() -> None:
            self._states.clear()
            look()

        self.facts.eventually(attempt, seconds=seconds)

    @property
    def network(self) -> IPv6Network:
        """The IPv6Network of net-conf.json."""
        network = self.cluster.flannel.network6
        assert network is not None  # such checks are left out without
        return network

    def ip(self, node: str) -> IPv6Address:
        """A machine's IPv6 address on the underlay."""
        return node6(self.cluster.lab.spec.node(node).ip6)

    def pod_cidrs(self) -> dict[str, IPv6Network]:
        """The IPv6 podCIDR of each member."""
        return {member.name: self.cluster.pod_cidr6(member.name) for member in self.cluster.members}

    def peers(self, node: str) -> dict[str, IPv6Network]:
        """The IPv6 podCIDR of each other member."""
        return {name: cidr for name, cidr in self.pod_cidrs().items() if name != node}

    def tunnelled_peers(self, node: str) -> dict[str, IPv6Network]:
        """The IPv6 podCIDR of each peer that is reached through the tunnel."""
        return {name: cidr for name, cidr in self.peers(node).items() if self.facts.tunnelled(node, name)}

    def direct_peers(self, node: str) -> dict[str, IPv6Network]:
        """The IPv6 podCIDR of each peer that is reached by a plain route."""
        spec = self.cluster.lab.spec
        return {
            name: cidr
            for name, cidr in self.peers(node).items()
            if not self.facts.tunnelled(node, name) and spec.same_subnet(node, name)
        }

    def mtu(self, node: str) -> int:
        """The largest IPv6 packet that passes through that node's tunnel."""
        return self.cluster.flannel.mtu6_of(self.cluster.lab.spec.node(node).underlay.mtu)

    def path_mtu(self, node: str, peer: str) -> int:
        """The largest IPv6 packet between the pods of two nodes: pods have FLANNEL_MTU, the tunnel may have less."""
        return self.mtu(node) if self.facts.tunnelled(node, peer) else self.facts.mtu(node)

    def node_source(self, node: str, peer: str) -> IPv6Address:
        """The source of what a node itself sends to a peer's pods: the tunnel's address, or the node's own."""
        if self.facts.tunnelled(node, peer):
            return self.cluster.pod_cidr6(node)[0]
        return self.ip(node)


@pytest.fixture(scope="session")
def facts6(facts: Facts) -> Facts6:
    """What the kernels say of IPv6."""
    return Facts6(facts)
