"""The rtnetlink codec: what is packed is what is read, by the kernel and by ourselves."""

from __future__ import annotations

import struct
import subprocess
import sys
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flannel
from flannel.backends.vxlandevice import random_mac
from flannel.kernel import netlink, rtnl
from flannel.kernel.values import PROTOCOL_BOOT, UNICAST, Fdb, Neigh, Route, SeenEntry, Vxlan
from flannel.state import OffDevice, Recorded

ips = st.integers(1, 0xFFFFFFFF)
versions = st.sampled_from([4, 6])
indexes = st.integers(1, 0x7FFFFFFF)
macs = st.binary(min_size=6, max_size=6)


@given(st.lists(st.tuples(st.integers(1, 0x3FFF), st.binary(max_size=40)), unique_by=lambda pair: pair[0]))
@settings(max_examples=50)
def test_attributes_come_back(pairs: list[tuple[int, bytes]]) -> None:
    assert netlink.attributes(b"".join(netlink.attribute(*pair) for pair in pairs)) == dict(pairs)


@given(st.binary(max_size=200))
@settings(max_examples=100)
def test_no_bytes_break_a_reader(data: bytes) -> None:
    netlink.attributes(data)
    list(netlink.messages(data))


@given(st.builds(Neigh, indexes, ips, macs, version=versions))
@settings(max_examples=30)
def test_a_neighbour_comes_back(entry: Neigh) -> None:
    assert rtnl.parse_entry(rtnl.set_entry(entry).body) == SeenEntry(entry, entry.ifindex, rtnl.PERMANENT)


@given(st.builds(Fdb, indexes, macs, ips, version=versions))
@settings(max_examples=30)
def test_an_fdb_entry_comes_back(entry: Fdb) -> None:
    assert rtnl.parse_entry(rtnl.set_entry(entry).body) == SeenEntry(entry, entry.ifindex, rtnl.PERMANENT)


@given(
    st.builds(
        Route,
        ips,
        st.integers(0, 32),
        ips,
        indexes,
        st.booleans(),
        st.just(UNICAST),
        metric=st.integers(0, 0xFFFFFFFF),
        version=versions,
        scope=st.sampled_from([0, rtnl.SCOPE_LINK]),
    )
)
@settings(max_examples=30)
def test_a_route_comes_back(route: Route) -> None:
    seen = rtnl.parse_route(rtnl.set_route(route).body)
    assert seen.route == route
    assert (seen.protocol, seen.table, seen.multipath) == (PROTOCOL_BOOT, rtnl.MAIN_TABLE, False)


@pytest.mark.parametrize(
    ("kind", "data", "bare"),
    [(7, b"\xc0\xa8\x32\x01", False), (8, netlink.attribute(2, b"\x14\x05\0\0"), False), (11, b"\x07\0\0\0", False),
     (22, b"", False), (12, bytes(32), True), (20, b"\0", True)],
    ids=["source", "metrics", "realm", "encapsulation", "cache info", "preference"],
)  # fmt: skip
def test_a_route_is_bare_without_what_we_never_give_it(kind: int, data: bytes, bare: bool) -> None:
    route = Route(0x0AF40200, 24, 0xC0A83202, 7)
    body = rtnl.set_route(route).body
    assert rtnl.parse_route(body).bare
    assert rtnl.parse_route(body + netlink.attribute(kind, data)).bare == bare


def test_a_vxlan_device_comes_back() -> None:
    wanted = Vxlan(4000, 7, 0xC0A83201, 4789, True, True)
    link = rtnl.parse_link(rtnl.new_vxlan("flannel.4000", wanted, 1400, b"\x02\0\0\0\0\1").body)
    assert (link.name, link.mtu, link.mac, link.kind, link.vxlan) == (
        "flannel.4000", 1400, b"\x02\0\0\0\0\1", "vxlan", wanted,
    )  # fmt: skip


def test_a_message_cut_short_is_left_out() -> None:
    whole = struct.pack("=IHHII", 20, 24, 0, 1, 0) + b"abcd"
    assert list(netlink.messages(whole + whole[:18])) == [(24, 0, 1, b"abcd")]


def test_every_failure_of_a_batch_is_told_with_its_place() -> None:
    # In a namespace of its own: 250 messages, so three sends, of which every seventh is refused.
    script = (
        "from flannel.kernel.netlink import Netlink; from flannel.kernel.rtnl import *; "
        "from flannel.kernel.values import Route\n"
        "n = Netlink(); lo = get_link(n, name='lo').ifindex; n.request(change_link(lo, up=True))\n"
        "good = lambda i: set_route(Route(0x0A000000 + i * 256, 24, 0, lo))\n"
        "bad = lambda i: set_route(Route(0x0A000000 + i * 256, 24, 0x01010101, lo))\n"
        "found = n.batch([bad(i) if i % 7 == 0 else good(i) for i in range(250)])\n"
        "assert [f.position for f in found] == list(range(0, 250, 7)), found\n"
        "assert all(f.errno == 101 for f in found) and 'gateway' in found[0].text, found\n"
        "assert len(dump_routes(n)) == 250 - len(found)\n"
    )
    ended = subprocess.run(
        ["unshare", "-Urn", sys.executable, "-c", script], cwd=Path(flannel.__file__).parent.parent,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "unshare:" in ended.stderr:
        pytest.skip(ended.stderr)
    assert ended.returncode == 0, ended.stderr


def test_a_random_mac_is_local_and_unicast() -> None:
    seen = {random_mac() for _ in range(50)}
    assert len(seen) == 50
    assert all(mac[0] & 3 == 2 for mac in seen)


# -- the journal ---------------------------------------------------------------------------------------------------


def off(number: int) -> OffDevice:
    return OffDevice(IPv4Network(f"10.244.{number}.0/24"), IPv4Address(f"10.0.0.{number}"), "eth0")


def test_the_journal_is_read_back(tmp_path: Path) -> None:
    path = str(tmp_path / "run" / "state")
    journal = Recorded(path)
    journal.open()
    journal.note_device("flannel.1", b"\x02\0\0\0\0\1")
    journal.add({off(2), off(3)})
    journal.remove({off(2)})
    again = Recorded(path)
    assert (again.devices, again.routes) == ({"flannel.1": b"\x02\0\0\0\0\1"}, {off(3)})
    again.open()
    again.note_device("flannel.ipip", b"")
    assert Recorded(path).devices == {"flannel.1": b"\x02\0\0\0\0\1", "flannel.ipip": b""}
    assert again.keep_devices(("flannel.ipip",)) == ["flannel.1"]
    assert Recorded(path).devices == {"flannel.ipip": b""}
    assert Recorded(path).routes == {off(3)}


def test_a_damaged_journal_owns_only_what_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_text("+ 10.244.2.0/24 10.0.0.2 eth0\n+ 10.244.3.0/99 x\n\n?\n+ 10.244.4.0/24 10.0.0\ndevice\n")
    assert Recorded(str(path)).routes == {off(2)}


def test_a_journal_that_cannot_be_written_says_so_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    journal = Recorded(str(tmp_path / "file" / "state"))
    journal.open()
    journal.add({off(2)})
    assert journal.routes == {off(2)}
    assert "state" in journal.problem
