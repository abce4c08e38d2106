"""IPv6 without IPv4: what vxlan, host-gw and wireguard leave in the kernel, leases in Kubernetes, who refuses it."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Any

import pytest

from flannel.backends.base import BackendError
from flannel.backends.choice import make_backend
from flannel.backends.wireguard import WireguardBackend
from flannel.interface import External
from flannel.kernel.wireguard import Peer
from flannel.lease import Lease, LeaseAttrs
from flannel.netconf import NetConfError, parse
from flannel.stores.base import StoreError
from flannel.stores.kubernetes_nodes import (
    Addresses,
    Cidrs,
    Keys,
    counted,
    overwritten,
    published,
    wanted_annotations,
)  # fmt: skip
from flannel.stores.kubernetes_nodes import (
    Node as KubeNode,
)
from flannel.stores.leasecodec import overlap, why_unusable
from tests.flannel.backendlab import need_link
from tests.flannel.corelab import HEALS_WITHIN, Node, until

NETWORK = IPv6Network("fd00:10:244::/56")
CONF = '{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:10:244::/56", "Backend": {"Type": "%s"}}'
DEVICE = "flannel-v6.1"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    for switch in ("all", "default", "eth0", "far", "lo"):
        made.run("sh", "-c", f"echo 0 > /proc/sys/net/ipv6/conf/{switch}/disable_ipv6", check=False)
    made.ip("addr flush dev eth0")
    made.ip("addr add fd50::1/64 dev eth0 nodad")
    made.ip("-6 route add default via fd50::fe dev eth0")
    yield made
    made.close()


def peer(number: int, kind: str = "vxlan") -> dict[str, Any]:
    """The lease of another node: fd00:10:244:N::/64 at fd50::N."""
    data = {"VNI": 1, "VtepMAC": f"06:aa:bb:cc:dd:{number:02x}"} if kind == "vxlan" else None
    return {"subnet": f"fd00:10:244:{number}::/64", "ip": f"fd50::{number:x}", "type": kind, "data": data}


def programmed(node: Node, *numbers: int) -> bool:
    """Whether exactly these peers have a route, a neighbour and an FDB entry."""
    shown = node.ip(f"-6 route show dev {DEVICE}", check=False).splitlines()
    routes = [line.strip() for line in shown if "via" in line]
    near = node.ip(f"-6 neigh show dev {DEVICE} nud permanent", check=False).splitlines()
    return (
        routes == [f"fd00:10:244:{n}::/64 via fd00:10:244:{n}:: metric 1024 onlink pref medium" for n in numbers]
        and sorted(line.split(" lladdr ")[0] for line in near) == [f"fd00:10:244:{n}::" for n in numbers]
        and node.fdb(DEVICE) == [f"06:aa:bb:cc:dd:{n:02x} dst fd50::{n:x}" for n in numbers]
    )


def test_vxlan_has_one_device_and_nothing_of_ipv4(node: Node) -> None:
    daemon = node.start("--ip-masq", alone6=True)
    published = daemon.published()
    daemon.list(peer(2), peer(3))
    until(lambda: programmed(node, 2, 3), f"both peers\n{daemon.log}", HEALS_WITHIN)
    shown = node.ip(f"-d link show {DEVICE}")
    assert "vxlan id 1 local fd50::1 dev eth0" in shown
    assert "mtu 1430" in shown
    assert not node.link("flannel.1")
    assert "inet6 fd00:10:244:1::/128 scope global" in node.ip(f"-6 addr show dev {DEVICE}")
    mac = node.link(DEVICE)["address"]
    assert published == {"ip": "fd50::1", "type": "vxlan", "data": {"VNI": 1, "VtepMAC": mac}}
    assert node.run("cat", "/run/flannel/subnet.env") == (
        "FLANNEL_IPV6_NETWORK=fd00:10:244::/56\nFLANNEL_IPV6_SUBNET=fd00:10:244:1::1/64\n"
        "FLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
    )
    assert "-s fd00:10:244::/56 ! -d ff00::/8" in node.run("ip6tables", "-t", "nat", "-S", "FLANNEL-POSTRTG")
    assert "FLANNEL" not in node.run("iptables-save")
    daemon.tell(removed=peer(2))
    until(lambda: programmed(node, 3), "one peer", HEALS_WITHIN)


@pytest.mark.parametrize(
    "damage",
    [
        f"link del {DEVICE}",
        f"addr del fd00:10:244:1::/128 dev {DEVICE}",
        "route del fd00:10:244:2::/64",
        f"neigh del fd00:10:244:2:: dev {DEVICE}",
    ],
)
def test_damage_heals(node: Node, damage: str) -> None:
    daemon = node.start(alone6=True)
    daemon.list(peer(2), peer(3))
    until(lambda: programmed(node, 2, 3), f"both peers\n{daemon.log}", HEALS_WITHIN)
    mac = node.link(DEVICE)["address"]
    node.ip(f"-6 {damage}")

    def whole() -> bool:
        own = "fd00:10:244:1::/128" in node.ip(f"-6 -o addr show dev {DEVICE} scope global", check=False)
        return own and programmed(node, 2, 3) and node.link(DEVICE).get("address") == mac

    until(whole, f"everything back after `ip -6 {damage}`\n{daemon.log}", HEALS_WITHIN)


def test_what_dual_stack_left_goes(node: Node) -> None:
    node.ip("addr add 192.168.50.1/24 dev eth0")
    node.ip("route replace default via 192.168.50.254")
    daemon = node.start("--ip-masq", dual=True)
    daemon.list({**peer(2), "subnet": "10.244.2.0/24", "ip": "192.168.50.2", "subnet6": "fd00:10:244:2::/64",
                 "ip6": "fd50::2", "data6": peer(2)["data"]})  # fmt: skip
    until(lambda: programmed(node, 2) and node.link("flannel.1"), f"both\n{daemon.log}", HEALS_WITHIN)
    daemon.stop()
    daemon = node.start("--ip-masq", alone6=True)
    daemon.list(peer(2))
    until(lambda: programmed(node, 2) and not node.link("flannel.1"), f"IPv6 alone\n{daemon.log}", HEALS_WITHIN)
    assert "FLANNEL" not in node.run("iptables-save")
    assert "FLANNEL_NETWORK" not in node.run("cat", "/run/flannel/subnet.env")


def test_host_gw_routes_by_the_peers_addresses(node: Node) -> None:
    daemon = node.start(backend={"Type": "host-gw"}, alone6=True)
    assert daemon.published() == {"ip": "fd50::1", "type": "host-gw", "data": None}
    daemon.list(peer(2, "host-gw"), peer(3, "host-gw"))

    def routes() -> list[str]:
        shown = node.ip("-6 route show dev eth0").splitlines()
        return [line.strip() for line in shown if line.startswith("fd00:10:244:")]

    wanted = [f"fd00:10:244:{n}::/64 via fd50::{n} metric 1024 pref medium" for n in (2, 3)]
    until(lambda: routes() == wanted, f"routes\n{daemon.log}", HEALS_WITHIN)
    node.ip("-6 route del fd00:10:244:2::/64")
    until(lambda: routes() == wanted, "the route is back", HEALS_WITHIN)


def test_the_interface_is_chosen_by_ipv6(node: Node) -> None:
    for flag in ("--iface=fd50::1", "--iface-regex=^fd50:", "--iface-can-reach=fd50::99", "--public-ipv6=fd50::1"):
        daemon = node.start(flag, alone6=True)
        assert daemon.published()["ip"] == "fd50::1", flag
        daemon.stop()
    daemon = node.start("--iface=eth0", "--public-ipv6=2001:db8::1", alone6=True)
    assert daemon.published()["ip"] == "2001:db8::1"
    daemon.stop()
    daemon = node.start("--iface=192.168.50.1", alone6=True, ready=False)
    daemon.said("none of the interfaces asked for is there")


EXTERNAL = External(2, "eth0", 1500, IPv6Address("fd50::1"), IPv6Address("fd50::1"))


@pytest.mark.parametrize("kind", ["ipip", "udp", "alloc", "ipsec"])
def test_other_backends_say_so(kind: str) -> None:
    with pytest.raises(BackendError, match=f"{kind} carries IPv4 alone: .*vxlan"):
        make_backend(parse(CONF % kind), EXTERNAL)


def test_an_underlay_too_small_is_refused() -> None:
    with pytest.raises(BackendError, match="1279 bytes"):
        make_backend(parse(CONF % "vxlan"), EXTERNAL._replace(mtu=1349))
    make_backend(parse(CONF % "vxlan"), EXTERNAL._replace(mtu=1350))
    with pytest.raises(BackendError, match="1279 bytes"):
        make_backend(parse(CONF % "wireguard"), EXTERNAL._replace(mtu=1359))
    make_backend(parse(CONF % "wireguard"), EXTERNAL._replace(mtu=1360))


# -- wireguard ---------------------------------------------------------------------------------------------------------


def key_of(number: int) -> bytes:
    return bytes([number] * 32)


def wireguard_peer(number: int, port: int = 51821) -> dict[str, Any]:
    data = {"PublicKey": base64.b64encode(key_of(number)).decode(), "Port": port}
    return {**peer(number, "wireguard"), "data": data}


def shown_peers(node: Node, device: str) -> list[str]:
    """`KEY-NUMBER ENDPOINT ALLOWED` of each peer, by wireguard's own tool."""
    rows = [line.split("\t") for line in node.run("wg", "show", device, "dump", check=False).splitlines()[1:]]
    return sorted(f"{base64.b64decode(row[0])[0]} {row[2]} {row[3]}" for row in rows)


