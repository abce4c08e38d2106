"""VXD, DR, HGW: what a flanneld makes of its configuration, seen on one that has a network of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from testbed.checks import check
from testbed.deadline import Deadline
from testbed.fixtures import Facts, Path
from testbed.labs import interpreter
from testbed.nodes.alone import NAME, NETWORK, UPLINK, Alone
from testbed.nodes.deploy import Cluster
from testbed.nodes.madeup import random_mac
from testbed.probes.capture import Target, Window
from testbed.probes.flows import Nonce, ping
from testbed.probes.iproute import Link, Route, read_state, udp_sockets

MARK = 7
"""A packet's mark, which is the group that GBP writes into the header."""
VALID, WITH_GROUP = 0x08, 0x88
PEER = list(NETWORK.subnets(new_prefix=24))[200]
SECONDS = 15.0
REFUSED_SECONDS = 5.0
HOLDER = "import signal, socket, sys; s = socket.socket(2, 2); s.bind(('', int(sys.argv[1]))); signal.pause()"
ERROR = re.compile(r"[EF]\d{4} ")
STARTED = "CLI flags config"
"""What every flanneld logs first."""


@contextmanager
def running(alone: Alone, backend: Mapping[str, Any], *args: str) -> Iterator[None]:
    """The flanneld with that Backend, ready; what it made in the kernel stays behind it."""
    alone.configure(backend)
    alone.start(*args)
    try:
        alone.wait_ready()
        yield
    finally:
        alone.stop()


def neighbour(alone: Alone, backend: Mapping[str, Any]) -> None:
    """Give it a peer, which is the node beside it."""
    data = {"VNI": backend.get("VNI", 1), "VtepMAC": random_mac()} if backend["Type"] == "vxlan" else None
    alone.lease(PEER, {"PublicIP": str(UPLINK[1]), "BackendType": backend["Type"], "BackendData": data})


def route_to_peer(alone: Alone) -> Route:
    """Its route to that peer, once there is one."""
    found = Deadline(SECONDS).poll(lambda: read_state(alone.place).routes_to(PEER) or None)
    assert found, f"no route to {PEER}\n{alone.log()}"
    return found[0]


@check("VXD-06", encapsulated=True)
def test_groups_are_written_where_gbp_says_so(
    path: Path, cluster: Cluster, facts: Facts, alone: Alone, window: Window
) -> None:
    """Without GBP a marked packet has no group on the wire and the device no flag; with it, both have. Source: S0."""
    flannel, source = cluster.flannel, path.source_node
    backend = {"Type": "vxlan", "VNI": flannel.vni, "Port": flannel.port}
    if not flannel.backend_keys.get("GBP"):
        assert not facts.link(source.name, str(flannel.tunnel_device)).data.get("gbp"), "gbp, which is off"
        nonce = Nonce.new()
        ping(source, path.address, nonce=nonce, mark=MARK)
        seen = window.select(path.source_nic, nonce, lambda p: p.ip is not None and p.ip.src == source.spec.ip)
        headers = [(p.vxlan.flags, p.vxlan.group_policy) for p in seen if p.vxlan]
        assert headers == [(VALID, 0)], f"flags and group of a marked packet without GBP: {headers}"
    with running(alone, {**backend, "GBP": True}):
        neighbour(alone, backend)
        device = route_to_peer(alone).dev
        link = read_state(alone.place).link(device)
        assert link, f"no device {device}"
        assert link.data.get("gbp"), f"{device} has no gbp, which is on"
        window.captures.start([Target(f"{NAME}:eth0", alone.node, "eth0", f"/run/netns/{NAME}")])
        nonce = Nonce.new()
        ping(alone.place, PEER[2], nonce=nonce, mark=MARK, wait=1)
        seen = window.packets(f"{NAME}:eth0", nonce)
        headers = [(p.vxlan.flags, p.vxlan.group_policy) for p in seen if p.vxlan]
        assert headers == [(WITH_GROUP, MARK)], f"flags and group of a marked packet with GBP: {headers}"


@check("VXD-08")
def test_changed_settings_reach_the_device(alone: Alone) -> None:
    """VNI, Port, MTU and Learning of a device that is there already. Source: src, #1011, #1775."""
    backend: dict[str, Any] = {"Type": "vxlan"}
    mtu = read_state(alone.place, fdb=False).link("eth0")
    assert mtu
    changes = [("VNI", 1), ("VNI", 2), ("Port", 4789), ("MTU", mtu.mtu - 200), ("Learning", True)]
    for key, value in changes:
        backend[key] = value
        with running(alone, backend):
            link = the_device(alone, backend["VNI"])
            found = {
                "VNI": link.data["id"],
                "Port": link.data["port"],
                "MTU": link.mtu + 50,
                "Learning": link.data["learning"],
            }
            wanted = {"VNI": 1, "Port": 8472, "MTU": mtu.mtu, "Learning": False} | backend
            del wanted["Type"]
            assert found == wanted, f"{link.name} once {key} is {value}: {found}"
            assert link.up, f"{link.name} once {key} is {value}: {sorted(link.flags)}"


