"""IPv6 in a lab's model, in what flannel is expected to make of it, and in what the probes read."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Interface, IPv6Network

import pytest
from scapy.layers.inet import UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, ICMPv6PacketTooBig, IPv6
from scapy.layers.l2 import Ether
from scapy.layers.vxlan import VXLAN

from testbed.errors import InputError, LabError
from testbed.flannelbuild import default_flannel
from testbed.flannelfits import check_fits
from testbed.flannelspec import run_of
from testbed.ipv6 import with_ipv6
from testbed.labs.fabric import expected_paths
from testbed.labs.plan import hosts_file, node_batch, wiring_faults
from testbed.model import BRIDGE
from testbed.nodes.controlplane import ControlPlane
from testbed.nodes.deploy import describe_lab
from testbed.options import RunOptions
from testbed.probes.conntrack import parse_conntrack
from testbed.probes.flows import HttpReply, parse_ping
from testbed.probes.iproute6 import parse_state6
from testbed.probes.packets import ETHERNET, RAW_IP, Tunnel, decode
from testbed.render import render_frr
from testbed.topology import load_topology

IPV6 = {"EnableIPv6": "true", "IPv6Network": "fd00:10:244::/56"}


# -- the model ---------------------------------------------------------------------------------------------------------


def test_addresses_read_like_those_of_ipv4() -> None:
    lab = with_ipv6(load_topology("racks", "t1"))
    found = {node.name: str(node.ip6) for node in lab.nodes}
    assert found == {
        "master1": "fd50:0:0:1::11", "worker1": "fd50:0:0:1::12", "worker2": "fd50:0:0:1::13",
        "worker3": "fd50:0:0:2::11", "leaf1": "fd50::101", "leaf2": "fd50::102", "spine1": "fd50::1",
        "spine2": "fd50::2", "outside": "2001:db8::8",
    }  # fmt: skip
    assert str(lab.node("worker3").gateway6) == "fd50:0:0:2::1"
    assert str(lab.node("leaf2").bridge_address6) == "fd50:0:0:2::1/64"


def test_a_lab_without_ipv6_has_none() -> None:
    lab = load_topology("racks", "t1")
    assert {node.ip6 for node in lab.nodes} == {None}
    assert not any(":" in line.split()[0] for line in hosts_file(lab).splitlines())
    assert "ipv6 unicast" not in render_frr(lab.node("leaf1"), lab)["frr.conf"]
    assert {prefix.version for prefix in expected_paths(lab, lab.node("leaf1"))} == {4}


def test_addresses_of_a_large_fabric_are_unique() -> None:
    options = {"racks": "256", "nodes": "200", "spines": "64"}
    lab = with_ipv6(load_topology("clos", "t1", overrides=options))
    every = [node.ip6 for node in lab.nodes] + [leaf.bridge_address6 for leaf in lab.nodes if leaf.bridge_address6]
    assert len(set(every)) == len(every)
    assert None not in every
    assert all(node.gateway6 in node.underlay.address6.network for node in lab.cluster_nodes if node.underlay.address6)


def test_routers_carry_both_families_and_wait_for_both() -> None:
    lab = with_ipv6(load_topology("racks", "t1"))
    leaf = lab.node("leaf1")
    text = render_frr(leaf, lab)["frr.conf"]
    assert "\n address-family ipv6 unicast\n  network fd50::101/128\n  network fd50:0:0:1::/64\n" in text
    wanted = expected_paths(lab, leaf)
    assert wanted[IPv6Network("fd50:0:0:2::/64")] == wanted[IPv6Network("2001:db8::8/128")] == 2


def test_no_address_waits_for_a_duplicate() -> None:
    lab = with_ipv6(load_topology("racks", "t1"))
    lines = node_batch(lab, lab.node("worker1")).splitlines()
    assert next(line for line in lines if "fd50" in line and "addr" in line).endswith("dev eth0 nodad")
    assert "route add default via fd50:0:0:1::1 dev eth0" in lines


def test_a_missing_ipv6_address_is_a_fault_of_the_wiring() -> None:
    lab = with_ipv6(load_topology("racks", "t1"))

    def facts(six: bool) -> dict[str, dict[str, object]]:
        every: dict[str, dict[str, object]] = {}
        for node in lab.nodes:
            links = []
            ends = [(i.name, i.mac, i.bridge, i.address, i.address6) for i in node.ifaces]
            if node.bridge_address:
                ends.append((BRIDGE, "", None, node.bridge_address, node.bridge_address6))
            for name, mac, bridge, *addresses in ends:
                listed = [a for a in addresses if a and (six or a.version == 4)]
                info = [{"local": str(a.ip), "prefixlen": a.network.prefixlen, "scope": "global"} for a in listed]
                link = {"ifname": name, "mtu": lab.mtu, "address": mac, "flags": ["UP"], "addr_info": info}
                links.append(link | ({"master": bridge} if bridge else {}))
            every[node.name] = {"addresses": links, "offloads": {}}
        return every

    assert wiring_faults(lab, facts(True)) == []
    found = "\n".join(wiring_faults(lab, facts(False)))
    assert "worker1:eth0: addresses ['10.0.0.12/24'], not ['10.0.0.12/24', 'fd50:0:0:1::12/64']" in found
    assert f"leaf1:{BRIDGE} lacks fd50:0:0:1::1/64" in found


# -- flannel -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "more", "device", "mtu"),
    [
        ("dual_stack", {}, "flannel-v6.1", 1430),
        ("dual_stack", {"VNI": "7"}, "flannel-v6.7", 1430),
        ("vxlan_direct", IPV6, "flannel-v6.1", 1430),
        ("host_gw", IPV6, None, 1500),
        ("wireguard", IPV6, "flannel-wg-v6", 1420),
        ("wireguard", IPV6 | {"Mode": "auto"}, "flannel-wg", 1420),
    ],
)
def test_runs_with_ipv6(run: str, more: dict[str, str], device: str | None, mtu: int) -> None:
    flannel = default_flannel(run, net_conf_overrides=more)
    assert (flannel.tunnel_device6, flannel.mtu6_of(1500)) == (device, mtu)
    assert (flannel.network6, flannel.subnet6_len) == (IPv6Network("fd00:10:244::/56"), 64)
    assert run_of(flannel.net_conf) == run


def test_ipv6_alone_has_no_ipv4_in_its_configuration() -> None:
    flannel = default_flannel("dual_stack", net_conf_overrides={"EnableIPv4": "false", "SubnetLen": "26"})
    assert not flannel.ipv4
    assert flannel.net_conf == {
        "EnableIPv4": False, "EnableIPv6": True, "IPv6Network": "fd00:10:244::/56", "EnableNFTables": False,
        "Backend": {"Type": "vxlan"},
    }  # fmt: skip
    check_fits(flannel, with_ipv6(load_topology("racks", "t1")))


def test_ipv6_alone_wants_another_store_than_etcd() -> None:
    options = RunOptions(backend="dual_stack", name="t1", net_conf={"EnableIPv4": "false"})
    with pytest.raises(InputError, match="begin with an IPv4 subnet"):
        describe_lab(options)
    lab, flannel = describe_lab(replace(options, store="kubernetes"))
    assert (flannel.ipv4, str(lab.node("master1").ip6)) == (False, "fd50:0:0:1::11")


@pytest.mark.parametrize("alone", [False, True])
def test_kubernetes_gives_pod_cidrs_of_the_families_in_use(alone: bool) -> None:
    network6 = IPv6Network("fd00:10:244::/56")
    network = None if alone else IPv4Network("10.244.0.0/16")
    argv = ControlPlane(
        "10.0.0.11", "/f", "/d", "/p", network=network, subnet_len=24, network6=network6
    ).controllers_argv()
    assert f"--cluster-cidr={'' if alone else '10.244.0.0/16,'}{network6}" in argv
    sizes = [word for word in argv if word.startswith("--node-cidr-mask-size")]
    both = ["--node-cidr-mask-size-ipv4=24", "--node-cidr-mask-size-ipv6=64"]
    assert sizes == (["--node-cidr-mask-size=64"] if alone else both)


@pytest.mark.parametrize("run", ["ipip", "udp", "ipsec"])
def test_a_backend_of_ipv4_alone_is_refused(run: str) -> None:
    with pytest.raises(InputError, match="no longer"):
        default_flannel(run, net_conf_overrides=IPV6)


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        ({"IPv6Network": "fd50::/32"}, "overlaps the addresses of master1"),
        ({"IPv6Network": "fd00:10:244::/62", "IPv6SubnetLen": "64"}, "3 subnets of /64, for 4 nodes"),
        ({"IPv6Network": "2001:db8::/56"}, "overlaps the addresses of outside"),
    ],
)
def test_a_network_that_does_not_fit(overrides: dict[str, str], what: str) -> None:
    flannel = default_flannel("dual_stack", net_conf_overrides=overrides)
    with pytest.raises(InputError, match=what):
        check_fits(flannel, with_ipv6(load_topology("racks", "t1")))


# -- packets -----------------------------------------------------------------------------------------------------------

A, B = "02:00:00:00:00:0a", "02:00:00:00:00:0b"
INNER = IPv6(src="fd00::1", dst="fd00::2", hlim=63, tc=4) / ICMPv6EchoRequest(id=7, seq=3, data=b"nonce")


def built(packet: object) -> bytes:
    return bytes(packet)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("port", [8472, 4789, 8475])
def test_vxlan_in_ipv6(port: int) -> None:
    outer = Ether(src=A, dst=B) / IPv6(src="fd50::1", dst="fd50::2") / UDP(sport=40000, dport=port)
    frame = built(outer / VXLAN(flags=8, vni=4000) / Ether(src=B, dst=A) / INNER)
    found = decode(frame, ETHERNET, Tunnel("vxlan", port))
    assert (found.ip, found.arp) == (None, None)
    assert found.ip6
    assert (found.ip6.src, found.ip6.dst, found.ip6.next) == (IPv6Address("fd50::1"), IPv6Address("fd50::2"), 17)
    assert found.ip6.length == len(frame) - 14
    assert found.udp
    assert found.udp.checksum
    assert found.vxlan
    assert found.vxlan.vni == 4000
    assert found.inner
    assert found.length - found.inner.length == 70
    assert found.inner.ip6
    assert (found.inner.ip6.hops, found.inner.ip6.traffic_class) == (63, 4)
    assert found.inner.icmp
    assert (found.inner.icmp.type, found.inner.icmp.id, found.inner.icmp.seq) == (128, 7, 3)
    assert found.inner.payload == b"nonce"


def test_ipv6_in_ipv4_is_not_taken_for_the_outer_header() -> None:
    found = decode(built(Ether() / INNER), ETHERNET, Tunnel("vxlan", 8472))
    assert found.ip6
    assert not found.encapsulated


def test_bare_ipv6_and_a_packet_too_big() -> None:
    packet = IPv6(src="fd00::1", dst="fd00::2") / ICMPv6PacketTooBig(mtu=1430)
    found = decode(built(packet), RAW_IP, Tunnel())
    assert found.icmp
    assert (found.icmp.type, found.icmp.mtu) == (2, 1430)


# -- what commands print -----------------------------------------------------------------------------------------------

ADDRESSES = [
    {},
    {"ifname": "lo", "addr_info": [{}]},
    {
        "ifname": "flannel-v6.1",
        "addr_info": [
            {"local": "fd00:10:244:1::", "prefixlen": 128, "scope": "global"},
            {"local": "fe80::1", "prefixlen": 64, "scope": "link"},
        ],
    },
]
ROUTES = [
    {"dst": "default", "gateway": "fd50::1", "dev": "eth0", "metric": 1024},
    {"dst": "fd00:10:244:1::", "dev": "flannel-v6.1", "protocol": "kernel", "metric": 256},
    {"dst": "fd00:10:244:2::/64", "gateway": "fd00:10:244:2::", "dev": "flannel-v6.1", "flags": ["onlink"]},
    {"dst": "fe80::/64", "dev": "flannel-v6.1"},
    {"dst": "ff00::/8", "type": "multicast", "dev": "flannel-v6.1"},
]
NEIGHBOURS = [{"dst": "fd00:10:244:2::", "dev": "flannel-v6.1", "lladdr": B, "state": ["PERMANENT"]}]
FDB = [{"mac": B, "ifname": "flannel-v6.1", "dst": "fd50::2", "state": "permanent"},
       {"mac": A, "ifname": "flannel.1", "dst": "10.0.0.9"}, {"mac": A, "ifname": "cni0"}]  # fmt: skip


def test_a_nodes_ipv6_state() -> None:
    text = "\n".join(json.dumps(part) for part in (ADDRESSES, ROUTES, NEIGHBOURS))
    state = parse_state6(text, json.dumps(FDB), "worker1")
    assert state.addresses["flannel-v6.1"] == (IPv6Interface("fd00:10:244:1::/128"),)
    assert [str(route.dst) for route in state.of_device("flannel-v6.1")] == ["fd00:10:244:2::/64"]
    (route,) = state.routes_to(IPv6Network("fd00:10:244:2::/64"))
    assert (route.gateway, "onlink" in route.flags) == (IPv6Address("fd00:10:244:2::"), True)
    assert state.neighbours[0].state == {"PERMANENT"}
    assert [(entry.mac, str(entry.dst)) for entry in state.fdb] == [(B, "fd50::2")]


@pytest.mark.parametrize("text", ["", "[]\n[]", '[{"ifname": "x", "addr_info": [{"scope": "global"}]}]\n[]\n[]'])
def test_other_output_is_the_labs_fault(text: str) -> None:
    with pytest.raises(LabError):
        parse_state6(text, "[]", "worker1")


def test_what_ping_and_conntrack_say_of_ipv6() -> None:
    text = "From fd00::1 icmp_seq=1 Packet too big: mtu=1430\n1 packets transmitted, 0 received, +1 errors, 100% loss"
    answer = parse_ping(text, "worker1/client")
    assert (answer.lost, answer.path_mtu, answer.local_mtu) == (1, 1430, 0)
    line = (
        "ipv6     10 icmpv6   58 29 src=fd00::2 dst=2001:db8::8 type=128 code=0 id=7 "
        "src=2001:db8::8 dst=fd50::12 type=129 code=0 id=7 mark=0 use=1"
    )
    (connection,) = parse_conntrack(line, "worker1")
    assert (connection.protocol, connection.reply.dst, connection.translated) == (
        "icmpv6", IPv6Address("fd50::12"), True,
    )  # fmt: skip


def test_a_peer_of_either_family() -> None:
    assert HttpReply("", 200, 1, {"peer": "fd00::2"}).peer == IPv6Address("fd00::2")
    assert HttpReply("", 200, 1, {"peer": "10.0.0.1"}).peer == IPv4Address("10.0.0.1")