def wireguard_conf(mode: str) -> Any:
    return parse(CONF.replace('"%s"', f'"wireguard", "Mode": "{mode}"'))


@pytest.mark.parametrize(
    ("mode", "device", "port"), [("separate", "flannel-wg-v6", 51821), ("auto", "flannel-wg", 51820)]
)
def test_wireguard_has_one_device_and_speaks_ipv6_with_its_peers(mode: str, device: str, port: int) -> None:
    backend = make_backend(wireguard_conf(mode), EXTERNAL)
    assert isinstance(backend, WireguardBackend)
    assert (backend.devices, backend.mtu) == ((device,), 1420)
    attrs = backend.attrs()
    assert (attrs.public_ip, attrs.backend_data["Port"]) == (IPv6Address("fd50::1"), port)
    assert (attrs.public_ip6, attrs.backend_data6) == (None, None)
    given = wireguard_peer(2)
    lease = Lease(IPv6Network(given["subnet"]), LeaseAttrs(IPv6Address(given["ip"]), "wireguard", given["data"]))
    wanted = backend._wanted_peers({lease.subnet: lease})
    assert wanted == {device: {key_of(2): Peer(key_of(2), (IPv6Address("fd50::2"), 51821), frozenset({lease.subnet}))}}


def test_wireguard_by_ipv4_is_refused() -> None:
    with pytest.raises(NetConfError, match="Backend.Mode is 'ipv4'"):
        make_backend(wireguard_conf("ipv4"), EXTERNAL)


