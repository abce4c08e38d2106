"""What checks ask for: the cluster, the captures and their window, the kernel's state, and the path under test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import TYPE_CHECKING, Any

import pytest

from testbed.checks import PathSpec, paths_of
from testbed.console import Ticks
from testbed.deadline import Deadline
from testbed.errors import LabBusyError, LabError, TestbedError
from testbed.labs import Quiet
from testbed.labs.base import Node, Place
from testbed.model import LinkEnd
from testbed.probes.capture import Captures, Target, Window
from testbed.probes.iproute import Link, State, read_state
from testbed.probes.packets import Tunnel
from testbed.runstate import RUN

if TYPE_CHECKING:
    from testbed.nodes.alone import Alone
    from testbed.nodes.deploy import Cluster
    from testbed.nodes.pods import Pod


FIGURE = "figure"
"""By which name what a check measured travels with its report."""

CONVERGED_SECONDS = 5.0
"""How long a change of leases may take until every node has followed."""


@dataclass(frozen=True, slots=True)
class Path:
    """The path under test, its ends found in the lab. `target` is a pod, or a node or the outside host."""

    kind: str
    source: Pod
    target: Place
    address4: IPv4Address | None  # the target's
    source_node: Node
    target_node: Node
    wires: tuple[str, str] = ("", "")  # where to look for what both nodes' links carry, see `wire_of`

    @property
    def address(self) -> IPv4Address:
        """The target's IPv4 address; LabError where pods have IPv6 alone."""
        if self.address4 is None:
            raise LabError("this path's target has no IPv4 address", where=self.kind)
        return self.address4

    @property
    def source_nic(self) -> str:
        """The source node's underlay interface, as captures name it."""
        return f"{self.source_node.name}:{self.source_node.spec.underlay.name}"

    @property
    def target_nic(self) -> str:
        """The target node's underlay interface, as captures name it."""
        return f"{self.target_node.name}:{self.target_node.spec.underlay.name}"

    @property
    def pods(self) -> tuple[Pod, Pod]:
        """Both ends, where both are pods. Raises LabError where one is not."""
        from testbed.nodes.pods import Pod

        if not isinstance(self.target, Pod):
            raise LabError(f"the path {self.kind} ends at no pod")
        return self.source, self.target


