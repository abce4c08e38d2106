"""What must not be removed: architecture.md, rule 4. And what must be, once there is evidence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flannel.backendlab import need_link
from tests.flannel.corelab import HEALS_WITHIN, Node, peer, until

HOST_GW = {"Type": "host-gw"}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.close()


def settled(node: Node, *numbers: int) -> None:
    until(lambda: node.programmed(*numbers), f"peers {numbers}; now {node.routes()} {node.fdb()}", HEALS_WITHIN)


def gateways(*numbers: int) -> list[str]:
    return [f"10.244.{number}.0/24 via 192.168.50.{number} dev eth0" for number in numbers]


@pytest.mark.parametrize("own", [True, False])
def test_a_store_that_comes_back_empty_removes_nothing_for_a_while_and_is_named(node: Node, own: bool) -> None:
    daemon = node.start(grace=2.0)
    daemon.list(peer(2), peer(3))
    settled(node, 2, 3)
    daemon.tell(lost="deleted")
    daemon.list(own=own)
    daemon.said("taken for a store that lost its content")
    node.ip("route del 10.244.2.0/24")  # what is kept is still looked after
    settled(node, 2, 3)
    daemon.tell(added=peer(3))  # one node registers again, the other does not
    daemon.said("did not come back")
    settled(node, 3)


def test_nodes_that_come_back_within_the_grace_period_are_kept(node: Node) -> None:
    daemon = node.start(grace=1.0)
    daemon.list(peer(2), peer(3))
    settled(node, 2, 3)
    daemon.list(own=False)
    daemon.said("taken for a store that lost its content")
    daemon.tell(added=peer(2))
    daemon.tell(added=peer(3))
    daemon.tell(added=peer(4))
    settled(node, 2, 3, 4)
    with pytest.raises(pytest.fail.Exception):
        until(lambda: not node.programmed(2, 3, 4), "a removal", 1.5)


def test_a_removal_that_is_told_is_done_even_then(node: Node) -> None:
    daemon = node.start()
    daemon.list(peer(2), peer(3))
    settled(node, 2, 3)
    daemon.list()
    daemon.said("taken for a store that lost its content")
    daemon.tell(removed=peer(2))
    settled(node, 3)


def test_a_list_cut_in_the_middle_removes_nothing(node: Node) -> None:
    daemon = node.start()
    daemon.list(peer(2), peer(3))
    settled(node, 2, 3)
    daemon.list(peer(2), peer(4), complete=False)
    settled(node, 2, 3, 4)
    daemon.list(peer(2), peer(4))  # a whole one is evidence
    settled(node, 2, 4)


def test_leftovers_stay_until_there_is_a_whole_list(node: Node) -> None:
    daemon = node.start()
    daemon.list(peer(2), peer(3))
    settled(node, 2, 3)
    assert daemon.stop() == 0
    daemon = node.start()
    daemon.list(peer(2), complete=False)
    daemon.said("incomplete")
    daemon.tell(down="away")
    daemon.said("away")
    assert node.programmed(2, 3)
    daemon.list(peer(2))
    settled(node, 2)


def test_a_store_found_empty_at_start_removes_no_leftovers(node: Node) -> None:
    daemon = node.start()
    daemon.list(peer(2))
    settled(node, 2)
    assert daemon.stop() == 0
    daemon = node.start(grace=1.0)
    daemon.list()
    daemon.said("taken for a store that lost its content")
    assert node.programmed(2)
    until(lambda: node.programmed(), "leftovers gone after the grace period")


@pytest.mark.parametrize("backend", [{"Type": "vxlan"}, HOST_GW, {"Type": "vxlan", "DirectRouting": True}])
def test_an_operators_route_inside_the_network_is_left_alone(node: Node, backend: dict[str, object]) -> None:
    theirs = [
        "10.244.66.0/24 via 192.168.50.66 dev eth0",  # just what host-gw would make, but we did not
        "blackhole 10.244.67.0/24",
        "10.244.2.0/24 via 192.168.50.254 dev eth0 metric 50",  # less preferred than ours
        "10.244.68.0/25 dev eth0 scope link",
    ]
    for route in theirs:
        node.ip(f"route add {route}")
    kind = str(backend["Type"])
    daemon = node.start(backend=backend)
    daemon.list(peer(2, kind=kind), peer(3, kind=kind))
    until(lambda: len(node.routes()) == len(theirs) + 2, "our two routes", HEALS_WITHIN)
    daemon.list(peer(2, kind=kind))
    until(lambda: len(node.routes()) == len(theirs) + 1, "one of ours gone", HEALS_WITHIN)
    daemon.tell(removed=peer(2, kind=kind))
    until(lambda: len(node.routes()) == len(theirs), "ours gone", HEALS_WITHIN)
    assert sorted(node.routes()) == sorted(theirs)


def test_host_gw_leaves_and_heals_what_upstream_does(node: Node) -> None:
    daemon = node.start(backend=HOST_GW)
    assert daemon.published() == {"ip": "192.168.50.1", "type": "host-gw", "data": None}
    daemon.list(peer(2, kind="host-gw"), peer(3, kind="host-gw"))
    until(lambda: node.routes() == gateways(2, 3), "routes", HEALS_WITHIN)
    assert not node.link("flannel.1")
    for damage in ("route del 10.244.2.0/24", "route replace 10.244.3.0/24 via 192.168.50.9", "link set eth0 down"):
        node.ip(damage)
        node.ip("link set eth0 up")
        until(lambda: node.routes() == gateways(2, 3), f"routes after {damage}", HEALS_WITHIN)


@pytest.mark.parametrize("kind", ["vxlan", "host-gw", "ipip"])
@pytest.mark.parametrize("more", ["src 192.168.50.1", "mtu 1300", "advmss 1200 initcwnd 10", "realm 7"])
def test_a_route_to_which_something_was_added_is_as_it_was_made(node: Node, kind: str, more: str) -> None:
    if kind == "ipip":
        need_link(node, "ipip")
    daemon = node.start(backend={"Type": kind})
    daemon.list(peer(2, kind=kind), peer(3, kind=kind))
    until(lambda: len(node.routes()) == 2, "routes", HEALS_WITHIN)
    made = node.routes()
    node.ip(f"route replace {made[1]} {more}")
    until(lambda: node.routes() == made, f"{made} instead of {node.routes()}", HEALS_WITHIN)
    daemon.stop()
    node.ip(f"route replace {made[1]} {more}")
    assert node.routes() != made
    again = node.start(backend={"Type": kind})
    again.list(peer(2, kind=kind), peer(3, kind=kind))
    until(lambda: node.routes() == made, f"{made} after a start", HEALS_WITHIN)


def test_host_gw_removes_its_leftovers_by_its_records_alone(node: Node) -> None:
    daemon = node.start(backend=HOST_GW)
    daemon.list(*(peer(number, kind="host-gw") for number in (2, 3)))
    until(lambda: node.routes() == gateways(2, 3), "routes", HEALS_WITHIN)
    assert daemon.stop() == 0
    assert node.routes() == gateways(2, 3)  # section 8: routes stay
    daemon = node.start(backend=HOST_GW)
    daemon.list(peer(3, kind="host-gw"), peer(4, kind="host-gw"))
    until(lambda: node.routes() == gateways(3, 4), "the leftover is gone", HEALS_WITHIN)


def test_host_gw_says_which_peer_it_cannot_reach_and_makes_no_route(node: Node) -> None:
    daemon = node.start(backend=HOST_GW)
    daemon.list(peer(2, kind="host-gw"), peer(3, ip="203.0.113.3", kind="host-gw"))
    daemon.said("cannot reach 10.244.3.0/24 by 203.0.113.3")
    assert node.routes() == gateways(2)
    node.ip("addr add 203.0.113.1/24 dev eth0")  # now it is on the link
    until(lambda: len(node.routes()) == 2, "the route comes by itself", HEALS_WITHIN)
    daemon.said("the lease of 10.244.3.0/24 is programmed now")


@pytest.mark.parametrize("restart", [False, True])
def test_host_gw_keeps_no_route_by_an_address_that_a_peer_left(node: Node, restart: bool) -> None:
    daemon = node.start(backend=HOST_GW)
    daemon.list(peer(2, kind="host-gw"), peer(3, kind="host-gw"))
    until(lambda: node.routes() == gateways(2, 3), "routes", HEALS_WITHIN)
    moved = peer(3, ip="203.0.113.3", kind="host-gw")
    if restart:
        assert daemon.stop() == 0
        daemon = node.start(backend=HOST_GW)
        daemon.list(peer(2, kind="host-gw"), moved)
    else:
        daemon.tell(added=moved)
    until(lambda: node.routes() == gateways(2), "no route by the old address", HEALS_WITHIN)


FORGOTTEN = """
import sys
sys.path.insert(0, sys.argv[1])
from ipaddress import IPv4Address, IPv4Network
from flannel.backends.hostgw import HostGwBackend
from flannel.interface import Wanted, choose
from flannel.kernel import rtnl
from flannel.kernel.values import Route
from flannel.kernel.monitor import Monitor
from flannel.kernel.netlink import Netlink
from flannel.lease import Lease, LeaseAttrs
from flannel.netconf import parse
from flannel.reconcile import Reconciler
from flannel.state import Recorded
from flannel.stores.base import Event, Snapshot