@pytest.mark.parametrize("mode", ["separate", "ipv6"])
def test_wireguard_s_device_has_address_route_and_peers(node: Node, mode: str) -> None:
    need_link(node, "wireguard")
    device, port = ("flannel-wg-v6", 51821) if mode == "separate" else ("flannel-wg", 51820)
    backend = {"Type": "wireguard", "Mode": mode}
    daemon = node.start(backend=backend, alone6=True)
    published = daemon.published()
    daemon.list(wireguard_peer(2), wireguard_peer(3, 4711))
    wanted = ["2 [fd50::2]:51821 fd00:10:244:2::/64", "3 [fd50::3]:4711 fd00:10:244:3::/64"]
    until(lambda: shown_peers(node, device) == wanted, f"both peers\n{daemon.log}", HEALS_WITHIN)
    public = node.run("wg", "show", device, "public-key").strip()
    assert published == {"ip": "fd50::1", "type": "wireguard", "data": {"PublicKey": public, "Port": port}}
    assert node.run("wg", "show", device, "listen-port").strip() == str(port)
    assert node.run("wg", "show", "interfaces").split() == [device]
    assert node.run("cat", "/run/flannel/subnet.env") == (
        "FLANNEL_IPV6_NETWORK=fd00:10:244::/56\nFLANNEL_IPV6_SUBNET=fd00:10:244:1::1/64\n"
        "FLANNEL_MTU=1420\nFLANNEL_IPMASQ=false\n"
    )

    def whole() -> bool:
        shown = node.ip(f"addr show dev {device}", check=False)
        route = "fd00:10:244::/56 metric 1024" in node.ip(f"-6 route show dev {device}", check=False)
        has_address = "inet6 fd00:10:244:1::/128 scope global" in shown and "inet " not in shown
        return "mtu 1420" in shown and has_address and route and shown_peers(node, device) == wanted

    assert whole(), node.ip(f"addr show dev {device}") + node.ip(f"-6 route show dev {device}")
    assert node.routes() == []
    for damage in (f"link del {device}", f"addr del fd00:10:244:1::/128 dev {device}", "route del fd00:10:244::/56"):
        node.ip(f"-6 {damage}")
        until(whole, f"everything back after `{damage}`\n{daemon.log}", HEALS_WITHIN)
    daemon.tell(removed=wireguard_peer(2))
    until(lambda: shown_peers(node, device) == wanted[1:], "one peer", HEALS_WITHIN)
    daemon.stop()
    daemon = node.start(alone6=True)
    assert not node.link(device)


# -- Kubernetes --------------------------------------------------------------------------------------------------------

