"""IPv6 beside IPv4: vxlan and host-gw in the kernel, leases in etcd, rules and subnet.env."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Any

import pytest

from flannel import subnetenv
from flannel.backends.base import BackendError
from flannel.backends.vxlan import VxlanBackend
from flannel.daemon import make_backend
from flannel.lease import Lease, LeaseAttrs
from flannel.netconf import NetConf, parse
from flannel.stores.base import Snapshot
from flannel.stores.leasecodec import lease_key, lease_value, parse_value, why_unusable
from tests.flannel.backendlab import EXTERNAL
from tests.flannel.conftest import Etcd
from tests.flannel.corelab import HEALS_WITHIN, Node, peer, until

NETWORK6 = IPv6Network("fd00:10:244::/56")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    for switch in ("all", "default", "eth0", "far", "lo"):
        made.run("sh", "-c", f"echo 0 > /proc/sys/net/ipv6/conf/{switch}/disable_ipv6", check=False)
    made.ip("addr add fd50::1/64 dev eth0 nodad")
    yield made
    made.close()


def dual(number: int, *, kind: str = "vxlan", mac6: str = "") -> dict[str, Any]:
    """The lease of another node: 10.244.N.0/24 and fd00:10:244:N::/64 at 192.168.50.N and fd50::N."""
    data6 = {"VNI": 1, "VtepMAC": mac6 or f"06:aa:bb:cc:dd:{number:02x}"} if kind == "vxlan" else None
    more = {"subnet6": f"fd00:10:244:{number}::/64", "ip6": f"fd50::{number:x}", "data6": data6}
    return {**peer(number, kind=kind), **more}


def dual_conf(kind: str = "vxlan") -> NetConf:
    return parse(
        '{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:10:244::/56", '
        f'"Backend": {{"Type": "{kind}"}}}}'
    )


def programmed6(node: Node, *numbers: int) -> bool:
    """Whether exactly these peers have a route, a neighbour and an FDB entry by the tunnel of IPv6."""
    shown = node.ip("-6 route show dev flannel-v6.1", check=False).splitlines()
    routes = [line.strip() for line in shown if "via" in line]
    neighbours = node.ip("-6 neigh show dev flannel-v6.1 nud permanent", check=False).splitlines()
    fdb = node.fdb("flannel-v6.1")
    return (
        routes == [f"fd00:10:244:{n}::/64 via fd00:10:244:{n}:: metric 1024 onlink pref medium" for n in numbers]
        and sorted(line.split(" lladdr ")[0] for line in neighbours) == [f"fd00:10:244:{n}::" for n in numbers]
        and fdb == [f"06:aa:bb:cc:dd:{n:02x} dst fd50::{n:x}" for n in numbers]
    )


def test_the_kernel_holds_what_upstream_leaves(node: Node) -> None:
    daemon = node.start("--ip-masq", dual=True)
    published = daemon.published()
    daemon.list(dual(2), dual(3))
    until(lambda: node.programmed(2, 3) and programmed6(node, 2, 3), f"both families\n{daemon.log}", HEALS_WITHIN)
    shown = node.ip("-d link show flannel-v6.1")
    assert "vxlan id 1 local fd50::1 dev eth0 srcport 0 0 dstport 8472 nolearning" in shown
    assert "mtu 1430" in shown
    assert "inet6 fd00:10:244:1::/128 scope global" in node.ip("-6 addr show dev flannel-v6.1")
    assert published["ip6"] == "fd50::1"
    assert published["data6"] == {"VNI": 1, "VtepMAC": node.link("flannel-v6.1")["address"]}
    assert published["data"]["VtepMAC"] == node.link()["address"] != published["data6"]["VtepMAC"]
    assert node.run("cat", "/run/flannel/subnet.env") == (
        "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_IPV6_NETWORK=fd00:10:244::/56\n"
        "FLANNEL_IPV6_SUBNET=fd00:10:244:1::1/64\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
    )
    rules = node.run("ip6tables", "-t", "nat", "-S", "FLANNEL-POSTRTG")
    assert "-s fd00:10:244::/56 ! -d ff00::/8" in rules
    assert rules.count("\n") == 7
    daemon.tell(removed=dual(2))
    until(lambda: node.programmed(3) and programmed6(node, 3), "one peer", HEALS_WITHIN)


@pytest.mark.parametrize(
    "damage",
    [
        "link del flannel-v6.1",
        "link set flannel-v6.1 down",
        "link set flannel-v6.1 mtu 1300",
        "addr del fd00:10:244:1::/128 dev flannel-v6.1",
        "addr add fd00:10:244:77::1/64 dev flannel-v6.1",
        "route del fd00:10:244:2::/64",
        "route replace fd00:10:244:2::/64 via fd50::fe dev eth0",
        "neigh del fd00:10:244:2:: dev flannel-v6.1",
        "neigh replace fd00:10:244:2:: lladdr 02:00:00:00:00:99 dev flannel-v6.1 nud permanent",
    ],
)
def test_damage_heals(node: Node, damage: str) -> None:
    daemon = node.start(dual=True)
    daemon.list(dual(2), dual(3))
    until(lambda: programmed6(node, 2, 3), f"IPv6\n{daemon.log}", HEALS_WITHIN)
    mac = node.link("flannel-v6.1")["address"]
    node.ip(f"-6 {damage}")

    def whole() -> bool:
        link = node.link("flannel-v6.1")
        up = bool(link) and "UP" in link["flags"] and link["mtu"] == 1430 and link["address"] == mac
        addresses = node.ip("-6 -o addr show dev flannel-v6.1 scope global", check=False)
        one = addresses.count("inet6") == 1 and "fd00:10:244:1::/128" in addresses
        return up and one and programmed6(node, 2, 3) and node.programmed(2, 3)

    until(whole, f"everything back after `ip -6 {damage}`\n{daemon.log}", HEALS_WITHIN)


def test_what_is_left_over_goes_with_the_first_list(node: Node) -> None:
    daemon = node.start(dual=True)
    daemon.list(dual(2), dual(3))
    until(lambda: programmed6(node, 2, 3), "IPv6", HEALS_WITHIN)
    daemon.stop()
    daemon = node.start(dual=True)
    assert programmed6(node, 2, 3)
    daemon.list(dual(3), peer(4))
    until(lambda: node.programmed(3, 4) and programmed6(node, 3), f"what is left\n{daemon.log}", HEALS_WITHIN)
    daemon.stop()
    # IPv4 alone again: nothing of IPv6 stays.
    daemon = node.start()
    assert not node.link("flannel-v6.1")
    assert "FLANNEL" not in node.run("ip6tables-save")
    assert "IPV6" not in node.run("cat", "/run/flannel/subnet.env")


def test_host_gw_routes_by_the_peer_s_ipv6_address(node: Node) -> None:
    daemon = node.start(backend={"Type": "host-gw"}, dual=True, nftables=True)
    assert daemon.published() == {
        "ip": "192.168.50.1",
        "type": "host-gw",
        "data": None,
        "ip6": "fd50::1",
        "data6": None,
    }

    def routes() -> list[str]:
        shown = node.ip("-6 route show dev eth0").splitlines()
        return [line.strip() for line in shown if line.startswith("fd00:10:244:")]

    daemon.list(dual(2, kind="host-gw"), dual(3, kind="host-gw"))
    wanted = [f"fd00:10:244:{n}::/64 via fd50::{n} metric 1024 pref medium" for n in (2, 3)]
    until(lambda: routes() == wanted, f"routes {routes()}\n{daemon.log}", HEALS_WITHIN)
    node.ip("-6 route del fd00:10:244:2::/64")
    until(lambda: routes() == wanted, "the route is back", HEALS_WITHIN)
    assert "ip6 saddr fd00:10:244::/56 accept" in node.run("nft", "list", "table", "ip6", "flannel-ipv6")
    daemon.stop()
    daemon = node.start(backend={"Type": "host-gw"}, dual=True)
    daemon.list(dual(3, kind="host-gw"))
    until(lambda: routes() == wanted[1:], f"what was recorded is gone\n{daemon.log}", HEALS_WITHIN)


@pytest.mark.parametrize("kind", ["ipip", "udp", "alloc"])
def test_a_backend_of_ipv4_alone_says_so(kind: str) -> None:
    with pytest.raises(BackendError, match=f"{kind} carries IPv4 alone"):
        make_backend(dual_conf(kind), EXTERNAL)


def test_an_underlay_too_small_for_ipv6_is_refused() -> None:
    small = EXTERNAL._replace(mtu=1349, address6=IPv6Address("fd50::1"), public6=IPv6Address("fd50::1"))
    with pytest.raises(BackendError, match="1279 bytes"):
        VxlanBackend(dual_conf(), small)
    VxlanBackend(dual_conf(), small._replace(mtu=1350))


# -- leases ------------------------------------------------------------------------------------------------------------

ATTRS = LeaseAttrs(
    IPv4Address("192.0.2.1"), "vxlan", {"VNI": 1, "VtepMAC": "0a:00:00:00:00:01"},
    IPv6Address("fd50::1"), {"VNI": 1, "VtepMAC": "0a:00:00:00:00:61"},
)  # fmt: skip
LEASE = Lease(IPv4Network("10.244.2.0/24"), ATTRS, subnet6=IPv6Network("fd00:10:244:2::/64"))


def test_a_value_comes_back() -> None:
    assert parse_value(lease_value(ATTRS)) == ATTRS
    assert lease_key(LEASE.subnet, LEASE.subnet6) == "10.244.2.0-24&fd00:10:244:2::-64"
    with pytest.raises(ValueError, match="PublicIPv6"):
        parse_value(b'{"PublicIP": "192.0.2.1", "PublicIPv6": "192.0.2.1"}')


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"subnet6": IPv6Network("fd00:10:245::/64")}, "not a part of the IPv6Network"),
        ({"subnet6": IPv6Network("::/0")}, "not a part of the IPv6Network"),
        ({"public_ip6": IPv6Address("ff02::1")}, "no node's address"),
        ({"public_ip6": IPv6Address("::")}, "no node's address"),
        ({"public_ip6": IPv6Address("fd00:10:244:9::1")}, "reached through itself"),
        ({"backend_data6": {"VNI": 1, "VtepMAC": "01:00:5e:00:00:01"}}, "no unicast MAC"),
        ({}, ""),
    ],
)
def test_a_hostile_peer_s_ipv6_is_refused_by_name(changed: dict[str, Any], why: str) -> None:
    subnet6 = changed.pop("subnet6", LEASE.subnet6)
    attrs = ATTRS._replace(**changed)
    said = why_unusable(Lease(LEASE.subnet, attrs, subnet6=subnet6), IPv4Network("10.244.0.0/16"), NETWORK6)
    assert (why in said) if why else said == ""


def test_a_lease_of_both_families_is_taken_kept_and_told(
    etcd: Etcd, make_store: Callable[..., Any]
) -> None:  # fmt: skip
    store, _ = make_store(etcd)
    lease = store.acquire(dual_conf(), ATTRS, None)
    assert lease.subnet6 is not None
    assert lease.subnet6.subnet_of(NETWORK6)
    assert etcd.keys() == [lease_key(lease.subnet, lease.subnet6)]
    again, _ = make_store(etcd)
    assert again.acquire(dual_conf(), ATTRS, None) == lease.__class__(
        lease.subnet, ATTRS, pytest.approx(lease.expiration, abs=30), lease.subnet6
    )
    other, seen = make_store(etcd)
    theirs = LeaseAttrs(
        IPv4Address("192.0.2.2"), "vxlan", ATTRS.backend_data, IPv6Address("fd50::2"), ATTRS.backend_data6
    )
    wanted = IPv6Network("fd00:10:244:20::/64")
    second = other.acquire(dual_conf(), theirs, IPv4Network("10.244.20.0/24"), wanted)
    assert (second.subnet, second.subnet6) == (IPv4Network("10.244.20.0/24"), wanted)
    other.watch(seen.post)
    listed = {one.subnet: one for one in seen.wait(Snapshot)[0].leases}
    assert listed[lease.subnet].subnet6 == lease.subnet6
    assert listed[lease.subnet].attrs == ATTRS


def test_the_younger_of_two_keys_with_one_subnet_gives_way(etcd: Etcd, make_store: Callable[..., Any]) -> None:
    # Another node's key of the same IPv4 subnet comes between this one's look and its key.
    store, _ = make_store(etcd)
    entries, looks = store._entries, []

    def look() -> Any:
        found = entries()
        looks.append(len(found))
        if len(looks) == 1:
            value = lease_value(LeaseAttrs(IPv4Address("192.0.2.9"), "vxlan", {"VtepMAC": "0a:00:00:00:00:99"}))
            etcd.put("subnets/10.244.20.0-24&fd00:10:244:20::-64", value.decode())
        return found

    store._entries = look
    lease = store.acquire(dual_conf(), ATTRS, IPv4Network("10.244.20.0/24"), IPv6Network("fd00:10:244:21::/64"))
    assert lease.subnet != IPv4Network("10.244.20.0/24")
    assert sorted(etcd.keys()) == sorted(
        ["10.244.20.0-24&fd00:10:244:20::-64", lease_key(lease.subnet, lease.subnet6)]
    )  # fmt: skip


def test_subnet_env_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "subnet.env"
    text = subnetenv.render(
        IPv4Network("10.244.0.0/16"), IPv4Network("10.244.1.0/24"), 1450, True, NETWORK6, LEASE.subnet6
    )  # fmt: skip
    path.write_text(text)
    assert subnetenv.read(str(path)).of(6) == (NETWORK6, LEASE.subnet6)


def test_an_ipv6_subnet_that_another_node_has_stays_its_own(node: Node) -> None:
    daemon = node.start(dual=True)
    daemon.list(dual(2), dual(3))
    until(lambda: programmed6(node, 2, 3), "both peers", HEALS_WITHIN)
    before = node.ip("-6 neigh show dev flannel-v6.1 nud permanent")
    daemon.tell(added={**dual(66), "subnet6": dual(2)["subnet6"]})
    daemon.said("ignoring the lease of 10.244.66.0/24 from 192.168.50.66: its subnet fd00:10:244:2::/64 overlaps")
    daemon.tell(added=dual(4))
    until(lambda: programmed6(node, 2, 3, 4), "the next peer", HEALS_WITHIN)
    assert before.splitlines()[0] in node.ip("-6 neigh show dev flannel-v6.1 nud permanent")
    daemon.tell(removed=dual(2))
    until(lambda: "dst fd50::42" in "".join(node.fdb("flannel-v6.1")), "its turn has come", HEALS_WITHIN)
