"""Which interface and address are chosen: flannel-behaviour.md, section 1.5; what test_core_daemon leaves open."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest

from flannel import interface
from flannel.interface import InterfaceError, Wanted, _ordered, choose
from flannel.kernel.values import Address, Link
from tests.flannel.corelab import Flanneld, Node

PERMANENT, DEPRECATED, TEMPORARY = 0x80, 0x20, 0x01


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.close()


def refused(node: Node, *flags: str, dual: bool = False) -> Flanneld:
    """Start a flanneld that ends with status 1, and return it."""
    daemon = node.start(*flags, ready=False, dual=dual)
    assert daemon.process.wait(timeout=10) == 1, daemon.log
    return daemon


def order(*given: tuple[str, int]) -> list[str]:
    family = IPv6Address if ":" in given[0][0] else IPv4Address
    made = [Address(1, int(family(text)), 24, 0, flags) for text, flags in given]
    return [str(one) for one in _ordered(made, family)]


def test_global_addresses_come_before_link_local_ones() -> None:
    assert order(("169.254.1.1", PERMANENT), ("10.0.0.1", PERMANENT)) == ["10.0.0.1", "169.254.1.1"]
    assert order(("fe80::1", PERMANENT), ("fd00::1", 0)) == ["fd00::1", "fe80::1"]


def test_permanent_ones_before_dynamic_and_temporary_ones_last() -> None:
    assert order(("10.0.0.1", 0), ("10.0.0.2", PERMANENT)) == ["10.0.0.2", "10.0.0.1"]
    assert order(("2001:db8::1", TEMPORARY), ("2001:db8::2", 0)) == ["2001:db8::2", "2001:db8::1"]


def test_the_first_of_equals_wins() -> None:
    assert order(("10.0.0.9", PERMANENT), ("10.0.0.1", PERMANENT)) == ["10.0.0.9", "10.0.0.1"]


def test_deprecated_loopback_and_multicast_ones_are_left_out() -> None:
    assert order(("10.0.0.1", PERMANENT | DEPRECATED), ("127.0.0.1", PERMANENT), ("224.0.0.1", PERMANENT)) == []
    assert order(("::1", PERMANENT), ("::", PERMANENT)) == []


def test_an_expression_looks_at_all_addresses_before_any_name(node: Node) -> None:
    """A name that matches comes after an address that does, whatever the order of the interfaces."""
    for words in ("link add n-10.9 type bridge", "link set n-10.9 up", "addr add 172.20.0.1/24 dev n-10.9"):
        node.ip(words)
    for words in ("link add late type bridge", "link set late up", "addr add 10.9.0.1/24 dev late"):
        node.ip(words)
    assert "Using interface with name late and address 10.9.0.1" in node.start("--iface-regex=10.9").log


def test_an_expression_is_searched_for_anywhere(node: Node) -> None:
    assert "Using interface with name eth0" in node.start("--iface-regex=68.50").log


def test_what_is_missed_lists_what_there_is(node: Node) -> None:
    log = refused(node, "--iface-regex=^nothing$", "--iface=eth9").log
    assert "Could not find valid interface matching --iface=eth9" in log
    assert "Could not find valid interface matching --iface-regex=^nothing$" in log
    assert "eth0 (192.168.50.1)" in log
    assert log.index("--iface=eth9") < log.index("--iface-regex=^nothing$: ")  # names come first


def test_the_route_to_an_address_says_interface_and_address(node: Node) -> None:
    node.ip("addr add 192.168.50.9/24 dev eth0")
    node.ip("route add 203.0.113.0/24 via 192.168.50.254 src 192.168.50.9")
    log = node.start("--iface-can-reach=203.0.113.7").log
    assert "Using interface with name eth0 and address 192.168.50.9" in log


def test_no_way_to_an_address_is_an_error(node: Node) -> None:
    node.ip("route del default")
    assert "no route to 203.0.113.7" in refused(node, "--iface-can-reach=203.0.113.7").log


def test_no_default_route_is_an_error(node: Node) -> None:
    node.ip("route del default")
    assert "there is no default route; give --iface" in refused(node).log


def test_an_interface_without_an_address_is_an_error(node: Node) -> None:
    node.ip("link add bare type bridge")
    assert "interface bare has no usable IPv4 address" in refused(node, "--iface=bare").log


def test_an_interface_without_an_mtu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes the addresses of such an interface away: it is met at the moment of the change only."""
    monkeypatch.setattr(
        interface, "_search", lambda *_: (Link(2, "eth0", 0, b"", 1, "", None), IPv4Address("10.0.0.1"))
    )
    with pytest.raises(InterfaceError, match="interface eth0 has no MTU"):
        choose(None, Wanted())  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["x", "10.0.0", "fd00::1", "10.0.0.1/24"])
def test_a_public_address_that_is_none_is_an_error(node: Node, text: str) -> None:
    assert f"--public-ip is {text!r}" in refused(node, "--iface=eth0", f"--public-ip={text}").log


def test_the_ipv6_address_is_the_same_interfaces(node: Node) -> None:
    for words in ("-6 addr add fd50::1/64 dev eth0 nodad", "link add other type bridge"):
        node.ip(words)
    node.ip("-6 addr add fd51::1/64 dev other nodad")
    daemon = node.start("--public-ipv6=fd99::9", dual=True)
    assert "Using fd50::1 of eth0 for IPv6, and fd99::9 as external address" in daemon.log
    assert daemon.published()["ip6"] == "fd99::9"


def test_an_interface_of_ipv4_alone_cannot_serve_both(node: Node) -> None:
    node.ip("-6 addr flush dev eth0")
    assert "interface eth0 has no usable IPv6 address" in refused(node, dual=True).log
