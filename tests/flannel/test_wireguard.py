"""wireguard: the bytes of its messages, keys, and what is wanted for a peer by its lease."""

from __future__ import annotations

import base64
import errno
import json
import os
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Any

import pytest

from flannel.backends.base import BackendError, Ignored
from flannel.backends.wireguard import (
    Own,
    WireguardBackend,
    _is_as_wanted,
    load_private_key,
    read_key,
    read_peer_data,
)
from flannel.kernel import wireguard
from flannel.kernel.netlink import NetlinkError, attribute
from flannel.kernel.rtnl import SCOPE_LINK
from flannel.kernel.values import METRIC6, Route
from flannel.kernel.wireguard import Peer
from flannel.lease import Lease
from flannel.netconf import NetConfError, parse
from tests.flannel.backendlab import EXTERNAL, conf, facts
from tests.flannel.wireguardlab import WIREGUARD, key_of, lease_of, text_of

DUAL = EXTERNAL._replace(address6=IPv6Address("2001:db8::1"), public6=IPv6Address("2001:db8::1"))


def dual_conf(**backend: Any) -> Any:
    both = {"Network": "10.244.0.0/16", "EnableIPv6": True, "IPv6Network": "fd00:10:244::/56"}
    return parse(json.dumps({**both, "Backend": {"Type": "wireguard", **backend}}))


# -- bytes -------------------------------------------------------------------------------------------------------------


def test_a_peer_is_packed_as_the_kernel_reads_it() -> None:
    peer = Peer(key_of(2), (IPv4Address("192.168.50.2"), 51820), frozenset({IPv4Network("10.244.2.0/24")}), 25)
    assert wireguard.pack_peer(peer) == (
        bytes.fromhex("2400 0100") + key_of(2)  # WGPEER_A_PUBLIC_KEY
        + bytes.fromhex("0800 0300 02000000")  # WGPEER_A_FLAGS: replace allowed addresses
        + bytes.fromhex("2400 0200") + bytes(32)  # WGPEER_A_PRESHARED_KEY: none
        + bytes.fromhex("1400 0400 0200 ca6c c0a83202 0000000000000000")  # WGPEER_A_ENDPOINT: sockaddr_in
        + bytes.fromhex("0600 0500 1900 0000")  # WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL
        + bytes.fromhex("2000 0980")  # WGPEER_A_ALLOWEDIPS, nested
        + bytes.fromhex("1c00 0080 0600 0100 0200 0000 0800 0200 0af40200 0500 0300 18000000")
    )  # fmt: skip
    assert wireguard.pack_peer(peer, remove=True) == (
        bytes.fromhex("2400 0100") + key_of(2) + bytes.fromhex("0800 0300 01000000")
    )
    assert wireguard.pack_endpoint((IPv6Address("fd50::2"), 51821)) == (
        bytes.fromhex("0a00 ca6d 00000000 fd500000000000000000000000000002 00000000")
    )


def test_a_device_is_packed_with_what_changes_only() -> None:
    assert wireguard.device_body("wg0", private_key=key_of(1), port=51820) == (
        bytes.fromhex("01010000 0800 0200") + b"wg0\0" + bytes.fromhex("2400 0300") + key_of(1)
        + bytes.fromhex("0600 0600 6cca 0000")
    )  # fmt: skip
    peers = wireguard.device_body("wg0", peers=[b"\x08\0\3\0\1\0\0\0"])
    assert peers == bytes.fromhex("01010000 0800 0200") + b"wg0\0" + bytes.fromhex(
        "1000 0880 0c00 0080 0800 0300 01000000"
    )