netlink, conf = Netlink(), parse('{"Network": "10.244.0.0/16", "Backend": {"Type": "host-gw"}}')
external = choose(netlink, Wanted())
own = Lease(IPv4Network("10.244.1.0/24"), LeaseAttrs(external.public, "host-gw"))
near = Lease(IPv4Network("10.244.2.0/24"), LeaseAttrs(IPv4Address("192.168.50.2"), "host-gw"))
far = Lease(IPv4Network("10.244.3.0/24"), LeaseAttrs(IPv4Address("203.0.113.3"), "host-gw"))
now = [100.0]
backend, records = HostGwBackend(conf, external), Recorded()
reconciler = Reconciler(netlink, backend, external, conf.network, own.subnet, records, clock=lambda: now[0])
reconciler.take(Snapshot((own, near, far)))
reconciler.run()
assert reconciler.next_run() < now[0] + 5, "a refused route is not tried again"
reconciler.take(Event("removed", far) if sys.argv[2] == "event" else Snapshot((own, near)))
reconciler.run()
now[0] += 1.1
reconciler.run()
monitor = Monitor()
netlink.batch([rtnl.set_route(Route(0xC6336400, 24, 0xC0A832FE, external.ifindex))])
changes, lost = monitor.read()
assert changes
reconciler.notice(changes, lost)
assert reconciler.next_run() > now[0] + 5, "the underlay is looked at for a lease that is gone"
"""


@pytest.mark.parametrize("told_by", ["event", "list"])
def test_a_lease_that_failed_and_went_is_not_tried_again(node: Node, told_by: str) -> None:
    node.run("/usr/bin/python3", "-ISc", FORGOTTEN, str(Path(__file__).parents[2]), told_by)


def test_host_gw_refuses_an_address_behind_nat(node: Node) -> None:
    daemon = node.start("--iface=eth0", "--public-ip=203.0.113.8", backend=HOST_GW, ready=False)
    assert daemon.process.wait(timeout=10) == 1
    assert "NAT" in daemon.log


@pytest.mark.parametrize("backend", [{"Type": "vxlan"}, HOST_GW, {"Type": "vxlan", "DirectRouting": True}])
@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"ip": "192.168.50.1"}, "this node's own"),
        ({"ip": "192.168.50.255"}, "that of a whole network"),
        ({"ip": "192.168.50.0"}, "that of a whole network"),
        ({"subnet": "10.244.1.0/24"}, ""),  # the list's own one: a peer's lease of that name is nobody's
        ({"subnet": "10.244.1.128/25"}, "overlaps this node's own, 10.244.1.0/24"),
        ({"subnet": "10.244.0.0/16"}, "overlaps this node's own, 10.244.1.0/24"),
        ({"subnet": "0.0.0.0/0"}, "overlaps this node's own, 10.244.1.0/24"),
    ],
)
def test_a_lease_that_would_do_harm_is_refused_by_name_whatever_the_store_says(
    node: Node, backend: dict[str, object], changed: dict[str, str], why: str
) -> None:
    kind = str(backend["Type"])
    daemon = node.start(backend=backend)
    daemon.list(peer(2, kind=kind))
    until(lambda: len(node.routes()) == 1, "a peer's route", HEALS_WITHIN)
    before = node.ip("-4 route show table all"), node.neighbours(), node.fdb()
    hostile = {**peer(66, kind=kind), **changed}
    daemon.list(peer(2, kind=kind), hostile)
    daemon.tell(added=hostile)
    if why:
        daemon.said(f"ignoring the lease of {hostile['subnet']} from {hostile['ip']}: ")
        assert why in daemon.log
    daemon.tell(added=peer(3, kind=kind))
    until(lambda: len(node.routes()) == 2, "the next lease is not held up", HEALS_WITHIN)
    daemon.tell(removed=hostile)
    daemon.tell(removed=peer(3, kind=kind))
    until(lambda: len(node.routes()) == 1, "the next lease is gone", HEALS_WITHIN)
    assert (node.ip("-4 route show table all"), node.neighbours(), node.fdb()) == before


def test_a_lease_that_begins_as_anothers_does_takes_its_place_only_when_that_goes(node: Node) -> None:
    """Both would have the same neighbour entry."""
    daemon = node.start()
    daemon.list(peer(2), peer(3))
    settled(node, 2, 3)
    second = {**peer(66), "subnet": "10.244.2.0/25"}
    daemon.tell(added=second)
    daemon.said("ignoring the lease of 10.244.2.0/25 from 192.168.50.66: its subnet 10.244.2.0/25 overlaps that of")
    daemon.said("the lease of 10.244.2.0/24, which another node has")
    settled(node, 2, 3)
    node.ip("link set flannel.1 down")  # everything is compared, and the first one keeps its place
    settled(node, 2, 3)
    daemon.tell(removed=second)
    daemon.tell(added=second)
    daemon.tell(removed=peer(2))
    until(lambda: "10.244.2.0 02:aa:bb:cc:dd:42" in node.neighbours(), "its turn has come", HEALS_WITHIN)
    daemon.tell(removed=second)
    settled(node, 3)


@pytest.mark.parametrize("backend", [{"Type": "vxlan"}, HOST_GW, {"Type": "vxlan", "DirectRouting": True}])
@pytest.mark.parametrize("subnet", ["10.244.2.128/25", "10.244.2.0/25", "10.244.2.7/32", "10.244.2.0/23"])
def test_a_subnet_inside_or_around_anothers_takes_none_of_its_packets(
    node: Node, backend: dict[str, object], subnet: str
) -> None:
    """The longer prefix would win, or the shorter one what the other node's route leaves when it is repaired."""
    kind = str(backend["Type"])
    daemon = node.start(backend=backend)
    daemon.list(peer(2, kind=kind), peer(4, kind=kind))
    until(lambda: len(node.routes()) == 2, "the peers' routes", HEALS_WITHIN)
    before = node.ip("-4 route show table all"), node.neighbours(), node.fdb()
    hostile = {**peer(66, kind=kind), "subnet": subnet}
    daemon.tell(added=hostile)
    daemon.said(f"ignoring the lease of {subnet} from 192.168.50.66: its subnet {subnet} overlaps that of the lease of")
    daemon.list(peer(2, kind=kind), peer(4, kind=kind), hostile)
    daemon.tell(added=peer(5, kind=kind))
    until(lambda: len(node.routes()) == 3, "the next lease is not held up", HEALS_WITHIN)
    daemon.tell(removed=peer(5, kind=kind))
    until(lambda: len(node.routes()) == 2, "the next lease is gone", HEALS_WITHIN)
    assert (node.ip("-4 route show table all"), node.neighbours(), node.fdb()) == before
    daemon.tell(removed=peer(2, kind=kind))
    shown = subnet.removesuffix("/32")
    until(lambda: any(route.split()[0] == shown for route in node.routes()), "its turn has come", HEALS_WITHIN)
    assert daemon.log.count("ignoring") == 1


