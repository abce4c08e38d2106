"""wireguard in a kernel that has it: device, addresses, routes and peers, what heals, and what goes."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flannel.backendlab import need_link
from tests.flannel.corelab import HEALS_WITHIN, Node, until
from tests.flannel.wireguardlab import WIREGUARD, lease_of, text_of


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    need_link(made, "wireguard")
    made.ip("addr add fd50::1/64 dev eth0 nodad")
    yield made
    made.close()


def told(number: int, *, ip6: str = "") -> dict[str, Any]:
    lease = lease_of(number, ip6=ip6)
    more = {"subnet6": str(lease.subnet6), "ip6": ip6, "data6": lease.attrs.backend_data6} if ip6 else {}
    return {
        "subnet": str(lease.subnet), "ip": str(lease.attrs.public_ip), "type": "wireguard",
        "data": lease.attrs.backend_data, **more,
    }  # fmt: skip


def shown_peers(node: Node, device: str = "flannel-wg") -> list[str]:
    """`KEY-NUMBER ENDPOINT ALLOWED` of each peer, by wireguard's own tool."""
    lines = node.run("wg", "show", device, "dump", check=False).splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    return sorted(f"{base64.b64decode(row[0])[0]} {row[2]} {row[3]}" for row in rows)


def wanted_peers(*numbers: int) -> list[str]:
    return [f"{n} 192.168.50.{n}:51820 10.244.{n}.0/24" for n in numbers]


def test_the_kernel_holds_what_upstream_leaves(node: Node) -> None:
    daemon = node.start(backend=WIREGUARD)
    published = daemon.published()
    daemon.list(told(2), told(3))
    until(lambda: shown_peers(node) == wanted_peers(2, 3), f"the peers\n{daemon.log}", HEALS_WITHIN)
    public = node.run("wg", "show", "flannel-wg", "public-key").strip()
    data = {"PublicKey": public, "Port": 51820}
    assert published == {"ip": "192.168.50.1", "type": "wireguard", "data": data}
    assert node.run("wg", "show", "flannel-wg", "listen-port").strip() == "51820"
    assert node.routes() == ["10.244.0.0/16 dev flannel-wg scope link"]
    shown = node.ip("-d addr show dev flannel-wg")
    assert "mtu 1420" in shown
    assert "inet 10.244.1.0/32 scope global" in shown
    assert node.run("stat", "-c", "%a", "/run/flannel/wgkey").strip() == "400"
    daemon.tell(removed=told(2))
    until(lambda: shown_peers(node) == wanted_peers(3), "one peer", HEALS_WITHIN)
    assert daemon.stop() == 0
    assert shown_peers(node) == wanted_peers(3)
    assert node.start(backend=WIREGUARD).published()["data"] == data


@pytest.mark.parametrize(
    "damage",
    [
        "ip link del flannel-wg",
        "ip link set flannel-wg down",
        "ip link set flannel-wg mtu 1300",
        "ip addr del 10.244.1.0/32 dev flannel-wg",
        "ip route del 10.244.0.0/16",
        # The kernel tells nothing of peers and ports, but with the device they are looked at, too.
        "wg show flannel-wg peers | xargs -n 1 wg set flannel-wg listen-port 4711 peer; ip link set flannel-wg down",
        "wg show flannel-wg peers | xargs -I % wg set flannel-wg peer % remove; ip link set flannel-wg down",
        "wg genkey > /run/other && wg set flannel-wg private-key /run/other && ip link set flannel-wg down",
    ],
)
def test_damage_heals(node: Node, damage: str) -> None:
    daemon = node.start(backend=WIREGUARD)
    daemon.list(told(2), told(3))
    until(lambda: shown_peers(node) == wanted_peers(2, 3), "the peers", HEALS_WITHIN)
    own = ["wg", "show", "flannel-wg", "dump"]
    key = node.run(*own).splitlines()[0]
    node.run("sh", "-c", damage)

    def whole() -> bool:
        shown = node.ip("-d addr show dev flannel-wg", check=False)
        device = "mtu 1420" in shown and ",UP" in shown and "10.244.1.0/32" in shown
        route = node.routes() == ["10.244.0.0/16 dev flannel-wg scope link"]
        same = node.run(*own, check=False).splitlines()[:1] == [key]
        return device and route and same and shown_peers(node) == wanted_peers(2, 3)

    until(whole, f"everything back after `{damage}`\n{daemon.log}", HEALS_WITHIN)


def test_leftovers_go_with_the_first_list_and_the_device_with_the_backend(node: Node) -> None:
    daemon = node.start(backend=WIREGUARD)
    daemon.list(told(2), told(3))
    until(lambda: shown_peers(node) == wanted_peers(2, 3), "the peers", HEALS_WITHIN)
    daemon.stop()
    daemon = node.start(backend=WIREGUARD)
    assert shown_peers(node) == wanted_peers(2, 3)
    daemon.list(told(3))
    until(lambda: shown_peers(node) == wanted_peers(3), "what is left is gone", HEALS_WITHIN)
    daemon.stop()
    node.start(backend={"Type": "vxlan"})
    assert not node.link("flannel-wg")


def test_both_families_have_a_device_each_or_one_together(node: Node) -> None:
    daemon = node.start(backend=WIREGUARD, dual=True)
    daemon.list(told(2, ip6="fd50::2"))
    six = ["2 [fd50::2]:51821 fd00:10:244:2::/64"]
    until(lambda: shown_peers(node, "flannel-wg-v6") == six, f"IPv6\n{daemon.log}", HEALS_WITHIN)
    assert shown_peers(node) == wanted_peers(2)
    assert "fd00:10:244::/56" in node.ip("-6 route show dev flannel-wg-v6")
    daemon.stop()
    daemon = node.start(backend={**WIREGUARD, "Mode": "ipv4"}, dual=True)
    daemon.list(told(2, ip6="fd50::2"))
    both = "2 192.168.50.2:51820 "

    def together() -> bool:
        (*shown,) = shown_peers(node)
        return len(shown) == 1 and shown[0].startswith(both) and shown[0].count("/") == 2

    until(together, f"one device: {shown_peers(node)}\n{daemon.log}", HEALS_WITHIN)
    assert not node.link("flannel-wg-v6")
    assert "fd00:10:244::/56" in node.ip("-6 route show dev flannel-wg")


def test_a_psk_and_a_keepalive_reach_the_peers(node: Node) -> None:
    psk = text_of(os.urandom(32))
    daemon = node.start(backend={**WIREGUARD, "PSK": psk, "PersistentKeepaliveInterval": 25, "ListenPort": 4711})
    daemon.list(told(2))
    until(lambda: len(shown_peers(node)) == 1, "the peer", HEALS_WITHIN)
    row = node.run("wg", "show", "flannel-wg", "dump").splitlines()[1].split("\t")
    assert (row[1], row[7]) == (psk, "25")
    assert psk not in daemon.log