def the_device(alone: Alone, vni: int) -> Link:
    """The vxlan device with that VNI."""
    link = read_state(alone.place, fdb=False).link(f"flannel.{vni}")
    assert link, f"no device flannel.{vni}\n{alone.log()}"
    return link


@check("VXD-09")
def test_a_port_that_is_taken_is_told(alone: Alone) -> None:
    """Another overlay or a socket on the Port: an error in the log, and not ready. Source: typhoon#1561."""
    port = 8472
    for squatter in (overlay_on(alone, port), socket_on(alone, port)):  # a device that cannot be brought up stays
        with squatter as what:
            alone.configure({"Type": "vxlan"})
            alone.start()
            try:
                Deadline(SECONDS).poll(lambda: errors(alone) or alone.status("/readyz") == 200)
                said, ready = errors(alone), alone.status("/readyz")
            finally:
                alone.stop()
            assert ready != 200, f"ready beside {what}"
            assert said, f"no error in the log beside {what}: {alone.log()}"
    with running(alone, {"Type": "vxlan"}):  # which waits until it is ready: nothing else was in its way
        assert the_device(alone, 1).up
        assert not errors(alone), f"an error in the log with nothing in the way: {errors(alone)}"


def errors(alone: Alone) -> list[str]:
    """The errors that the flanneld started last has logged."""
    return [line for line in alone.log().rpartition(STARTED)[2].splitlines() if ERROR.match(line)]


@contextmanager
def socket_on(alone: Alone, port: int) -> Iterator[str]:
    """Another program on that UDP port."""
    inside = ["nsenter", f"--net=/run/netns/{NAME}", "--"]
    pid = alone.node.start([*inside, interpreter(), "-I", "-S", "-c", HOLDER, str(port)], name=f"{NAME}-holder")
    try:
        held = Deadline(SECONDS).poll(lambda: any(one.port == port for one in udp_sockets(alone.place)))
        assert held, f"nothing holds UDP port {port}"
        yield f"a socket on UDP port {port}"
    finally:
        alone.node.run(["kill", str(pid)])


@contextmanager
def overlay_on(alone: Alone, port: int) -> Iterator[str]:
    """Another vxlan device with the VNI that port and flannel's are about."""
    words = ["type", "vxlan", "id", "1", "dstport", str(port), "dev", "eth0", "nolearning"]
    alone.place.run(["ip", "link", "add", "foreign", *words])
    alone.place.run(["ip", "link", "set", "foreign", "up"])
    try:
        yield f"another vxlan device on UDP port {port}"
    finally:
        alone.place.run(["ip", "link", "delete", "foreign"])


@check("DR-06")
def test_direct_routing_is_a_switch_of_any_spelling(cluster: Cluster, alone: Alone) -> None:
    """Off without the key; on by DirectRouting and Directrouting alike. Source: S0, S4."""
    kind = cluster.flannel.backend.type
    cases: list[tuple[dict[str, bool], bool]] = [
        ({}, False),
        ({"DirectRouting": True}, True),
        ({"Directrouting": True}, True),
    ]
    for keys, direct in cases:
        backend = {"Type": kind, **keys}
        with running(alone, backend):
            neighbour(alone, backend)
            route = route_to_peer(alone)
        found = (str(route.gateway), route.dev)
        assert (found == (str(UPLINK[1]), "eth0")) is direct, f"{keys or 'no key'}: the peer by {found}"
        alone.clear()
        alone.place.run(["ip", "route", "delete", str(PEER)])


@check("HGW-07")
def test_another_public_address_is_refused(alone: Alone) -> None:
    """Peers would send to an address that is not the interface's: flanneld ends, and says why. Source: src."""
    alone.configure({"Type": "host-gw"})
    ended = alone.run_to_end("--iface=eth0", f"--public-ip={UPLINK[9]}", seconds=REFUSED_SECONDS)
    assert ended.rc not in (0, 124), f"{UPLINK[9]} is taken for an address of eth0 (exit {ended.rc})\n{ended.stderr}"
    said = [line for line in (ended.stdout + ended.stderr).splitlines() if ERROR.match(line)]
    assert said, f"no error: {ended.stderr}"
    assert alone.subnet_env() is None, "subnet.env was written all the same"
    with running(alone, {"Type": "host-gw"}, "--iface=eth0", f"--public-ip={alone.address}"):
        assert alone.subnet_env(), "no subnet.env with the interface's own address"