def test_a_mac_address_that_another_node_has_takes_none_of_its_packets(node: Node) -> None:
    """There is one FDB entry for each MAC address."""
    daemon = node.start()
    daemon.list(peer(2), peer(3))
    settled(node, 2, 3)
    thief = peer(66, mac="02:aa:bb:cc:dd:02")
    daemon.tell(added=thief)
    daemon.said("ignoring the lease of 10.244.66.0/24 from 192.168.50.66: its MAC address 02:aa:bb:cc:dd:02 is that of")
    settled(node, 2, 3)
    node.ip("link set flannel.1 down")  # everything is compared, and the first one keeps it
    settled(node, 2, 3)
    daemon.tell(removed=thief)
    daemon.tell(added=peer(4))
    settled(node, 2, 3, 4)
    daemon.tell(added=thief)
    daemon.tell(removed=peer(2))
    until(lambda: "02:aa:bb:cc:dd:02 dst 192.168.50.66" in node.fdb(), "its turn has come", HEALS_WITHIN)


@pytest.mark.parametrize("goes", [2, 9])
def test_a_node_with_two_subnets_is_reached_by_the_one_that_stays(node: Node, goes: int) -> None:
    """In etcd an old lease of a node lapses beside its new one."""
    both = {number: peer(number, mac="02:aa:bb:cc:dd:02", ip="192.168.50.2") for number in (2, 9)}
    daemon = node.start()
    daemon.list(*both.values())
    until(lambda: len(node.routes()) == 2, "both routes", HEALS_WITHIN)
    daemon.tell(removed=both.pop(goes))
    until(lambda: len(node.routes()) == 1, "one of them", HEALS_WITHIN)
    assert node.fdb() == ["02:aa:bb:cc:dd:02 dst 192.168.50.2"]
    [last] = both.values()
    daemon.tell(removed=last)
    settled(node)