def test_a_dump_comes_back_also_in_several_messages() -> None:
    one = Peer(key_of(2), (IPv4Address("192.168.50.2"), 7), frozenset({IPv4Network("10.244.2.0/24")}), 25, key_of(9))
    two = Peer(key_of(3), (IPv6Address("fd50::3"), 8), frozenset({IPv6Network("fd00:10:244:3::/64")}))
    more = two._replace(allowed=frozenset({IPv4Network("10.244.3.0/24")}))
    device = wireguard.device_body("wg0", private_key=key_of(1), port=51820, peers=map(wireguard.pack_peer, (one, two)))
    rest = wireguard.device_body("wg0", peers=[wireguard.pack_peer(more)])
    found = wireguard.read_device([device, rest])
    assert (found.private_key, found.port) == (key_of(1), 51820)
    assert found.peers == {one.key: one, two.key: two._replace(allowed=two.allowed | more.allowed)}
    assert wireguard.read_device([]) == wireguard.Device(b"", b"", 0, {})


@pytest.mark.parametrize("data", [b"", b"\x04", b"\xff\xff\x08\x80", attribute(0x8008, attribute(0x8000, b"\x03"))])
def test_odd_bytes_break_nothing(data: bytes) -> None:
    wireguard.read_device([bytes(4) + data])


# -- keys --------------------------------------------------------------------------------------------------------------


def test_a_key_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "run" / "wgkey"
    key = load_private_key(str(path))
    assert load_private_key(str(path)) == key
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o400, 0o755)
    assert base64.b64decode(path.read_text(), validate=True) == key
    assert not path.read_text().endswith("\n")
    assert (key[0] & 7, key[31] & 0xC0) == (0, 0x40)
    path.chmod(0o600)
    path.write_text(text_of(bytes([255] * 32)) + "\n")
    assert load_private_key(str(path))[31] == 127
    path.write_text("not a key\n")
    with pytest.raises(BackendError, match="wgkey") as refused:
        load_private_key(str(path))
    assert "not a key" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "x", text_of(bytes(31)), 7, None, text_of(bytes(32))[:-1]])
def test_what_is_no_key_is_refused_without_showing_it(text: Any) -> None:
    with pytest.raises(NetConfError, match="Backend.PSK"):
        read_key(text, "Backend.PSK")


@pytest.mark.parametrize(
    "data",
    [None, {}, {"PublicKey": "x"}, {"PublicKey": text_of(bytes(32))}, {"PublicKey": text_of(key_of(2)), "Port": 70000}],
)
def test_a_peer_without_a_usable_key_is_ignored(data: Any) -> None:
    with pytest.raises(Ignored):
        read_peer_data(data, 51820)


def test_a_peer_without_a_port_has_ours() -> None:
    assert read_peer_data({"PublicKey": text_of(key_of(2))}, 4711) == (key_of(2), 4711)


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        ({"Mode": "both"}, "Backend.Mode"),
        ({"PSK": "secret"}, "Backend.PSK"),
        ({"ListenPort": 0}, "Backend.ListenPort"),
        ({"PersistentKeepaliveInterval": "x"}, "PersistentKeepaliveInterval"),
    ],
)
def test_bad_keys_are_named(backend: dict[str, Any], said: str) -> None:
    with pytest.raises(NetConfError, match=said) as refused:
        WireguardBackend(conf(**WIREGUARD, **backend), EXTERNAL)
    assert "secret" not in str(refused.value)


# -- desired state -----------------------------------------------------------------------------------------------------


def test_the_whole_network_goes_by_the_device() -> None:
    backend = WireguardBackend(conf(**WIREGUARD), EXTERNAL)
    assert backend.mtu == 1420
    assert backend.devices == ("flannel-wg",)
    (route,) = backend.own(facts("flannel-wg"))
    assert route == Route(int(IPv4Address("10.244.0.0")), 16, 0, 7, scope=SCOPE_LINK)
    both = WireguardBackend(dual_conf(), DUAL)
    assert both.devices == ("flannel-wg", "flannel-wg-v6")
    wide = facts("flannel-wg")
    routes = both.own(wide._replace(tunnel6=wide.tunnel))
    assert [(one.version, one.metric, one.scope) for one in routes] == [(4, 0, SCOPE_LINK), (6, METRIC6, 0)]


