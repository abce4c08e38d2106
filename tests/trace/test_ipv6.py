"""A packet of IPv6, where pods have nothing else: its way, what translates it, and why it is lost."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from ipaddress import IPv6Address

import pytest

from testbed.deadline import Deadline
from testbed.nodes.deploy import Cluster
from testbed.probes.packets import RAW_IP, Tunnel, decode
from testbed.tools import ToolUnavailable, build_tool
from testbed.trace.copies import Probe, direction_of
from testbed.trace.follow import Wish, trace
from testbed.trace.layout import of_cluster, of_record
from testbed.trace.model import Trace, with_port
from testbed.trace.sniffer import Sniffer

SOURCE, TARGET = "worker1/client", "worker3/testapp"
DEVICE = "flannel-v6.1"


@pytest.fixture(scope="module")
def six(make_cluster: Callable[..., Cluster]) -> Cluster:
    """A vxlan lab over two racks whose pods have IPv6 alone, so that Kubernetes keeps its leases."""
    try:
        build_tool("kubernetes")
    except ToolUnavailable as error:
        pytest.skip(str(error))
    return make_cluster("dual_stack", store="kubernetes", net_conf={"EnableIPv4": "false"})


def followed(cluster: Cluster, source: str, target: str, wish: Wish | None = None) -> Trace:
    """A trace that is delivered, as every one is on a lab that is well; a busy machine may take its time."""
    last: list[Trace] = []

    def once() -> bool:
        last[:] = [trace(of_cluster(cluster), source, target, wish)]
        return last[0].delivered

    assert Deadline(20).poll(once), last[0].to_json()
    return last[0]


def test_through_the_tunnel(six: Cluster) -> None:
    found = followed(six, SOURCE, TARGET)
    ends = [str(six.pods[name].address6) for name in (SOURCE, TARGET)]
    assert [found.packet["source_address"], found.packet["target_address"]] == ends
    assert all(hop.packet is not None and [hop.packet.src, hop.packet.dst] == ends for hop in found.request)
    places = [hop.where for hop in found.request]
    assert places[:1] + places[-1:] == [f"{SOURCE}:eth0", f"{TARGET}:eth0"]
    by_place = {hop.where: hop for hop in found.request}
    tunnel, nic = by_place[f"worker1:{DEVICE}"], by_place["worker1:eth0"]
    spec = six.lab.spec
    assert tunnel.fdb
    assert tunnel.fdb["dst"] == str(spec.node("worker3").ip6)
    assert tunnel.route
    assert f"dev {DEVICE} onlink" in tunnel.route["text"]
    assert nic.outer
    assert (nic.outer.src, nic.outer.dst) == (str(spec.node("worker1").ip6), str(spec.node("worker3").ip6))
    assert f"worker3:{DEVICE}" in places
    assert len(found.answer) == len(found.request)
    assert not found.strays
    assert not found.errors


def test_what_is_too_large_goes_in_pieces(six: Cluster) -> None:
    found = followed(six, SOURCE, TARGET, Wish(size=12000))
    assert (found.request[0].pieces, found.request[-1].pieces) == (2, 2)


@pytest.mark.parametrize("protocol", ["icmp", "udp", "tcp"])
def test_outside_with_its_translation(six: Cluster, protocol: str) -> None:
    found = followed(six, SOURCE, "outside", Wish(protocol))
    assert found.packet["target_address"] == str(six.lab.spec.outside.ip6)
    changed = [hop for hop in found.request if hop.nat]
    assert [hop.where for hop in changed] == ["worker1:eth0"]
    nat = changed[0].nat
    assert nat
    own = str(six.pods[SOURCE].address6)
    assert own in nat["before"]
    assert str(six.lab.spec.node("worker1").ip6) in nat["after"]
    assert "MASQUERADE" in nat["rule"]
    assert f"src={own}" in nat["conntrack"]


@dataclass(frozen=True)
class Fault:
    """What is made wrong, and what the trace has to say of it. `{…}` are names that the lab gives."""

    name: str
    on: str
    do: tuple[str, ...]
    undo: tuple[str, ...]
    missing: str
    code: str
    says: str
    wish: Wish = field(default_factory=Wish)
    target: str = TARGET


FAULTS = (
    Fault(
        "port-blocked", "worker3",
        ("ip6tables-nft -I INPUT -p udp --dport {port} -j DROP",),
        ("ip6tables-nft -D INPUT -p udp --dport {port} -j DROP",),
        f"worker3:{DEVICE}", "port_blocked", "--dport {port} -j DROP",
    ),
    Fault(
        "no-fdb", "worker1",
        (f"bridge fdb del {{vtep_mac}} dev {DEVICE} dst {{vtep}}",),
        (f"bridge fdb append {{vtep_mac}} dev {DEVICE} dst {{vtep}}",),
        "worker1:eth0", "no_fdb", "{vtep_mac}",
    ),
    Fault(
        "no-neighbour", "worker1",
        (f"ip neighbour del {{base}} dev {DEVICE}",),
        (f"ip neighbour replace {{base}} dev {DEVICE} lladdr {{vtep_mac}} nud permanent",),
        f"worker1:{DEVICE}", "no_neighbour", "{base}",
    ),
    Fault(
        "no-route-but-the-default", "worker1",
        ("ip -6 route del {cidr}",),
        (f"ip -6 route replace {{cidr}} via {{base}} dev {DEVICE} onlink",),
        f"worker1:{DEVICE}", "no_route", "by the default route",
    ),
    Fault(
        "blackhole", "worker1",
        ("ip -6 route del {cidr}", "ip -6 route add blackhole {cidr}"),
        ("ip -6 route del blackhole {cidr}", f"ip -6 route replace {{cidr}} via {{base}} dev {DEVICE} onlink"),
        "worker1:?", "blackhole_route", "blackhole {cidr}",
    ),
    Fault(
        "no-forwarding", "worker3",
        ("sysctl -w net.ipv6.conf.all.forwarding=0",),
        ("sysctl -w net.ipv6.conf.all.forwarding=1",),
        "worker3:cni0", "no_forwarding", "net.ipv6.conf.all.forwarding = 0",
    ),
    Fault(
        "no-pings", TARGET,
        ("sysctl -w net.ipv6.icmp.echo_ignore_all=1",),
        ("sysctl -w net.ipv6.icmp.echo_ignore_all=0",),
        f"{TARGET}:eth0", "not_answered", "net.ipv6.icmp.echo_ignore_all = 1",
    ),
    Fault(
        "nobody-listens", "worker3", (), (), "worker3:eth0", "no_listener", "nobody listens", Wish("tcp"), "worker3",
    ),
)  # fmt: skip


@pytest.fixture
def undone() -> Iterator[ExitStack]:
    """Takes what has to be undone at the test's end."""
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_cause_is_named(six: Cluster, fault: Fault, undone: ExitStack) -> None:
    followed(six, SOURCE, TARGET)
    layout = of_cluster(six)
    cidr = six.pod_cidr6("worker3")
    words = {
        "port": str(six.flannel.port),
        "vtep": str(six.lab.spec.node("worker3").ip6),
        "vtep_mac": six.lab.node("worker3").run(["ip", "-br", "link", "show", DEVICE]).stdout.split()[2],
        "cidr": str(cidr),
        "base": str(cidr[0]),
    }
    for node in six.members:
        undone.callback(six.signal_flanneld, node.name, "CONT")
        six.signal_flanneld(node.name, "STOP")
    place = layout.place(fault.on)
    for command in fault.undo[::-1]:
        undone.callback(place.run, shlex.split(command.format(**words)), check=False)
    for command in fault.do:
        place.run(shlex.split(command.format(**words)))
    missing = trace(layout, SOURCE, fault.target, fault.wish).missing
    assert missing is not None
    said = "\n".join([missing.cause.text, *missing.cause.evidence])
    assert (missing.cause.code, f"{missing.place}:{missing.interface}") == (fault.code, fault.missing), said
    assert fault.says.format(**words) in said


