"""vxlan in the kernel: what upstream leaves there, and that every kind of damage heals by one code path."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flannel.corelab import HEALS_WITHIN, Node, peer, until

DEVICE = "vxlan id 1 local 192.168.50.1 dev eth0 srcport 0 0 dstport 8472 nolearning ttl auto ageing 300 udpcsum"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.close()


def heals(node: Node, *numbers: int) -> None:
    until(lambda: node.programmed(*numbers), f"peers {numbers}; now {node.routes()} {node.fdb()}", HEALS_WITHIN)


def test_the_kernel_holds_what_upstream_leaves(node: Node) -> None:
    daemon = node.start()
    published = daemon.published()
    daemon.list(peer(2), peer(3))
    heals(node, 2, 3)
    shown = node.ip("-d link show flannel.1")
    assert DEVICE in shown
    assert "noudp6zerocsumtx noudp6zerocsumrx" in shown
    assert "gbp" not in shown
    link = node.link()
    assert (link["mtu"], link["operstate"], link["qdisc"]) == (1450, "UNKNOWN", "noqueue")
    assert published == {"ip": "192.168.50.1", "type": "vxlan", "data": {"VNI": 1, "VtepMAC": link["address"]}}
    assert int(link["address"][:2], 16) & 3 == 2  # locally administered, unicast
    (address,) = json.loads(node.ip("-4 -j addr show dev flannel.1"))[0]["addr_info"]
    assert (address["local"], address["prefixlen"], address["scope"]) == ("10.244.1.0", 32, "global")
    assert "proto boot scope global onlink" in node.ip("-d route show 10.244.2.0/24")


def test_the_address_counts_as_given_not_as_random(node: Node) -> None:
    node.start()
    node.run("mount", "-t", "sysfs", "sysfs", "/sys")
    assert node.run("cat", "/sys/class/net/flannel.1/addr_assign_type").strip() == "3"


def test_configured_values_reach_the_device(node: Node) -> None:
    backend = {"Type": "vxlan", "VNI": 4000, "Port": 4789, "MTU": 1400, "GBP": True, "Learning": True}
    node.start(backend=backend)
    shown = node.ip("-d link show flannel.4000")
    assert "vxlan id 4000" in shown
    assert "dstport 4789" in shown
    assert "nolearning" not in shown
    assert " gbp" in shown
    assert node.link("flannel.4000")["mtu"] == 1350


def test_order_on_the_way_in_is_neighbour_fdb_route(node: Node) -> None:
    daemon = node.start()
    daemon.list()
    record = node.folder / "monitor"
    monitor = node.spawn("ip", "monitor", "all-nsid", "neigh", "route", output=record)

    def listens() -> bool:
        node.ip("neigh replace 192.168.50.77 lladdr 02:00:00:00:00:77 dev eth0")
        node.ip("neigh del 192.168.50.77 dev eth0")
        return "192.168.50.77" in record.read_text()

    until(listens, "the monitor listens")
    daemon.tell(added=peer(2))
    heals(node, 2)
    until(lambda: "10.244.2.0/24 via" in record.read_text(), "the route is told of")
    monitor.kill()
    monitor.wait()
    lines = [line for line in record.read_text().splitlines() if "10.244.2.0" in line or "02:aa:bb:cc:dd:02" in line]
    order = ["route" if "/24 via" in line else "neighbour" if "10.244.2.0" in line else "fdb" for line in lines]
    assert order == ["neighbour", "fdb", "route"]


@pytest.mark.parametrize(
    "damage",
    [
        "link del flannel.1",
        "link set flannel.1 down",
        "link set flannel.1 mtu 1300",
        "addr del 10.244.1.0/32 dev flannel.1",
        "route del 10.244.2.0/24",
        "route replace 10.244.2.0/24 via 192.168.50.254",
        "neigh del 10.244.2.0 dev flannel.1",
        "neigh replace 10.244.2.0 lladdr 02:00:00:00:00:99 dev flannel.1 nud permanent",
        "neigh replace 10.244.2.0 lladdr 02:aa:bb:cc:dd:02 dev flannel.1 nud reachable",
        "addr add 10.244.77.1/24 dev flannel.1",
    ],
)
def test_damage_heals(node: Node, damage: str) -> None:
    daemon = node.start()
    daemon.list(peer(2), peer(3))
    heals(node, 2, 3)
    before = node.link()["address"]
    node.ip(damage)

    def whole() -> bool:
        link = node.link()
        up = bool(link) and "UP" in link["flags"] and link["mtu"] == 1450 and link["address"] == before
        addresses = node.ip("-4 -o addr show dev flannel.1", check=False).count("inet ")
        return (
            up and addresses == 1 and "10.244.1.0/32" in node.ip("-4 addr show dev flannel.1") and node.programmed(2, 3)
        )

    until(whole, f"everything back after `ip {damage}`", HEALS_WITHIN)


@pytest.mark.parametrize(
    "words",
    [
        "del 02:aa:bb:cc:dd:02 dev flannel.1 dst 192.168.50.2 self",
        "replace 02:aa:bb:cc:dd:02 dev flannel.1 dst 192.168.50.77 self permanent",
    ],
)
def test_a_damaged_fdb_entry_heals(node: Node, words: str) -> None:
    daemon = node.start()
    daemon.list(peer(2), peer(3))
    heals(node, 2, 3)
    node.run("bridge", "fdb", *words.split())
    heals(node, 2, 3)


def test_a_removal_of_what_is_gone_already_holds_up_nobody(node: Node) -> None:
    """Upstream tries to remove a neighbour that somebody deleted for 51 s, while the next lease waits."""
    daemon = node.start()
    daemon.list(peer(2))
    heals(node, 2)
    os.kill(daemon.pid(), signal.SIGSTOP)
    node.ip("neigh del 10.244.2.0 dev flannel.1")
    node.run("bridge", "fdb", "del", "02:aa:bb:cc:dd:02", "dev", "flannel.1", "dst", "192.168.50.2", "self")
    daemon.tell(removed=peer(2))
    daemon.tell(added=peer(3))
    os.kill(daemon.pid(), signal.SIGCONT)
    heals(node, 3)


def test_entries_that_somebody_deleted_hold_up_no_other_lease(node: Node) -> None:
    """F6: to remove what is not there is no failure, and nothing waits for it."""
    daemon = node.start()
    daemon.list(peer(2), peer(3))
    heals(node, 2, 3)
    os.kill(daemon.pid(), signal.SIGSTOP)
    node.ip("neigh del 10.244.2.0 dev flannel.1")
    node.run("bridge", "fdb", "del", "02:aa:bb:cc:dd:02", "dev", "flannel.1", "dst", "192.168.50.2", "self")
    node.ip("route del 10.244.2.0/24")
    daemon.tell(removed=peer(2))
    daemon.tell(added=peer(4))
    os.kill(daemon.pid(), signal.SIGCONT)
    heals(node, 3, 4)
    assert "cannot" not in daemon.log


def test_a_flapped_underlay_heals(node: Node) -> None:
    daemon = node.start(backend={"Type": "vxlan", "DirectRouting": True})
    daemon.list(peer(2), peer(3, ip="203.0.113.3"))
    wanted = ["10.244.2.0/24 via 192.168.50.2 dev eth0", "10.244.3.0/24 via 10.244.3.0 dev flannel.1 onlink"]
    until(lambda: node.routes() == wanted, f"{wanted}")
    assert node.neighbours() == ["10.244.3.0 02:aa:bb:cc:dd:03"]
    assert node.fdb() == ["02:aa:bb:cc:dd:03 dst 203.0.113.3"]
    node.ip("link set eth0 down")
    until(lambda: "dev eth0" not in node.ip("route show"), "the underlay's routes gone")
    node.ip("link set eth0 up")
    until(lambda: node.routes() == wanted, f"{wanted}; now {node.routes()}", HEALS_WITHIN)


def test_a_peer_that_moves_behind_a_router_is_tunnelled_to(node: Node) -> None:
    daemon = node.start(backend={"Type": "vxlan", "DirectRouting": True})
    daemon.list(peer(2))
    until(lambda: node.routes() == ["10.244.2.0/24 via 192.168.50.2 dev eth0"], "direct")
    node.ip("route add 192.168.50.2/32 via 192.168.50.254")
    heals(node, 2)
    node.ip("route del 192.168.50.2/32")
    until(lambda: node.routes() == ["10.244.2.0/24 via 192.168.50.2 dev eth0"], "direct again", HEALS_WITHIN)
    assert node.neighbours() == []
    assert node.fdb() == []


def test_an_external_interface_made_again_is_built_upon(node: Node) -> None:
    daemon = node.start()
    daemon.list(peer(2), peer(3))
    heals(node, 2, 3)
    before = node.link()["address"]
    node.ip("link del eth0")  # the kernel takes flannel.1 with it
    until(lambda: not node.link(), "no tunnel without an underlay")
    daemon.said("the external interface eth0 is gone")
    for words in ("link add eth0 type veth peer name far", "link set far up", "addr add 192.168.50.1/24 dev eth0"):
        node.ip(words)
    node.ip("link set eth0 up")
    heals(node, 2, 3)
    assert node.link()["address"] == before


def test_a_peers_new_address_replaces_the_old_entry(node: Node) -> None:
    daemon = node.start()
    daemon.list(peer(2), peer(3))
    heals(node, 2, 3)
    daemon.tell(added=peer(2, mac="02:00:00:00:00:22", ip="192.168.50.22"))
    until(
        lambda: (
            node.fdb() == ["02:00:00:00:00:22 dst 192.168.50.22", "02:aa:bb:cc:dd:03 dst 192.168.50.3"]
            and "10.244.2.0 02:00:00:00:00:22" in node.neighbours()
        ),
        "the new address alone",
        HEALS_WITHIN,
    )
    daemon.tell(removed=peer(2))
    heals(node, 3)


@pytest.mark.parametrize("data", [None, {}, {"VtepMAC": 7}, {"VtepMAC": "zz"}, {"VtepMAC": "01:00:5e:00:00:01"}])
def test_a_lease_that_cannot_be_used_is_named_and_left_out(node: Node, data: Any) -> None:
    daemon = node.start()
    daemon.list({**peer(2), "data": data}, {**peer(4), "type": "host-gw"}, peer(3))
    heals(node, 3)
    daemon.said("ignoring the lease of 10.244.2.0/24 from 192.168.50.2")
    daemon.said("ignoring the lease of 10.244.4.0/24 from 192.168.50.4")


def test_leftovers_go_at_start_and_the_device_stays(node: Node) -> None:
    daemon = node.start()
    daemon.list(peer(2), peer(3), peer(4))
    heals(node, 2, 3, 4)
    before = node.link()
    assert daemon.stop(signal.SIGKILL) != 0
    assert node.programmed(2, 3, 4)
    daemon = node.start()
    assert daemon.published()["data"]["VtepMAC"] == before["address"]
    daemon.list(peer(2), peer(4))
    heals(node, 2, 4)
    assert node.link()["ifindex"] == before["ifindex"]


def test_the_address_outlives_a_device_deleted_while_the_daemon_was_down(node: Node) -> None:
    daemon = node.start()
    before = node.link()["address"]
    assert daemon.stop() == 0
    node.ip("link del flannel.1")
    node.start()
    assert node.link()["address"] == before


@pytest.mark.parametrize(
    ("backend", "expected", "in_place"),
    [
        ({"MTU": 1400}, lambda link: link["mtu"] == 1350, True),
        ({"Learning": True}, lambda link: link["linkinfo"]["info_data"]["learning"], True),
        ({"Port": 4789}, lambda link: link["linkinfo"]["info_data"]["port"] == 4789, False),
        ({"GBP": True}, lambda link: link["linkinfo"]["info_data"].get("gbp"), False),
    ],
)
def test_a_changed_setting_reaches_an_existing_device(
    node: Node, backend: dict[str, Any], expected: Any, in_place: bool
) -> None:
    node.start(backend={"Type": "vxlan"}).stop()
    before = node.link()
    node.start(backend={"Type": "vxlan", **backend}).stop()
    changed = node.link()
    assert expected(changed), changed
    assert changed["address"] == before["address"]
    assert (changed["ifindex"] == before["ifindex"]) == in_place
    node.start(backend={"Type": "vxlan"})
    assert not expected(node.link())  # F4: a Port that was taken out of the configuration is taken back


def test_another_vni_leaves_no_old_device(node: Node) -> None:
    node.start(backend={"Type": "vxlan"}).stop()
    node.start(backend={"Type": "vxlan", "VNI": 7})
    assert node.link("flannel.7")
    assert not node.link("flannel.1")


def test_a_taken_port_ends_the_daemon_with_the_reason(node: Node) -> None:
    node.ip("link add other type vxlan id 1 dstport 8472 dev eth0 local 192.168.50.1")
    node.ip("link set other up")
    daemon = node.start(ready=False)
    assert daemon.process.wait(timeout=10) == 1
    assert "8472" in daemon.log or "File exists" in daemon.log


def test_a_port_taken_by_a_program_ends_the_daemon_with_the_reason(node: Node) -> None:
    listen = "import socket, time; s = socket.socket(2, 2); s.bind(('0.0.0.0', 8472)); print('bound', flush=True); "
    output = node.folder / "listener"
    listener = node.spawn("/usr/bin/python3", "-ISc", f"{listen} time.sleep(1000)", output=output)
    until(lambda: "bound" in output.read_text(), "the port is taken")
    daemon = node.start("--healthz-port=8081", ready=False)
    assert daemon.process.wait(timeout=10) == 1
    assert "another socket or vxlan device holds UDP port 8472" in daemon.log
    listener.kill()
    listener.wait()


def test_state_stays_after_a_clean_end(node: Node) -> None:
    daemon = node.start("--ip-masq")
    daemon.list(peer(2))
    heals(node, 2)
    assert daemon.stop() == 0
    assert node.programmed(2)
    assert "FLANNEL-POSTRTG" in node.run("iptables", "-t", "nat", "-S")


ECHO = """
import sys, time
sys.path.insert(0, sys.argv[1])
from ipaddress import IPv4Address, IPv4Network
from flannel.backends.vxlan import VxlanBackend
from flannel.interface import Wanted, choose
from flannel.kernel.monitor import Monitor
from flannel.kernel.netlink import Netlink
from flannel.lease import Lease, LeaseAttrs
from flannel.netconf import parse
from flannel.reconcile import Reconciler
from flannel.state import Recorded
from flannel.stores.base import Event, Snapshot

