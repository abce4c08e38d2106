"""ipip: what it wants of the kernel, the bytes it asks for it in, and that it heals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from flannel.backends.base import BackendError, Ignored
from flannel.backends.ipip import IpipBackend
from flannel.daemon import make_backend
from flannel.kernel import rtnl
from flannel.kernel.netlink import attribute
from flannel.kernel.values import Ipip, Route
from flannel.netconf import parse
from tests.flannel.backendlab import EXTERNAL, conf, facts, lease, need_link
from tests.flannel.corelab import HEALS_WITHIN, Node, peer, until

IPIP = {"Type": "ipip"}
DST, PEER = int(IPv4Address("10.244.2.0")), int(IPv4Address("192.168.50.2"))


def test_a_peer_is_a_route_by_its_own_address() -> None:
    backend = IpipBackend(conf(Type="ipip"), EXTERNAL)
    assert backend.mtu == 1480
    assert backend.attrs().backend_type == "ipip"
    wanted = backend.wants(lease(2, "ipip"), facts("flannel.ipip"))
    assert wanted.routes == (Route(DST, 24, PEER, 7, True),)
    assert not wanted.fdb
    assert not wanted.neighbours
    # Where the tunnel is away there is nothing to route by.
    assert not backend.wants(lease(2, "ipip"), facts()).routes


def test_a_direct_peer_goes_without_the_tunnel_only_where_that_is_asked_for() -> None:
    tunnel = facts("flannel.ipip", "192.168.50.2")
    plain, direct = (
        IpipBackend(conf(Type="ipip"), EXTERNAL),
        IpipBackend(conf(Type="ipip", Directrouting=True), EXTERNAL),
    )
    assert plain.wants(lease(2, "ipip"), tunnel).routes[0].oif == 7
    assert direct.wants(lease(2, "ipip"), tunnel).routes == (Route(DST, 24, PEER, 2, True),)
    assert direct.wants(lease(3, "ipip"), tunnel).routes[0].oif == 7


def test_what_it_cannot_carry_is_refused() -> None:
    backend = IpipBackend(conf(Type="ipip"), EXTERNAL)
    with pytest.raises(Ignored, match="vxlan"):
        backend.wants(lease(2, "vxlan"), facts("flannel.ipip"))
    both = {"EnableIPv6": True, "Network": "10.244.0.0/16", "IPv6Network": "fd00:10:244::/56", "Backend": IPIP}
    with pytest.raises(BackendError, match="IPv4 alone"):
        make_backend(parse(json.dumps(both)), EXTERNAL)
    with pytest.raises(BackendError, match="too few"):
        IpipBackend(conf(Type="ipip"), EXTERNAL._replace(mtu=80))


def test_the_device_is_asked_for_and_read_by_its_attributes() -> None:
    message = rtnl.new_ipip("flannel.ipip", int(IPv4Address("192.168.50.1")), 1480)
    data = bytes.fromhex(
        "0800 0200 c0a83201"  # IFLA_IPTUN_LOCAL 192.168.50.1
        "0500 0400 00000000"  # IFLA_IPTUN_TTL 0: the inner packet's
        "0500 0900 00000000"  # IFLA_IPTUN_PROTO 0: any
        "0500 0a00 00000000"  # IFLA_IPTUN_PMTUDISC 0: the inner packet's DF
    )
    info = bytes.fromhex("0800 0100") + b"ipip" + bytes.fromhex("2400 0200") + data
    assert message.body.endswith(bytes.fromhex("3000 1200") + info)
    assert b"flannel.ipip\0" in message.body
    seen = rtnl.parse_link(message.body)
    assert (seen.kind, seen.mtu, seen.ipip) == ("ipip", 1480, Ipip(int(IPv4Address("192.168.50.1")), 0))
    one_to_one = attribute(18, attribute(1, b"ipip\0") + attribute(2, attribute(3, bytes([192, 168, 50, 9]))))
    assert rtnl.parse_link(bytes(16) + one_to_one).ipip == Ipip(0, int(IPv4Address("192.168.50.9")))


# -- the kernel --------------------------------------------------------------------------------------------------------


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    need_link(made, "ipip", "local", "192.168.50.1")
    yield made
    made.close()


def routes_of(*numbers: int) -> list[str]:
    return [f"10.244.{n}.0/24 via 192.168.50.{n} dev flannel.ipip onlink" for n in numbers]


def test_the_kernel_holds_what_upstream_leaves(node: Node) -> None:
    daemon = node.start(backend=IPIP)
    assert daemon.published() == {"ip": "192.168.50.1", "type": "ipip", "data": None}
    daemon.list(peer(2, kind="ipip"), peer(3, kind="ipip"))
    until(lambda: node.routes() == routes_of(2, 3), "the routes", HEALS_WITHIN)
    shown = node.ip("-d link show flannel.ipip")
    assert "ipip any remote any local 192.168.50.1 ttl inherit nopmtudisc" in shown
    assert "mtu 1480" in shown
    assert "NOARP" in shown
    assert "inet 10.244.1.0/32 scope global" in node.ip("-4 addr show dev flannel.ipip")
    assert "FLANNEL_MTU=1480" in node.run("cat", "/run/flannel/subnet.env")
    daemon.tell(removed=peer(2, kind="ipip"))
    until(lambda: node.routes() == routes_of(3), "one route", HEALS_WITHIN)


@pytest.mark.parametrize(
    "damage",
    [
        "link del flannel.ipip",
        "link set flannel.ipip down",
        "link set flannel.ipip mtu 1300",
        "addr del 10.244.1.0/32 dev flannel.ipip",
        "addr add 10.244.77.1/24 dev flannel.ipip",
        "route del 10.244.2.0/24",
        "route replace 10.244.2.0/24 via 192.168.50.254",
    ],
)
def test_damage_heals(node: Node, damage: str) -> None:
    daemon = node.start(backend=IPIP)
    daemon.list(peer(2, kind="ipip"), peer(3, kind="ipip"))
    until(lambda: node.routes() == routes_of(2, 3), "the routes", HEALS_WITHIN)
    node.ip(damage)

    def whole() -> bool:
        shown = node.ip("-d addr show dev flannel.ipip", check=False)
        device = "mtu 1480" in shown and "remote any" in shown and shown.count("inet ") == 1
        return device and "10.244.1.0/32" in shown and ",UP" in shown and node.routes() == routes_of(2, 3)

    until(whole, f"everything back after `ip {damage}`\n{daemon.log}", HEALS_WITHIN)


def test_a_direct_peer_takes_the_link_as_long_as_it_is_on_it(node: Node) -> None:
    node.ip("route add 172.16.9.0/24 via 192.168.50.254")
    daemon = node.start(backend={**IPIP, "DirectRouting": True})
    daemon.list(peer(2, kind="ipip"), peer(3, kind="ipip", ip="172.16.9.3"))
    direct = "10.244.2.0/24 via 192.168.50.2 dev eth0 onlink"
    tunnel = "10.244.3.0/24 via 172.16.9.3 dev flannel.ipip onlink"
    until(lambda: node.routes() == [direct, tunnel], f"one of each\n{daemon.log}", HEALS_WITHIN)
    node.ip("route add 192.168.50.2/32 via 192.168.50.254")
    moved = "10.244.2.0/24 via 192.168.50.2 dev flannel.ipip onlink"
    until(lambda: node.routes() == [moved, tunnel], f"both by the tunnel\n{daemon.log}", HEALS_WITHIN)


def test_what_is_left_over_goes_and_a_stranger_s_device_stays(node: Node) -> None:
    daemon = node.start(backend=IPIP)
    daemon.list(peer(2, kind="ipip"), peer(3, kind="ipip"))
    until(lambda: node.routes() == routes_of(2, 3), "the routes", HEALS_WITHIN)
    assert daemon.stop() == 0
    assert node.routes() == routes_of(2, 3)
    daemon = node.start(backend=IPIP)
    daemon.list(peer(3, kind="ipip"))
    until(lambda: node.routes() == routes_of(3), "what was left is gone", HEALS_WITHIN)
    daemon.stop()
    # Another backend takes over: nothing of this one stays.
    daemon = node.start(backend={"Type": "host-gw"})
    assert not node.link("flannel.ipip")
    daemon.stop()
    node.ip("link add flannel.ipip type bridge")
    refused = node.start(backend=IPIP, ready=False)
    refused.said("is no ipip tunnel")
    assert node.link("flannel.ipip")["linkinfo"]["info_kind"] == "bridge"