def test_both_layouts_of_a_lab_are_one(six: Cluster) -> None:
    ours, theirs = of_cluster(six), of_record(six.lab)
    assert (ours.six, ours.carrier, dict(ours.pods)) == (theirs.six, theirs.carrier, dict(theirs.pods))
    assert (ours.six, ours.carrier) == (True, DEVICE)


# --- without a lab


def ip6(protocol: int, payload: bytes) -> bytes:
    """A packet of IPv6."""
    ends = IPv6Address("fd00::1").packed + IPv6Address("fd00::2").packed
    return b"\x60\0\0\0" + len(payload).to_bytes(2, "big") + bytes([protocol, 64]) + ends + payload


def datagram(port: int) -> bytes:
    """A UDP header, and what is behind it."""
    return (40000).to_bytes(2, "big") + port.to_bytes(2, "big") + (16).to_bytes(2, "big") + b"\0\0" + bytes(8)


@pytest.mark.parametrize(
    ("packet", "outer"),
    [
        (ip6(17, datagram(51821)), True),
        (ip6(17, datagram(51820)), False),
        (ip6(17, datagram(51821)[:6]), False),
        (ip6(6, datagram(51821)), False),
        (ip6(50, bytes(16)), True),
    ],
    ids=["the port", "another port", "cut", "another protocol", "esp"],
)
def test_outer_packets_are_told_by_port_or_protocol(packet: bytes, outer: bool) -> None:
    sniffer = Sniffer({"needles": [], "outer": [{"port": 51821}, {"protocol": 50}]})
    assert sniffer.is_outer(packet) == outer


@pytest.mark.parametrize(("offset", "direction"), [(0, "request"), (1448, "piece")])
def test_pieces_are_told_from_their_first_one(offset: int, direction: str) -> None:
    more = b"\x3a\0" + (offset | 1).to_bytes(2, "big") + bytes(4)  # the fragment's header, ICMPv6 behind it
    echo = b"\x80\0\0\0\0\1\0\1" + bytes(1440)
    packet = decode(ip6(44, more + echo), RAW_IP, Tunnel())
    assert packet.ip6
    assert packet.ip6.offset == offset
    assert direction_of(packet, Probe("icmp", b"12345678", 0, 1)) == direction


@pytest.mark.parametrize(
    ("address", "port", "text"),
    [("10.0.0.1", 80, "10.0.0.1:80"), ("fd00::1", 80, "[fd00::1]:80"), ("fd00::1", 0, "fd00::1")],
)
def test_an_address_and_its_port(address: str, port: int, text: str) -> None:
    assert with_port(address, port) == text
