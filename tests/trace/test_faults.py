"""Every cause that the trace knows, made in a real lab: it is named, and the first interface that missed the packet."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import pytest

from testbed.deadline import Deadline
from testbed.nodes.deploy import Cluster
from testbed.trace.follow import Wish, trace
from testbed.trace.layout import Layout, of_cluster

SOURCE, TARGET = "worker1/client", "worker3/testapp"


@dataclass(frozen=True)
class Fault:
    """What is made wrong, and what the trace has to say of it.

    `{…}` in commands and in `missing` are names that the lab gives.  `held`: while flanneld, which would mend it, is
    stopped.
    """

    name: str
    on: str
    do: tuple[str, ...]
    undo: tuple[str, ...]
    missing: str
    code: str
    says: str = ""
    held: bool = True
    direction: str = "request"
    wish: Wish = field(default_factory=Wish)
    source: str = SOURCE
    target: str = TARGET


FAULTS = (
    Fault(
        "port-blocked", "worker3",
        ("iptables-nft -I INPUT -p udp --dport {port} -j DROP",),
        ("iptables-nft -D INPUT -p udp --dport {port} -j DROP",),
        "worker3:flannel.1", "port_blocked", r"--dport {port} -j DROP",
    ),
    Fault(
        "port-blocked-where-it-starts", "worker1",
        ("iptables-nft -I OUTPUT -p udp --dport {port} -j DROP",),
        ("iptables-nft -D OUTPUT -p udp --dport {port} -j DROP",),
        "worker1:eth0", "port_blocked", r"OUTPUT",
    ),
    Fault(
        "port-blocked-on-the-way-back", "worker1",
        ("iptables-nft -I INPUT -p udp --dport {port} -j DROP",),
        ("iptables-nft -D INPUT -p udp --dport {port} -j DROP",),
        "worker1:flannel.1", "port_blocked", r"worker1 blocks UDP port {port}", direction="answer",
    ),
    Fault(
        "nft-rule-on-a-leaf", "leaf2",
        ("nft add table inet mine", "nft add chain inet mine pass {{ type filter hook forward priority 0; }}",
         "nft add rule inet mine pass udp dport {port} counter drop"),
        ("nft delete table inet mine",),
        "leaf2:br0", "port_blocked", r"udp dport {port} drop",
    ),
    Fault(
        "forward-policy", "worker1",
        ("iptables-nft -D FORWARD -m comment --comment {comment} -j FLANNEL-FWD", "iptables-nft -P FORWARD DROP"),
        ("iptables-nft -P FORWARD ACCEPT", "iptables-nft -A FORWARD -m comment --comment {comment} -j FLANNEL-FWD"),
        "worker1:flannel.1", "forward_policy", r"policy DROP",
    ),
    Fault(
        "rule-for-the-pod", "worker3",
        ("iptables-nft -I FORWARD -d {target} -j REJECT",),
        ("iptables-nft -D FORWARD -d {target} -j REJECT",),
        "worker3:cni0", "firewall_rule", r"-j REJECT",
    ),
    Fault(
        "no-fdb", "worker1",
        ("bridge fdb del {vtep_mac} dev flannel.1 dst {vtep}",),
        ("bridge fdb append {vtep_mac} dev flannel.1 dst {vtep}",),
        "worker1:eth0", "no_fdb", r"{vtep_mac}",
    ),
    Fault(
        "fdb-to-another-node", "worker1",
        ("bridge fdb replace {vtep_mac} dev flannel.1 dst {other}",),
        ("bridge fdb replace {vtep_mac} dev flannel.1 dst {vtep}",),
        "", "wrong_vtep", r"dst {other}",
    ),
    Fault(
        "no-neighbour", "worker1",
        ("ip neighbour del {base} dev flannel.1",),
        ("ip neighbour replace {base} dev flannel.1 lladdr {vtep_mac} nud permanent",),
        "worker1:flannel.1", "no_neighbour", r"{base}",
    ),
    Fault(
        "wrong-vtep-mac", "worker1",
        ("ip neighbour replace {base} dev flannel.1 lladdr 02:00:00:00:00:99 nud permanent",
         "bridge fdb append 02:00:00:00:00:99 dev flannel.1 dst {vtep}"),
        ("ip neighbour replace {base} dev flannel.1 lladdr {vtep_mac} nud permanent",
         "bridge fdb del 02:00:00:00:00:99 dev flannel.1 dst {vtep}"),
        "worker3:cni0", "wrong_mac", r"VTEP MAC 02:00:00:00:00:99",
    ),
    Fault(
        "no-route", "worker1",
        ("ip route del {cidr}", "ip route del default"),
        ("ip route replace default via {router} dev eth0", "ip route replace {cidr} via {base} dev flannel.1 onlink"),
        "worker1:?", "no_route", r"worker1 has no route to {target}",
    ),
    Fault(
        "no-route-but-the-default", "worker1",
        ("ip route del {cidr}",),
        ("ip route replace {cidr} via {base} dev flannel.1 onlink",),
        "worker1:flannel.1", "no_route", r"by the default route",
    ),
    Fault(
        "nexthop-dead", "worker1",
        ("ip link add dead0 type veth peer name dead1", "ip link set dead0 up",
         "ip address add 198.51.100.1/24 dev dead0", "sysctl -w net.ipv4.conf.dead0.ignore_routes_with_linkdown=1",
         "ip route replace {cidr} via 198.51.100.2 dev dead0", "ip route del default"),
        ("ip route replace default via {router} dev eth0", "ip route replace {cidr} via {base} dev flannel.1 onlink",
         "ip link del dead0"),
        "worker1:dead0", "nexthop_dead", r"dead",
    ),
    Fault(
        "blackhole", "worker1",
        ("ip route replace blackhole {cidr}",),
        ("ip route replace {cidr} via {base} dev flannel.1 onlink",),
        "worker1:?", "blackhole_route", r"blackhole {cidr}",
    ),
    Fault(
        "unreachable", "worker1",
        ("ip route replace unreachable {cidr}",),
        ("ip route replace {cidr} via {base} dev flannel.1 onlink",),
        "worker1:?", "unreachable_route", r"unreachable {cidr}",
    ),
    Fault(
        "no-way-back", "worker3",
        ("ip route replace blackhole {own_cidr}",),
        ("ip route replace {own_cidr} via {own_base} dev flannel.1 onlink",),
        "worker3:?", "blackhole_route", r"blackhole {own_cidr}", direction="answer",
    ),
    Fault(
        "reverse-path-filter", "worker3",
        ("sysctl -w net.ipv4.conf.flannel/1.rp_filter=1", "ip route replace {own_cidr} via {own_router} dev eth0"),
        ("ip route replace {own_cidr} via {own_base} dev flannel.1 onlink",
         "sysctl -w net.ipv4.conf.flannel/1.rp_filter=0"),
        "worker3:cni0", "rp_filter", r"dev eth0",
    ),
    Fault(
        "no-forwarding", "worker3",
        ("sysctl -w net.ipv4.ip_forward=0",),
        ("sysctl -w net.ipv4.ip_forward=1",),
        "worker3:cni0", "no_forwarding", r"ip_forward = 0",
    ),
    Fault(
        "mtu-of-a-routers-port", "leaf1",
        ("ip link set dev swp1 mtu 1400", "ip link set dev swp2 mtu 1400"),
        ("ip link set dev swp1 mtu {mtu}", "ip link set dev swp2 mtu {mtu}"),
        "leaf1:swp\\d", "mtu", r"1400", wish=Wish(size=2000, dont_fragment=True), held=False,
        source="worker1", target="worker3",
    ),
    Fault(
        "mtu-of-a-switchs-port", "leaf1",
        ("ip link set dev node3 mtu 1400",),
        ("ip link set dev node3 mtu {mtu}",),
        "leaf1:node3", "mtu", r"node3 mtu 1400", wish=Wish(size=2000), held=False,
        target="worker2/testapp",
    ),
    Fault(
        "larger-than-the-pods-mtu", "worker1", (), (),
        "worker1/client:eth0", "mtu", r"no more than {pod_mtu} bytes", wish=Wish(size=20000, dont_fragment=True),
    ),
    Fault(
        "checksum", "leaf1",
        ("nft add table netdev mine",
         "nft add chain netdev mine in {{ type filter hook ingress device node2 priority 0; }}",
         "nft add rule netdev mine in udp dport {port} udp checksum set 0x1234"),
        ("nft delete table netdev mine",),
        "worker3:flannel.1", "checksum", r"wrong from leaf1",
    ),
    Fault(
        "tunnel-down", "worker3",
        ("ip link set dev flannel.1 down",),
        ("ip link set dev flannel.1 up", "ip route replace {own_cidr} via {own_base} dev flannel.1 onlink"),
        "worker3:flannel.1", "interface_down", r"flannel.1",
    ),
    Fault(
        "switch-port-down", "leaf1",
        ("ip link set dev node3 down",),
        ("ip link set dev node3 up",),
        "leaf1:node3", "interface_down", r"node3", held=False, target="worker2/testapp",
    ),
    Fault(
        "nobody-listens", "worker3", (), (),
        "worker3:eth0", "no_listener", r"nobody listens", wish=Wish(protocol="tcp"), source="worker1/client",
        target="worker3",
    ),
    Fault(
        "no-pings", "{target_pod}",
        ("sysctl -w net.ipv4.icmp_echo_ignore_all=1",),
        ("sysctl -w net.ipv4.icmp_echo_ignore_all=0",),
        "worker3/testapp:eth0", "not_answered", r"answers no pings", direction="answer",
    ),
    Fault(
        "rule-in-the-pod", "{target_pod}",
        ("nft add table ip mine", "nft add chain ip mine in {{ type filter hook input priority 0; }}",
         "nft add rule ip mine in udp dport 7 counter drop"),
        ("nft delete table ip mine",),
        "worker3/testapp:eth0", "firewall_rule", r"udp dport 7 drop", wish=Wish(protocol="udp"), direction="answer",
    ),
    Fault(
        "ttl", "leaf1",
        ("nft add table netdev mine",
         "nft add chain netdev mine in {{ type filter hook ingress device node2 priority 0; }}",
         "nft add rule netdev mine in udp dport {port} ip ttl set 1"),
        ("nft delete table netdev mine",),
        "leaf1:swp\\d", "ttl", r"ran out at leaf1",
    ),
    Fault(
        "tunnel-of-another-vni", "worker3",
        ("ip link del flannel.1",
         "ip link add flannel.1 type vxlan id 9 local {vtep} dev eth0 dstport {port} nolearning",
         "ip link set flannel.1 up"),
        ("ip link del flannel.1",),
        "worker3:flannel.1", "tunnel_missing", r"VNI 9, and the packet 1",
    ),
    Fault(
        "tunnel-gone", "worker3", ("ip link del flannel.1",), (),
        "worker3:flannel.1", "tunnel_missing", r"has no flannel.1",
    ),
    Fault(
        "nothing-is-wrong", "worker1", (), (), "", "",
    ),
)  # fmt: skip


class Scene:
    """A lab, and the names that faults use."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.layout: Layout = of_cluster(cluster)
        spec = cluster.lab.spec
        self.words = {
            "port": str(cluster.flannel.port),
            "comment": '"flanneld forward"',
            "mtu": str(spec.mtu),
            "pod_mtu": str(cluster.flannel.mtu_of(spec.mtu)),
            "target": str(cluster.pods[TARGET].address),
            "target_pod": TARGET,
            "vtep": str(spec.node("worker3").ip),
            "vtep_mac": self.tunnel_mac(),
            "other": str(spec.node("worker2").ip),
            "cidr": str(cluster.pod_cidr("worker3")),
            "base": str(cluster.pod_cidr("worker3")[0]),
            "router": str(spec.node("worker1").gateway),
            "own_cidr": str(cluster.pod_cidr("worker1")),
            "own_base": str(cluster.pod_cidr("worker1")[0]),
            "own_router": str(spec.node("worker3").gateway),
        }

    def tunnel_mac(self) -> str:
        shown = self.cluster.lab.node("worker3").run(["ip", "-br", "link", "show", "flannel.1"]).stdout
        return shown.split()[2]

    def delivered(self, source: str, target: str) -> bool:
        return trace(self.layout, source, target).delivered

    @contextmanager
    def having(self, fault: Fault) -> Iterator[None]:
        self.words["vtep_mac"] = self.tunnel_mac()  # one that was made anew has another
        place = self.layout.place(fault.on.format(**self.words))
        with ExitStack() as stack:
            if fault.held:
                for node in self.cluster.members:
                    stack.callback(self.cluster.signal_flanneld, node.name, "CONT")
                    self.cluster.signal_flanneld(node.name, "STOP")
            for command in fault.undo:
                stack.callback(place.run, self.argv(command), check=False)
            for command in fault.do:
                place.run(self.argv(command))
            yield

    def argv(self, command: str) -> list[str]:
        import shlex

        return shlex.split(command.format(**self.words).replace("'", ""))


@pytest.fixture(scope="module")
def scene(vxlan: Cluster) -> Scene:
    return Scene(vxlan)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_cause_is_named(scene: Scene, fault: Fault) -> None:
    whole = Deadline(20).poll(lambda: scene.delivered(fault.source, fault.target))
    assert whole, "the lab was not whole before"
    with scene.having(fault):
        found = trace(scene.layout, fault.source, fault.target, fault.wish)
    if not fault.code:
        assert found.delivered
        assert found.missing is None
        return
    assert not found.delivered
    missing = found.missing
    assert missing is not None
    said = "\n".join([missing.cause.text, *missing.cause.evidence])
    seen = (missing.cause.code, f"{missing.place}:{missing.interface}", missing.direction)
    assert missing.cause.code == fault.code, (seen, said)
    if fault.missing:
        assert re.fullmatch(fault.missing.replace(".", r"\.").replace("?", r"\?"), seen[1]), (seen, said)
    assert missing.direction == fault.direction, (seen, said)
    assert re.search(fault.says.format(**scene.words), said), (seen, said)