KEYS = Keys("flannel.alpha.coreos.com")
DATA = {"VNI": 1, "VtepMAC": "0a:00:00:00:00:01"}
ATTRS = LeaseAttrs(IPv6Address("fd50::2"), "vxlan", DATA)
LEASE = Lease(IPv6Network("fd00:10:244:2::/64"), ATTRS)


def test_annotations_come_back_and_say_nothing_of_ipv4() -> None:
    wanted = wanted_annotations(ATTRS, Addresses(None, IPv6Address("fd50::2")), KEYS)
    assert wanted == {
        "flannel.alpha.coreos.com/kube-subnet-manager": "true",
        "flannel.alpha.coreos.com/backend-type": "vxlan",
        "flannel.alpha.coreos.com/backend-v6-data": '{"VNI":1,"VtepMAC":"0a:00:00:00:00:01"}',
        "flannel.alpha.coreos.com/public-ipv6": "fd50::2",
    }
    node = KubeNode("n", "", wanted, {})
    assert published(node, KEYS, 6) == ATTRS
    data = {"PublicKey": base64.b64encode(key_of(2)).decode(), "Port": 51821}
    wireguard = LeaseAttrs(IPv6Address("fd50::2"), "wireguard", data)
    texts = wanted_annotations(wireguard, Addresses(None, IPv6Address("fd50::2")), KEYS)
    assert texts[KEYS.backend_data6] == f'{{"PublicKey":"{data["PublicKey"]}","Port":51821}}'
    assert published(KubeNode("n", "", texts, {}), KEYS, 6) == wireguard
    with pytest.raises(ValueError, match="public-ip annotation"):
        published(node, KEYS)
    with pytest.raises(ValueError, match="no public-ipv6"):
        published(KubeNode("n", "", {}, {}), KEYS, 6)
    node = KubeNode("n", "", {KEYS.public_ip6_overwrite: "2001:db8::7", KEYS.public_ip_overwrite: "192.0.2.1"}, {})
    assert overwritten(node, KEYS, ATTRS) == (Addresses(None, IPv6Address("2001:db8::7")), [])


def test_what_upstream_writes_with_host_gw_is_read() -> None:
    texts = {KEYS.backend_type: "host-gw", KEYS.backend_data: "null", KEYS.public_ip: "0.0.0.0"}
    texts |= {KEYS.backend_data6: "null", KEYS.public_ip6: "fd50::2"}
    assert published(KubeNode("n", "", texts, {}), KEYS, 6) == LeaseAttrs(IPv6Address("fd50::2"), "host-gw")


def test_which_pod_cidrs_count() -> None:
    four, six = IPv4Network("10.244.1.0/24"), IPv6Network("fd00:10:244:1::/64")
    assert counted(Cidrs(four, six), 6, dual=False) == (six, None)
    assert counted(Cidrs(four, six), 4, dual=False) == (four, None)
    assert counted(Cidrs(four, six), 4, dual=True) == (four, six)
    assert counted(Cidrs(four, None), 6, dual=False) == (None, None)


@pytest.mark.parametrize(
    ("lease", "why"),
    [
        (LEASE, ""),
        (Lease(IPv6Network("fd00:10:245::/64"), ATTRS), "not a part of the IPv6Network"),
        (Lease(IPv6Network("::/0"), ATTRS), "not a part of the IPv6Network"),
        (Lease(IPv4Network("10.244.1.0/24"), ATTRS), "not of IPv6"),
        (LEASE._replace(attrs=ATTRS._replace(public_ip=IPv6Address("ff02::1"))), "no node's address"),
        (LEASE._replace(attrs=ATTRS._replace(public_ip=IPv6Address("fd00:10:244:9::1"))), "reached through itself"),
        (LEASE._replace(attrs=ATTRS._replace(backend_data={"VtepMAC": "01:00:5e:00:00:01"})), "no unicast MAC"),
        (LEASE._replace(attrs=ATTRS._replace(backend_type="x")), "unknown"),
    ],
)
def test_a_hostile_lease_is_refused_by_name(lease: Lease, why: str) -> None:
    said = why_unusable(lease, NETWORK)
    assert (why in said) if why else said == ""


def test_subnets_that_overlap() -> None:
    one = IPv6Network("fd00:10:244:2::/64")
    assert overlap(one, IPv6Network("fd00:10:244::/56"))
    assert overlap(one, one)
    assert not overlap(one, IPv6Network("fd00:10:244:3::/64"))


def test_etcd_refuses_it(make_store: Any, etcd: Any) -> None:
    store, _ = make_store(etcd)
    with pytest.raises(StoreError, match="--kube-subnet-mgr"):
        store.acquire(parse(CONF % "vxlan"), ATTRS, None)
    assert etcd.keys() == []