def peers_of(backend: WireguardBackend, *leases: Lease) -> dict[str, list[Peer]]:
    wanted = backend._wanted_peers({lease.subnet: lease for lease in leases})
    return {name: list(peers.values()) for name, peers in wanted.items()}


def test_a_peer_has_exactly_its_own_subnet() -> None:
    psk = text_of(key_of(9))
    backend = WireguardBackend(conf(**WIREGUARD, PSK=psk, PersistentKeepaliveInterval=25), EXTERNAL)
    (peer,) = peers_of(backend, lease_of(2, port=4711))["flannel-wg"]
    subnet = frozenset({IPv4Network("10.244.2.0/24")})
    assert peer == Peer(key_of(2), (IPv4Address("192.168.50.2"), 4711), subnet, 25, key_of(9))


@pytest.mark.parametrize(
    ("mode", "ip", "ip6", "endpoint"),
    [
        ("ipv4", "", "2001:db8::2", "192.168.50.2 51820"),
        ("ipv6", "", "2001:db8::2", "2001:db8::2 51820"),
        ("auto", "", "2001:db8::2", "2001:db8::2 51820"),  # a private IPv4 address, a public IPv6 one
        ("auto", "203.0.113.2", "2001:db8::2", "203.0.113.2 51820"),
        ("auto", "", "fd50::2", "192.168.50.2 51820"),
        ("auto", "", "", "192.168.50.2 51820"),
    ],
)
def test_one_device_for_both_speaks_to_the_better_address(mode: str, ip: str, ip6: str, endpoint: str) -> None:
    backend = WireguardBackend(dual_conf(Mode=mode), DUAL)
    lease = lease_of(2, ip=ip, ip6=ip6, port6=51820)
    found = peers_of(backend, lease)
    assert list(found) == ["flannel-wg"]
    (peer,) = found["flannel-wg"]
    assert peer.endpoint is not None
    assert f"{peer.endpoint[0]} {peer.endpoint[1]}" == endpoint
    assert len(peer.allowed) == (2 if ip6 else 1)
    data6 = backend.attrs().backend_data6
    assert data6["Port"] == backend.attrs().backend_data["Port"] == 51820


def test_separate_devices_each_have_their_family() -> None:
    found = peers_of(WireguardBackend(dual_conf(), DUAL), lease_of(2, ip6="fd50::2"), lease_of(3))
    (first, second), (six,) = found["flannel-wg"], found["flannel-wg-v6"]
    assert [str(next(iter(one.allowed))) for one in (first, second, six)] == [
        "10.244.2.0/24", "10.244.3.0/24", "fd00:10:244:2::/64",
    ]  # fmt: skip
    assert six.endpoint == (IPv6Address("fd50::2"), 51821)


def test_a_stolen_key_is_the_first_one_s() -> None:
    backend = WireguardBackend(conf(**WIREGUARD), EXTERNAL)
    thief = Lease(IPv4Network("10.244.7.0/24"), lease_of(2).attrs)
    (peer,) = peers_of(backend, lease_of(2), thief)["flannel-wg"]
    assert peer.allowed == {IPv4Network("10.244.2.0/24")}


def test_a_peer_that_roams_is_left_alone_until_its_lease_changes() -> None:
    home, away = (IPv4Address("192.168.50.2"), 51820), (IPv4Address("203.0.113.2"), 4711)
    wanted = Peer(key_of(2), home, frozenset({IPv4Network("10.244.2.0/24")}))
    roamed = wanted._replace(endpoint=away)
    assert _is_as_wanted(roamed, wanted, wanted)
    assert not _is_as_wanted(roamed, None, wanted)  # at start nobody knows why it is elsewhere
    assert not _is_as_wanted(wanted, wanted, roamed)
    assert not _is_as_wanted(wanted._replace(keepalive=5), wanted, wanted)
    assert not _is_as_wanted(None, wanted, wanted)


