"""DEP: what a flanneld takes from its command line and configuration, seen on one that has a network of its own."""

from __future__ import annotations

import base64
import re
from collections.abc import Collection
from ipaddress import IPv4Network
from typing import Any

from testbed.checks import check
from testbed.deadline import Deadline
from testbed.nodes.alone import NETWORK, SECOND, Alone
from testbed.nodes.deploy import Cluster

BACKENDS = {
    "vxlan": {},
    "host-gw": {},
    "ipip": {},
    "udp": {},
    "wireguard": {},
    "ipsec": {"PSK": "00" * 48},
    "alloc": {},
    "extension": {},
}
"""Each type that flannel has, with the keys that it cannot do without."""


def chosen(alone: Alone, *args: str) -> str:
    """The address that a flanneld with these arguments publishes."""
    alone.start(*args)
    try:
        assert Deadline(READY_SECONDS).poll(alone.subnet_env), f"{' '.join(args)}: not ready\n{alone.log()}"
        (lease,) = alone.leases().values()
        return str(lease["PublicIP"])
    finally:
        alone.stop()
        alone.clear_leases()


@check("DEP-17")
def test_first_interface_that_is_there_is_taken(alone: Alone) -> None:
    """Of several --iface the first that exists; by expression, and by what is reached through it. Source: S0, src."""
    first, second = str(alone.address), str(SECOND)
    wanted = {
        ("--iface=nope", "--iface=eth1", "--iface=eth0"): second,
        ("--iface=eth0", "--iface=eth1"): first,
        ("--iface-regex=^nothing$", f"--iface-regex=^{second.rpartition('.')[0]}"): second,
        ("--iface-regex=eth1",): second,
        (f"--iface-can-reach={SECOND + 1}",): second,
        ("--iface-can-reach=192.0.2.1",): first,
    }
    alone.configure({"Type": "alloc"})
    for args, address in wanted.items():
        found = chosen(alone, *args)
        assert found == address, f"{' '.join(args)}: {found} is published, not {address}"


@check("DEP-18")
def test_backends_are_known_by_name_and_no_other(alone: Alone) -> None:
    """A name that is none ends flanneld, and it says the name; those that are do not. Source: S4."""
    for name, keys in BACKENDS.items():
        alone.configure({"Type": name, **keys})
        alone.start()
        try:
            said = Deadline(15).poll(lambda: decided(alone))
            assert said, f"{name}: neither ready nor ended\n{alone.log()}"
            assert "unknown backend" not in alone.log(), f"{name} is unknown: {alone.log()}"
        finally:
            alone.stop()
    alone.configure({"Type": "vxlann"})
    ended = alone.run_to_end()
    assert ended.rc not in (0, 124), f"vxlann is taken for a backend (exit {ended.rc})\n{ended.stderr}"
    assert "vxlann" in ended.stderr + ended.stdout, f"the error names no vxlann: {ended.stderr}"


def decided(alone: Alone) -> bool:
    """Whether the flanneld has got ready, or has ended because this kernel cannot do it."""
    return bool(alone.subnet_env()) or not alone.running


@check("DEP-27")
def test_ready_means_a_network_and_healthy_a_process(alone: Alone) -> None:
    """/healthz from the start on; /readyz only once subnet.env is written. Source: docs, v0.28.9."""
    alone.start("--ip-masq")
    assert Deadline(15).poll(lambda: alone.status("/healthz") == 200 or None), f"not healthy\n{alone.log()}"
    assert alone.subnet_env() is None
    status = alone.status("/readyz")
    assert status == 503, f"/readyz says {status} before there is a configuration"
    alone.configure({"Type": "vxlan"})
    alone.wait_ready()
    assert alone.subnet_env(), "/readyz says 200 before subnet.env is written"
    rules = alone.place.run(["iptables-save", "-t", "nat"]).stdout
    assert f"-s {NETWORK}" in rules, f"/readyz says 200 before there are rules for {NETWORK}:\n{rules}"
    assert alone.status("/healthz") == 200


@check("DEP-23")
def test_a_peer_can_be_resolved_before_it_can_be_reached(alone: Alone, cluster: Cluster) -> None:
    """The device, its address, then a peer's neighbour and forwarding entry, and its route last. Source: S3, src."""
    flannel = cluster.flannel
    alone.configure({**flannel.backend_keys, "VNI": 1} if flannel.vni else flannel.backend_keys)
    peers: dict[IPv4Network, dict[str, Any]] = {}
    for number, subnet in enumerate([NETWORK_SUBNETS[-1], NETWORK_SUBNETS[-2]]):
        data = {"VNI": 1, "VtepMAC": f"02:00:5e:00:53:{number:02x}", "PublicKey": KEYS[number], "Port": 51820}
        peers[subnet] = {
            "PublicIP": str(alone.address + 7 + number),
            "BackendType": flannel.backend.type,
            "BackendData": data if flannel.backend.type in ("vxlan", "wireguard") else None,
        }
        alone.lease(subnet, peers[subnet])
    routed = [NETWORK] if flannel.backend.type == "wireguard" else list(peers)  # which has one route for all of them
    with alone.changes() as changes:
        alone.start()
        alone.wait_ready()
        routes = Deadline(READY_SECONDS).poll(lambda: routes_in(changes(), routed) == len(routed) or None)
        seen = changes()
    story = "\n".join(seen)
    assert routes, f"not every peer has a route:\n{story}"
    device = flannel.backend.tunnel_device({"Backend": {"VNI": 1}}) if flannel.backend.tunnels else None
    for subnet in routed:
        wanted = [rf"\[LINK\].* {device}(@\w+)?: <", rf"\[ADDR\].* {device} +inet "] if device else []
        if flannel.vni and not flannel.direct:
            entry = f"dev {device} lladdr {peers[subnet]['BackendData']['VtepMAC']}"
            wanted += [rf"\[NEIGH\]{address} {entry}" for address in (subnet[0], peers[subnet]["PublicIP"])]
        route = first(seen, rf"\[ROUTE\]{subnet} ")
        for pattern in wanted:
            assert first(seen, pattern) < route, f"{subnet}'s route comes before {pattern}:\n{story}"


NETWORK_SUBNETS = list(NETWORK.subnets(new_prefix=24))
KEYS = [base64.b64encode(bytes([number]) * 32).decode() for number in (1, 2)]
READY_SECONDS = 15.0


def first(lines: list[str], pattern: str) -> int:
    """Where a pattern is first seen; behind everything where it is not."""
    return next((at for at, line in enumerate(lines) if re.search(pattern, line)), len(lines))


def routes_in(lines: list[str], subnets: Collection[IPv4Network]) -> int:
    """How many of these subnets have got a route."""
    return sum(any(str(subnet) in line for line in lines) for subnet in subnets)


@check("NEG-05")
def test_what_windows_needs_is_not_asked_of_linux(alone: Alone) -> None:
    """VNI 1 and port 8472 do; MacPrefix is nothing to a Linux node. Source: S0."""
    alone.configure({"Type": "vxlan", "VNI": 1, "Port": 8472, "MacPrefix": "0E-2A"})
    alone.start()
    alone.wait_ready()
    (lease,) = alone.leases().values()
    link = alone.place.run(["ip", "-d", "link", "show", "flannel.1"]).stdout
    assert "vxlan id 1 " in link, link
    assert "dstport 8472 " in link, link
    data = lease["BackendData"]
    assert data["VNI"] == 1, data
    assert not data["VtepMAC"].lower().startswith("0e:2a"), f"MacPrefix made the MAC {data['VtepMAC']}"