@pytest.mark.parametrize(("first", "then"), [({"Type": "vxlan"}, HOST_GW), (HOST_GW, {"Type": "vxlan"})])
def test_another_backend_leaves_nothing_of_the_old_one(
    node: Node, first: dict[str, object], then: dict[str, object]
) -> None:
    daemon = node.start(backend=first)
    kinds = [str(one["Type"]) for one in (first, then)]
    daemon.list(peer(2, kind=kinds[0]), peer(3, kind=kinds[0]))
    until(lambda: len(node.routes()) == 2, "routes", HEALS_WITHIN)
    assert daemon.stop() == 0
    daemon = node.start(backend=then)
    daemon.list(peer(2, kind=kinds[1]))
    if then == HOST_GW:
        until(lambda: node.routes() == gateways(2), "routes", HEALS_WITHIN)
        assert not node.link("flannel.1")
    else:
        settled(node, 2)


def test_the_blackhole_route_yields_to_the_bridges_own(node: Node) -> None:
    node.start("--ip-blackhole-route")
    until(lambda: any(route.startswith("blackhole 10.244.1.0/24") for route in node.routes()), "it is there")
    node.ip("link add cni0 type bridge")
    node.ip("addr add 10.244.1.1/24 dev cni0")
    node.ip("link set cni0 up")
    assert "dev cni0" in node.ip("route get 10.244.1.9")
    route = next(route for route in node.routes() if route.startswith("blackhole"))
    node.ip(f"route del {route}")
    until(lambda: route in node.routes(), "it heals", HEALS_WITHIN)
