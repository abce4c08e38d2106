"""The state of a machine as it is watched: what changes shows, and what is undone is as if it had not been."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from testbed import statewatch
from testbed.deadline import Deadline
from testbed.labs import netns
from testbed.labs.fabric import wait_converged
from testbed.labs.netns import NetnsLab
from testbed.statewatch import StateWatch, differences
from testbed.topology import load_topology
from tests.labs.helpers import need_lab, unique

PREPARED = (
    "ip link add vx type vxlan id 7 local 10.0.0.11 dstport 8472 nolearning",
    "ip link set vx up",
    "ip link add bridge9 type bridge",
    "ip link set bridge9 up",
    "ip netns add cni-one",
    "mkdir -p /etc/cni/net.d /run/flannel",
    "cp /etc/hosts /run/flannel/subnet.env",
    "iptables-nft -N MINE",
    "iptables-nft -A MINE -s 192.0.2.1 -j DROP",
    "iptables-nft -A MINE -s 192.0.2.2 -j DROP",
)

CHANGES = {
    "route": ("ip route add 10.9.0.0/24 dev eth0", "ip route del 10.9.0.0/24", r"\+ route 10.9.0.0/24 dev eth0"),
    "route of another table": (
        "ip route add blackhole 10.9.0.0/24 table 77", "ip route del blackhole 10.9.0.0/24 table 77",
        r"\+ route blackhole 10.9.0.0/24 table 77",
    ),
    "ipv6 route": ("ip -6 route add fd09::/64 dev eth0", "ip -6 route del fd09::/64", r"\+ route fd09::/64 dev eth0"),
    "policy": ("ip rule add from 10.9.0.0/24 table 77", "ip rule del from 10.9.0.0/24 table 77", r"\+ rule of routing"),
    "address": (
        "ip addr add 10.9.0.1/24 dev bridge9", "ip addr del 10.9.0.1/24 dev bridge9",
        r"\+ address 10.9.0.1/24 dev bridge9",
    ),
    "device": ("ip link add new type bridge", "ip link del new", r"\+ link new bridge"),
    "mtu": ("ip link set vx mtu 1300", "ip link set vx mtu 1500", r"\+ link vx vxlan .*mtu 1300 .*id 7 .*port 8472"),
    "down": ("ip link set bridge9 down", "ip link set bridge9 up", r"\+ link bridge9 bridge mtu"),
    "neighbour": (
        "ip neigh add 10.9.0.9 dev vx lladdr 02:00:00:00:00:09 nud permanent", "ip neigh del 10.9.0.9 dev vx",
        r"\+ neighbour 10.9.0.9 dev vx 02:00:00:00:00:09",
    ),
    "forwarding entry": (
        "bridge fdb append 02:00:00:00:00:09 dev vx dst 10.0.0.12",
        "bridge fdb del 02:00:00:00:00:09 dev vx dst 10.0.0.12",
        r"\+ fdb 02:00:00:00:00:09 dev vx dst 10.0.0.12",
    ),
    "queue": ("tc qdisc add dev eth0 root tbf rate 1gbit burst 9k latency 9ms", "tc qdisc del dev eth0 root",
              r"\+ qdisc tbf"),
    "setting": (
        "sysctl -w net.ipv4.conf.eth0.rp_filter=1", "sysctl -w net.ipv4.conf.eth0.rp_filter=0",
        r"\+ sysctl eth0 .*rp_filter 1",
    ),
    "setting of the machine": (
        "sysctl -w net.ipv4.ip_local_port_range=40000\t40999", "sysctl -w net.ipv4.ip_local_port_range=32768\t60999",
        r"\+ sysctl ipv4/ip_local_port_range 40000 40999",
    ),
    "setting for neighbours": (
        "sysctl -w net.ipv4.neigh.eth0.proxy_delay=40", "sysctl -w net.ipv4.neigh.eth0.proxy_delay=80",
        r"\+ sysctl ipv4/neigh/eth0/proxy_delay 40",
    ),
    "configuration": (
        "cp /etc/hostname /etc/cni/net.d/00-other.conflist", "rm /etc/cni/net.d/00-other.conflist",
        r"\+ file /etc/cni/net.d/00-other.conflist [0-9a-f]{8}",
    ),
    "subnet.env": (
        "cp /etc/hostname /run/flannel/subnet.env", "cp /etc/hosts /run/flannel/subnet.env",
        r"\+ file /run/flannel/subnet.env [0-9a-f]{8}",
    ),
    "rule": (
        "iptables-nft -A MINE -s 192.0.2.3 -j DROP", "iptables-nft -D MINE -s 192.0.2.3 -j DROP",
        r"\+ rules .*192.0.2.3",
    ),
    "order of rules": (
        "iptables-nft -R MINE 1 -s 192.0.2.2 -j DROP", "iptables-nft -R MINE 1 -s 192.0.2.1 -j DROP",
        r"- rules .*192.0.2.1",
    ),
    "pod": ("ip netns add cni-two", "ip netns del cni-two", r"\+ the network of .*/cni-two"),
    "in a pod": (
        "ip -n cni-one route add blackhole 10.9.0.0/24", "ip -n cni-one route del blackhole 10.9.0.0/24",
        r"/cni-one: \+ route blackhole 10.9.0.0/24",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def lab() -> Iterator[NetnsLab]:
    need_lab()
    lab = netns.bring_up(load_topology("flat", unique("watch")))
    wait_converged(lab)  # a route that comes late is a change, too
    node = first(lab)
    for command in PREPARED:
        node.run(command.split())
    yield lab
    lab.down()


def first(lab: NetnsLab) -> Any:
    return lab.node(lab.spec.cluster_nodes[0].name)


@pytest.fixture(scope="module")
def watch(lab: NetnsLab) -> Iterator[StateWatch]:
    cluster: Any = SimpleNamespace(lab=lab, flannel=SimpleNamespace(rules="iptables-nft"), pods={})
    watch = StateWatch(cluster)
    yield watch
    watch.close()


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_shows_until_it_is_undone(lab: NetnsLab, watch: StateWatch, what: str) -> None:
    do, undo, shown = CHANGES[what]
    node, before = first(lab), watch.read()
    assert set(before) >= {*lab.nodes, f"{node.name}/cni-one"}
    node.run(do.split(" "))
    try:
        changed = differences(before, watch.read())
        assert any(re.search(shown, line) for line in changed), changed
        assert {line.partition(":")[0].partition("/")[0] for line in changed} == {node.name}, changed
    finally:
        node.run(undo.split(" "))
    assert differences(before, watch.settled(before, 5.0)) == []


def test_whether_flanneld_runs_is_told(lab: NetnsLab, watch: StateWatch) -> None:
    node, before = first(lab), watch.read()
    pid = node.start(["sleep", "600"], name="flanneld")
    for name, told in ((None, "runs"), ("STOP", "is stopped"), ("CONT", "runs"), ("KILL", "has ended")):
        if name:
            node.run(["kill", f"-{name}", str(pid)])
        wanted = [f"{node.name}: + flanneld {told}"]
        found = Deadline(5.0).poll(lambda wanted=wanted: differences(before, watch.read()) == wanted)  # type: ignore[misc]
        assert found, (told, differences(before, watch.read()))
    node.run(["rm", "/run/flanneld.pid"])
    assert differences(before, watch.read()) == []


def test_what_comes_and_goes_by_itself_is_no_state(lab: NetnsLab, watch: StateWatch) -> None:
    node, other = first(lab), lab.spec.cluster_nodes[1]
    before = watch.read()
    node.run(["ip", "neigh", "flush", "dev", "eth0"])
    node.run(["ping", "-c", "1", "-W", "5", str(other.ip)])
    node.run(["iptables-nft", "-L", "-n"])  # makes chains of the kernel's own
    assert differences(before, watch.read()) == []


def test_what_a_tunnel_leaves_by_is_told_by_name(lab: NetnsLab, watch: StateWatch) -> None:
    """It has another number once a container has started anew."""
    node = first(lab)
    lower = ("ip link add under type bridge", "ip link add other type bridge")
    tunnel = "ip link add over address 02:00:00:00:00:0a type vxlan id 9 dstport 8473 dev"

    def make(*commands: str) -> None:
        for command in commands:
            node.run(command.split())

    make(*lower, f"{tunnel} under")
    try:
        before = watch.read()
        make("ip link del over", "ip link del under", lower[0], f"{tunnel} under")
        assert differences(before, watch.settled(before, 5.0)) == []
        make("ip link del over", f"{tunnel} other")
        changed = differences(before, watch.read())
        assert any(re.search(r"\+ link over vxlan .*link other", line) for line in changed), changed
    finally:
        make(*(f"ip link del {name}" for name in ("over", "under", "other")))


def test_rules_of_both_families_are_told_in_full(lab: NetnsLab, watch: StateWatch) -> None:
    """nft forgets what a target of iptables does once it has listed another family's."""
    node = first(lab)
    rules = [("iptables-nft", "192.0.2.0/24"), ("ip6tables-nft", "2001:db8::/64")]

    def change(how: str) -> None:
        for program, source in rules:
            node.run([program, "-t", "nat", how, "POSTROUTING", "-s", source, "-j", "MASQUERADE", "--random-fully"])

    change("-A")
    try:
        told = [line for line in watch.read()[node.name] if "fully-random" in line]
        assert all(any(source in line for line in told) for _, source in rules), told
    finally:
        change("-D")


def test_a_machine_that_was_started_anew_is_looked_at_again(lab: NetnsLab, watch: StateWatch) -> None:
    before = watch.read()
    machine = next(iter(watch._machines.values()))
    machine.process.kill()
    machine.process.wait()
    assert watch.read() == before


def below(pid: int) -> list[int]:
    """The processes that this one has started, and theirs."""
    children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*children, *(other for child in children for other in below(child))]


def test_a_machine_that_is_stopped_costs_a_look_and_no_more(
    lab: NetnsLab, watch: StateWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = watch.read()
    machine = next(iter(watch._machines.values()))
    for pid in (machine.process.pid, *below(machine.process.pid)):
        os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(statewatch, "LOOK_SECONDS", 0.5)
    without = watch.read()
    monkeypatch.undo()
    assert set(before) - set(without) == {place for place in before if place.partition("/")[0] == machine.name}
    assert watch.read() == before
