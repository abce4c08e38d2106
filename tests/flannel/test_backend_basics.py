"""What backends have in common, and small promises of single ones: flannel-behaviour.md, section 3."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest

from flannel import charon
from flannel.backends.base import NOTHING, BackendError
from flannel.backends.choice import BACKENDS, make_backend
from flannel.kernel.values import UNICAST
from flannel.lease import Lease, LeaseAttrs
from flannel.netconf import NetConfError
from tests.flannel.backendlab import EXTERNAL, conf, facts, lease
from tests.flannel.corelab import HEALS_WITHIN, Node, peer, until

PSK = "x" * 96
ALL: dict[str, dict[str, Any]] = {kind: {"PSK": PSK} if kind == "ipsec" else {} for kind in BACKENDS}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.close()


def test_the_backends_are_upstreams() -> None:
    assert set(BACKENDS) == {"vxlan", "host-gw", "ipip", "udp", "wireguard", "ipsec", "alloc", "extension"}


@pytest.mark.parametrize("kind", ["vxlan", "VXLAN", "Host-GW"])
def test_a_type_is_found_in_any_case(kind: str) -> None:
    assert make_backend(conf(Type=kind), EXTERNAL).name == kind.lower()


def test_an_empty_type_is_unknown() -> None:
    with pytest.raises(BackendError, match="unknown backend type ''"):
        make_backend(conf(VNI=1), EXTERNAL)


@pytest.mark.parametrize(
    ("kind", "overhead"),
    [("vxlan", 50), ("host-gw", 0), ("ipip", 20), ("udp", 28), ("wireguard", 80), ("ipsec", 77), ("alloc", 0),
     ("extension", 0)],
)  # fmt: skip
def test_the_mtu_is_the_interfaces_less_the_overhead(
    kind: str, overhead: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WIREGUARD_KEY_FILE", str(tmp_path / "key"))
    assert make_backend(conf(Type=kind, **ALL[kind]), EXTERNAL).mtu == 1500 - overhead


@pytest.mark.parametrize(("kind", "overhead"), [("vxlan", 50), ("wireguard", 80)])
def test_a_configured_mtu_is_reduced_too(
    kind: str, overhead: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WIREGUARD_KEY_FILE", str(tmp_path / "key"))
    assert make_backend(conf(Type=kind, MTU=1400), EXTERNAL).mtu == 1400 - overhead


@pytest.mark.parametrize("kind", ["vxlan", "host-gw", "ipip", "wireguard", "ipsec", "extension"])
def test_leases_of_another_type_are_ignored_by_name(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WIREGUARD_KEY_FILE", str(tmp_path / "key"))
    backend = make_backend(conf(Type=kind, **ALL[kind]), EXTERNAL)
    other = "ipip" if kind == "vxlan" else "vxlan"
    with pytest.raises(Exception, match=f"its backend is '{other}', not {kind}"):
        backend.wants(lease(2, other, {"VtepMAC": "02:aa:bb:cc:dd:02"}), facts())


@pytest.mark.parametrize(("kind", "key"), [("vxlan", "VtepMAC"), ("wireguard", "PublicKey"), ("wireguard", "Port")])
def test_what_a_peer_wrote_is_shown_in_short(kind: str, key: str) -> None:
    """A value in etcd can be a megabyte long, and another one each second."""
    data = {"PublicKey": "A" * 43 + "=", key: "x\n" * 100000}
    with pytest.raises(Exception, match="its data holds no usable") as caught:
        make_backend(conf(Type=kind), EXTERNAL).wants(lease(2, kind, data), facts())
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("kind", ["", "vxlan", "udp"])
def test_udp_serves_leases_of_any_type(kind: str) -> None:
    assert make_backend(conf(Type="udp"), EXTERNAL).wants(lease(2, kind), facts("flannel0")) == NOTHING


@pytest.mark.parametrize("kind", ["udp", "alloc"])
def test_udp_and_alloc_publish_an_address_alone(kind: str) -> None:
    assert make_backend(conf(Type=kind), EXTERNAL).attrs() == LeaseAttrs(EXTERNAL.public)


def test_extension_publishes_the_interfaces_own_address() -> None:
    external = EXTERNAL._replace(public=IPv4Address("203.0.113.8"))
    assert make_backend(conf(Type="extension"), external).attrs() == LeaseAttrs(EXTERNAL.address, "extension")


def test_ipsec_without_charon_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def nowhere(name: str) -> str:
        asked.append(name)
        return ""

    monkeypatch.setattr(charon, "find", nowhere)
    with pytest.raises(BackendError, match="charon is not installed"):
        charon.find_charon()
    folders = ("strongswan", "ipsec")
    usual = [f"/usr/{where}/{name}/charon" for where in ("lib", "libexec") for name in folders]
    assert asked[:5] == ["charon", *usual]


def test_a_vni_in_a_peers_lease_does_not_count() -> None:
    backend = make_backend(conf(Type="vxlan"), EXTERNAL)
    tunnel = facts("flannel.1")
    plain = backend.wants(lease(2, "vxlan", {"VtepMAC": "02:aa:bb:cc:dd:02"}), tunnel)
    assert plain == backend.wants(lease(2, "vxlan", {"VNI": 99, "VtepMAC": "02:aa:bb:cc:dd:02"}), tunnel)
    assert (len(plain.neighbours), len(plain.fdb), len(plain.routes)) == (1, 1, 1)


def test_a_direct_peer_has_a_plain_route_alone() -> None:
    backend = make_backend(conf(Type="vxlan", DirectRouting=True), EXTERNAL)
    one = Lease(
        IPv4Network("10.244.2.0/24"),
        LeaseAttrs(IPv4Address("192.168.50.2"), "vxlan", {"VtepMAC": "02:aa:bb:cc:dd:02"}),
    )
    wanted = backend.wants(one, facts("flannel.1", "192.168.50.2"))
    assert (wanted.neighbours, wanted.fdb) == ((), ())
    [route] = wanted.routes
    assert (route.gateway, route.onlink, route.kind) == (int(IPv4Address("192.168.50.2")), False, UNICAST)


@pytest.mark.parametrize("backend", [{"Type": "vxlan", "VNI": 1 << 24}, {"Type": "udp", "Port": 0}])
def test_numbers_out_of_bounds_are_refused(backend: dict[str, Any]) -> None:
    with pytest.raises(NetConfError, match=r"Backend\.(VNI|Port)"):
        make_backend(conf(**backend), EXTERNAL)


# -- in the kernel -----------------------------------------------------------------------------------------------------


def test_addresses_outside_the_network_stay_on_the_device(node: Node) -> None:
    node.start().list()
    node.ip("addr add 172.20.0.1/32 dev flannel.1")
    node.ip("addr add 10.244.9.9/32 dev flannel.1")
    until(lambda: "10.244.9.9" not in node.ip("addr show dev flannel.1"), "the strange one is gone", HEALS_WITHIN)
    shown = node.ip("-4 -o addr show dev flannel.1")
    assert "172.20.0.1/32" in shown
    assert "10.244.1.0/32" in shown


def test_ipv6_accepts_no_router_on_the_device(node: Node) -> None:
    daemon = node.start()
    assert node.run("cat", "/proc/sys/net/ipv6/conf/flannel.1/accept_ra").strip() == "0"
    assert "VXLAN config: VNI=1 Port=0 GBP=False Learning=False DirectRouting=False" in daemon.log


def test_flanneld_sets_no_other_switch_of_the_kernel(node: Node) -> None:
    names = ("ipv4/ip_forward", "ipv4/conf/all/rp_filter", "ipv4/conf/eth0/rp_filter", "ipv6/conf/all/forwarding")
    paths = [f"/proc/sys/net/{name}" for name in names]
    before = node.run("cat", *paths)
    daemon = node.start("--ip-masq")
    daemon.list(peer(2))
    until(lambda: node.programmed(2), "a peer")
    assert node.run("cat", *paths) == before


def test_a_published_mac_of_another_is_replaced_by_the_devices(node: Node) -> None:
    """The device survived and its address is what packets reach, whatever the annotation says by now."""
    node.start().stop()
    mac = node.link()["address"]
    remembered = (
        '{"lease": {"subnet": "10.244.1.0/24", "ip": "192.168.50.1", "type": "vxlan", '
        '"data": {"VNI": 1, "VtepMAC": "02:00:00:00:00:77"}}}'
    )
    daemon = node.start(environment={"REMEMBERED": remembered})
    assert node.link()["address"] == mac
    assert daemon.published()["data"]["VtepMAC"] == mac


def test_host_gw_takes_the_interfaces_whole_mtu(node: Node) -> None:
    node.start(backend={"Type": "host-gw"})
    assert "FLANNEL_MTU=1500" in node.run("cat", "/run/flannel/subnet.env")
    assert not [line for line in node.ip("-o link show").splitlines() if "flannel" in line]