class Recording:
    """A kernel's wireguard that keeps what it is told."""

    def __init__(self, *there: Peer) -> None:
        self.peers = {peer.key: peer for peer in there}
        self.writes = 0

    def get(self, name: str) -> wireguard.Device:
        return wireguard.Device(key_of(1), key_of(99), 51820, dict(self.peers))

    def change_peers(self, name: str, wanted: list[Peer], gone: list[bytes]) -> None:
        self.writes += 1
        self.peers |= {peer.key: peer for peer in wanted}
        for key in gone:
            del self.peers[key]


def test_peers_go_with_their_lease_and_leftovers_with_evidence() -> None:
    left = Peer(key_of(8), (IPv4Address("192.168.50.8"), 51820), frozenset({IPv4Network("10.244.8.0/24")}))
    kernel = Recording(left)
    backend = WireguardBackend(conf(**WIREGUARD), EXTERNAL)
    backend._wireguard = kernel  # type: ignore[assignment]
    backend._unsure = {"flannel-wg"}

    def update(*numbers: int, may_remove: bool, unsure: bool = True) -> set[int]:
        backend._unsure = {"flannel-wg"} if unsure else set()
        backend.update({lease_of(n).subnet: lease_of(n) for n in numbers}, may_remove)
        return {key[0] for key in kernel.peers}

    assert update(may_remove=False) == {8}
    assert update(2, 3, may_remove=False) == {2, 3, 8}
    assert update(3, may_remove=False, unsure=False) == {3, 8}
    assert update(3, may_remove=True) == {3}
    writes = kernel.writes
    assert update(3, may_remove=True) == {3}
    assert kernel.writes == writes
    assert Own("flannel-wg", (4,), 51820) == backend._own_devices[0]


def test_a_lease_that_cannot_be_used_is_told_once_and_again_when_it_is_back(capfd: pytest.CaptureFixture[str]) -> None:
    backend = WireguardBackend(dual_conf(), DUAL)
    backend._wireguard = Recording()  # type: ignore[assignment]
    backend._public = key_of(99)
    half = lease_of(3, ip6="fd50::3")
    half = half._replace(attrs=half.attrs._replace(backend_data6={"PublicKey": "nothing"}))
    with pytest.raises(Ignored, match="its data holds no usable PublicKey"):  # which the reconciler tells
        backend.wants(half, facts())
    thief = Lease(IPv4Network("10.244.7.0/24"), lease_of(2).attrs)

    def told_of(*leases: Lease) -> int:
        backend.update({lease.subnet: lease for lease in leases}, True)
        return capfd.readouterr().err.count("ignoring the lease of 10.244.7.0/24")

    assert [told_of(lease_of(2), thief), told_of(lease_of(2), thief)] == [1, 0]
    assert [told_of(lease_of(2)), told_of(lease_of(2), thief)] == [0, 1]


@pytest.mark.parametrize("code", [errno.ENODEV, errno.EOPNOTSUPP, errno.EPERM, errno.ENOMEM])
def test_a_device_that_cannot_be_read_is_not_taken_for_none(code: int) -> None:
    class Refusing:
        def dump(self, kind: int, body: bytes) -> list[bytes]:
            raise NetlinkError(code, os.strerror(code))

    asked = object.__new__(wireguard.Wireguard)
    asked._netlink, asked._family = Refusing(), 1  # type: ignore[assignment]
    if code in (errno.ENODEV, errno.EOPNOTSUPP):  # nothing of that name, or something else
        assert asked.get("flannel-wg") is None
    else:
        with pytest.raises(NetlinkError):
            asked.get("flannel-wg")


def test_a_key_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(before: str, after: str) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(BackendError, match="cannot write the private key .*: no space"):
        load_private_key(str(tmp_path / "key"))
    assert list(tmp_path.iterdir()) == []