def peer(number, mac=0):
    data = {"VtepMAC": "02:00:00:00:%02x:%02x" % (mac, number)}
    attrs = LeaseAttrs(IPv4Address("192.168.50.%d" % number), "vxlan", data)
    return Lease(IPv4Network("10.244.%d.0/24" % number), attrs)

netlink, conf = Netlink(), parse('{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}')
external = choose(netlink, Wanted())
backend = VxlanBackend(conf, external)
own = Lease(IPv4Network("10.244.1.0/24"), backend.prepare(netlink, Recorded()))
backend.start(netlink, own)
reconciler = Reconciler(netlink, backend, external, conf.network, own.subnet, Recorded())
reconciler.run()
monitor = Monitor()

def echo_of(*messages):
    for message in messages:
        reconciler.take(message)
    reconciler.run()
    changes, lost = monitor.read(100000)
    reconciler.notice(changes, lost)
    assert reconciler.next_run() > time.monotonic() + 5, "the echo asks for work"
    return len(changes)

assert echo_of(Snapshot((own, *(peer(number) for number in range(2, 200))))) >= 3 * 198
assert echo_of(Event("added", peer(2, mac=7)), Event("removed", peer(3))) >= 6
"""


def test_the_echo_of_its_own_writes_asks_for_nothing(node: Node) -> None:
    node.run("/usr/bin/python3", "-ISc", ECHO, str(Path(__file__).parents[2]))


def test_nothing_happens_while_nothing_changes(node: Node) -> None:
    daemon = node.start("--ip-masq", "--iptables-resync=3600")
    daemon.list(*(peer(number) for number in range(2, 9)))
    heals(node, *range(2, 9))

    def woken() -> int:
        total = 0
        for status in Path(f"/proc/{daemon.pid()}/task").glob("*/status"):
            total += int(status.read_text().partition("voluntary_ctxt_switches:")[2].split()[0])
        return total

    last, since = woken(), time.monotonic()

    def still() -> bool:
        nonlocal last, since
        before, last = last, woken()
        if last != before:
            since = time.monotonic()
        return time.monotonic() > since + 0.5

    until(still, "the echo of its own writes has been read, and nothing wakes it", 5)
    node.ip("neigh replace 192.168.50.9 lladdr 02:00:00:00:00:09 dev eth0")  # another device's business
    assert node.programmed(*range(2, 9))