class Facts:
    """The kernel's state on nodes and in pods, read once and kept until a check that changes it says so."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._states: dict[str, State] = {}
        self._leases: dict[str, dict[str, Any]] | None = None
        self.more: list[dict[str, Any]] = []  # what others know of the same nodes, forgotten with the rest

    def node(self, name: str) -> State:
        """State of a machine of the lab."""
        if name not in self._states:
            self._states[name] = read_state(self.cluster.lab.node(name))
        return self._states[name]

    def pod(self, pod: Pod) -> State:
        """State inside a pod."""
        if pod.name not in self._states:
            self._states[pod.name] = read_state(pod, fdb=False)
        return self._states[pod.name]

    def forget(self) -> None:
        """Read everything anew when it is asked for next."""
        for known in (self._states, *self.more):
            known.clear()
        self._leases = None

    def eventually(self, look: Callable[[], object], *, seconds: float = CONVERGED_SECONDS) -> None:
        """Let assertions about state hold by a deadline: leases reach a node a moment after its peer has got one."""
        last: list[AssertionError] = []

        def attempt() -> bool:
            try:
                look()
            except AssertionError as error:
                last[:] = [error]
                self.forget()
                return False
            return True

        if not Deadline(seconds).poll(attempt):
            raise last[0]

    def leases(self) -> dict[str, dict[str, Any]]:
        """The leases in the store by node; see `Cluster.leases`."""
        if self._leases is None:
            self._leases = self.cluster.leases()
        return self._leases

    def link(self, node: str, name: str) -> Link:
        """A device that has to be there for the check to have a meaning: an assertion about flannel."""
        link = self.node(node).link(name)
        assert link is not None, f"{node} has no device {name}"
        return link

    def address(self, node: str, name: str) -> IPv4Address:
        """A device's first address, which has to be there."""
        link = self.link(node, name)
        assert link.addresses, f"{node}: {name} has no address"
        return link.addresses[0].ip

    def next_hop_mac(self, path: Path) -> str:
        """Where a node's packets for the path's other node go first: that node itself, or the leaf before it."""
        source = path.source_node.spec
        if path.kind != "XS":
            return path.target_node.spec.underlay.mac
        return self.leaf_mac(source.name)

    def leaf_mac(self, node: str) -> str:
        """The MAC that a node's leaf has towards it."""
        spec = self.cluster.lab.spec.node(node)
        links = self.node(str(spec.rack)).links
        return next(link.mac for link in links if spec.gateway in {address.ip for address in link.addresses})

    def host_veth(self, pod: Pod) -> Link:
        """The node's end of a pod's interface."""
        inside = self.pod(pod).link("eth0")
        assert inside is not None, f"{pod.name} has no eth0"
        found = [link for link in self.node(pod.node.name).links if link.index == inside.peer_index]
        assert len(found) == 1, f"{pod.name}: no device of {pod.node.name} has index {inside.peer_index}"
        return found[0]

    def mtus(self, pod: Pod) -> tuple[int, int, int]:
        """The MTUs that there are on a pod's way out: the bridge's, its veth's and its interface's."""
        inside = self.pod(pod).link("eth0")
        assert inside is not None, f"{pod.name} has no eth0"
        return self.link(pod.node.name, self.cluster.flannel.bridge).mtu, self.host_veth(pod).mtu, inside.mtu

    def mtu(self, node: str) -> int:
        """FLANNEL_MTU as it has to be on that node."""
        return self.cluster.flannel.mtu_of(self.cluster.lab.spec.node(node).underlay.mtu)

    def pod_cidrs(self) -> dict[str, IPv4Network]:
        """The podCIDR of each member."""
        return {member.name: self.cluster.pod_cidr(member.name) for member in self.cluster.members}

    def peers(self, node: str) -> dict[str, IPv4Network]:
        """The podCIDR of each other member."""
        return {name: cidr for name, cidr in self.pod_cidrs().items() if name != node}

    def tunnelled(self, node: str, peer: str) -> bool:
        """Whether packets from a node to that peer have to be encapsulated."""
        flannel = self.cluster.flannel
        direct = flannel.direct and self.cluster.lab.spec.same_subnet(node, peer)
        return flannel.backend.tunnels and not direct

    def tunnelled_peers(self, node: str) -> dict[str, IPv4Network]:
        """The podCIDR of each peer that is reached through the tunnel."""
        return {name: cidr for name, cidr in self.peers(node).items() if self.tunnelled(node, name)}

    def direct_peers(self, node: str) -> dict[str, IPv4Network]:
        """The podCIDR of each peer that is reached by a plain route: only those in the node's own subnet can be."""
        spec = self.cluster.lab.spec
        return {
            name: cidr
            for name, cidr in self.peers(node).items()
            if not self.tunnelled(node, name) and spec.same_subnet(node, name)
        }

    def node_source(self, node: str, peer: str) -> IPv4Address:
        """The source address of what a node itself sends to a peer's pods: the tunnel's, or the node's own."""
        if self.tunnelled(node, peer):
            return self.cluster.pod_cidr(node)[0]
        return self.cluster.lab.spec.node(node).ip


def wire_of(cluster: Cluster, node: str) -> str:
    """Where to look for what a node's underlay link carries, as captures name it.

    The node's own interface, but for ipsec: there the kernel shows what it has decrypted on that interface once more,
    so it is the interface at the other end of the cable.
    """
    spec = cluster.lab.spec
    own = LinkEnd(node, spec.node(node).underlay.name)
    if cluster.flannel.backend.type != "ipsec":
        return str(own)
    ends = next((link.a, link.b) for link in spec.links if own in (link.a, link.b))
    return str(ends[1] if ends[0] == own else ends[0])


def tunnel_of(cluster: Cluster) -> Tunnel:
    """How the cluster's packets are encapsulated."""
    kind = cluster.flannel.backend.type
    return Tunnel(kind if kind in ("vxlan", "udp", "ipip") else None, cluster.flannel.port)


def capture_targets(cluster: Cluster, facts: Facts) -> list[Target]:
    """Every interface that checks look at."""
    flannel, spec = cluster.flannel, cluster.lab.spec
    found = []
    for member in cluster.members:
        names = [spec.node(member.name).underlay.name, flannel.tunnel_device, flannel.tunnel_device6, flannel.bridge]
        found += [
            Target(f"{member.name}:{name}", member, name)
            for name in dict.fromkeys(names)
            if name and facts.node(member.name).link(name) is not None
        ]
        far = wire_of(cluster, member.name)
        if far not in {target.name for target in found}:
            machine, _, iface = far.partition(":")
            found.append(Target(far, cluster.lab.node(machine), iface))
    for pod in cluster.pods.values():
        found.append(Target(f"{pod.name}:eth0", pod.node, "eth0", pod.netns, pod.name))
        veth = facts.host_veth(pod).name
        found.append(Target(f"{pod.node.name}:{veth}", pod.node, veth, pod=pod.name))
    outside = cluster.lab.node(spec.outside.name)
    found += [Target(f"{outside.name}:{iface.name}", outside, iface.name) for iface in spec.outside.ifaces]
    return found


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The lab of this run with flannel on it; the whole run ends where it does not come up."""
    from testbed.nodes import deploy

    run = request.config.stash[RUN]
    progress = Ticks(run.screen.stream) if run.screen else Quiet()
    try:
        running = deploy.bring_up(run.options, progress)
    except TestbedError as error:
        request.session.shouldfail = "the lab did not come up"
        run.refused = isinstance(error, LabBusyError)
        raise
    run.cluster = running
    yield running
    if run.screen:
        run.screen.close_bar()
    if run.options.keep:
        running.lab.detach()
    else:
        with progress.step("Removing the lab"):
            running.lab.down()


@pytest.fixture(scope="session")
def facts(cluster: Cluster) -> Facts:
    """What the kernels say."""
    return Facts(cluster)


@pytest.fixture(scope="session")
def captures(cluster: Cluster, facts: Facts) -> Iterator[Captures]:
    """The captures of the run, on every interface that matters."""
    with Captures(tunnel_of(cluster)) as running:
        running.start(capture_targets(cluster, facts))
        yield running


@pytest.fixture
def window(captures: Captures, cluster: Cluster, facts: Facts) -> Iterator[Window]:
    """What the check sees of the captures; closing it tells whether packets were dropped meanwhile."""
    if captures.ended:
        facts.forget()
        captures.restart_ended(capture_targets(cluster, facts))
    before = captures.drops()
    view = captures.window()
    view.baseline(before)
    yield view
    view.close()


@pytest.fixture
def alone(cluster: Cluster) -> Iterator[Alone]:
    """A flanneld of the check's own, in a network of its own, so that nobody minds what becomes of it."""
    from testbed.nodes.alone import flanneld_alone

    with flanneld_alone(cluster) as found:
        if found is None:
            pytest.skip("a flanneld of a check's own keeps its leases in etcd")
        yield found


class Figures:
    """What a check measured, for its report.

        "figures": [{"figure": "1 TCP connection, SS", "value": 0.82, "unit": "of the bare underlay", "bound": 0.3}, …]

    `bound` is what the check asks for, None for a figure that is reported and judged by nothing.
    """

    def __init__(self, item: pytest.Item) -> None:
        self._item = item

    def add(self, figure: str, value: float, unit: str, bound: float | None = None) -> None:
        """Keep a figure."""
        kept: Any = {"figure": figure, "value": round(value, 4), "unit": unit, "bound": bound}
        self._item.user_properties.append((FIGURE, kept))


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Figures:
    """Where the check puts what it measured."""
    return Figures(request.node)


class Paths:
    """Every path of the lab, for checks that need a certain one."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.specs = paths_of(cluster.lab.spec, cluster.flannel.backend.run)

    def take(self, kind: str) -> Path:
        """The path of that kind; the check is skipped, with the reason, where the lab has none."""
        spec = self.specs[kind]
        if spec.reason:
            pytest.skip(spec.reason)
        return resolve(self.cluster, spec)

    def remote(self) -> Path:
        """A path to another node's pod, through the tunnel where there is one."""
        kinds = ("XS", "SS")
        return self.take(next((kind for kind in kinds if not self.specs[kind].reason), "SS"))


@pytest.fixture
def paths(cluster: Cluster) -> Paths:
    """The lab's paths by kind."""
    return Paths(cluster)


@pytest.fixture
def path(request: pytest.FixtureRequest, cluster: Cluster) -> Path:
    """The path under test; the check runs once for each of its row's."""
    return resolve(cluster, request.param)


def resolve(cluster: Cluster, spec: PathSpec) -> Path:
    """Find a path's ends in the lab."""
    source = cluster.pods[spec.source]
    if spec.target in cluster.pods:
        pod = cluster.pods[spec.target]
        wires = wire_of(cluster, source.node.name), wire_of(cluster, pod.node.name)
        return Path(spec.kind, source, pod, pod.address4, source.node, pod.node, wires)
    node = cluster.lab.node(spec.target)
    return Path(spec.kind, source, node, cluster.lab.spec.node(spec.target).ip, source.node, node)
