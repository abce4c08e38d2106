"""ipsec: xfrm's bytes, and what is wanted for a peer."""

from __future__ import annotations

import socket
import struct
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flannel.backends.base import BackendError, Ignored
from flannel.backends.ipsec import IpsecBackend
from flannel.kernel import xfrm
from flannel.kernel.netlink import Message
from flannel.lease import Lease
from flannel.netconf import NetConfError
from tests.flannel.backendlab import EXTERNAL, conf, facts, lease
from tests.flannel.ipseclab import HERE, IPSEC, OWN


def policies(number: int) -> set[xfrm.Policy]:
    subnet, there = IPv4Network(f"10.244.{number}.0/24"), IPv4Address(f"192.168.50.{number}")
    return set(xfrm.policies_of(OWN, HERE, subnet, there))


# -- policies ----------------------------------------------------------------------------------------------------------


def test_a_policy_is_packed_as_the_kernel_reads_it() -> None:
    out = xfrm.Policy(xfrm.OUT, OWN, IPv4Network("10.244.2.0/24"), HERE, IPv4Address("192.168.50.2"))
    message = xfrm.set_policy(out)
    zeros = "00" * 12
    selector = f"0af40200{zeros} 0af40100{zeros} 0000 0000 0000 0000 0200 18 18 00 000000 00000000 00000000"
    assert message.type == 0x19
    assert message.body[:56] == bytes.fromhex(selector)
    assert message.body[56:120] == bytes.fromhex("ff" * 32 + "00" * 32)
    assert message.body[152:168] == bytes.fromhex("00000000 00000000 01 00 00 00 00000000")
    assert message.body[168:] == bytes.fromhex(
        f"4400 0500 c0a83202{zeros} 00000000 32 000000 0200 0000 c0a83201{zeros} 0b000000 01 00 00 00 " + "ff" * 12
    )
    assert xfrm.parse_policy(message.body) == out
    assert xfrm.delete_policy(out) == Message(0x14, 0, bytes.fromhex(selector + "00000000 01 000000"))


def test_a_stranger_s_policy_is_not_ours() -> None:
    body = bytearray(xfrm.set_policy(next(iter(policies(2)))).body)
    assert xfrm.parse_policy(bytes(body)) is not None
    for place in (172 + 20, 172 + 44, 172 + 48):  # protocol, mark, mode
        other = bytearray(body)
        other[place] ^= 1
        assert xfrm.parse_policy(bytes(other)) is None
    assert xfrm.parse_policy(bytes(body[:100])) is None
    assert xfrm.parse_policy(bytes(body[:168])) is None


def test_an_association_is_read_and_removed_by_its_bytes() -> None:
    zeros = bytes(12)
    row = bytes(56) + bytes([192, 168, 50, 2]) + zeros + bytes.fromhex("c7a1b2c3 32 000000")
    row += bytes([192, 168, 50, 1]) + zeros + bytes(64 + 32 + 12 + 4) + struct.pack("=IHBB8x", 11, socket.AF_INET, 1, 0)
    found = xfrm.Association(HERE, IPv4Address("192.168.50.2"), 0xC7A1B2C3)
    assert xfrm.parse_association(row) == found
    assert xfrm.delete_association(found) == Message(
        0x11, 0, bytes([192, 168, 50, 2]) + zeros + bytes.fromhex("c7a1b2c3 0200 32 00")
    )
    for place in (76, 208, 212, 214):  # protocol, mark, family, mode
        other = bytearray(row)
        other[place] ^= 1
        assert xfrm.parse_association(bytes(other)) is None
    assert xfrm.parse_association(row[:72] + bytes(4) + row[76:]) is None  # it is only being asked for
    assert xfrm.parse_association(row[:223]) is None


def test_what_the_kernel_tells_of_policies() -> None:
    out = next(iter(xfrm.policies_of(OWN, HERE, IPv4Network("10.244.2.0/24"), IPv4Address("192.168.50.2"))))
    body = xfrm.set_policy(out).body
    for kind in (0x13, 0x19):
        assert xfrm.parse_change(kind, body) == xfrm.Change(out.packets, out)
        assert xfrm.parse_change(kind, body[:168]) == xfrm.Change(out.packets, None)  # a stranger's, without ESP
    removed = xfrm.delete_policy(out).body
    assert xfrm.parse_change(0x14, removed) == xfrm.Change(out.packets, None)
    by_index = bytes(56) + removed[56:] + struct.pack("=HH", 4 + len(body[:168]), 7) + body[:168]
    assert xfrm.parse_change(0x14, by_index) == xfrm.Change(out.packets, None)
    assert xfrm.parse_change(0x1D, b"") == xfrm.Change(None, None)
    six = body[:40] + struct.pack("=H", socket.AF_INET6) + body[42:]
    for kind, data in ((0x13, six), (0x13, body[:100]), (0x14, b""), (0x10, body)):
        assert xfrm.parse_change(kind, data) is None


@given(st.integers(0, 0x40), st.binary(max_size=400))
@settings(max_examples=200)
def test_no_bytes_break_the_readers_of_notifications(kind: int, data: bytes) -> None:
    xfrm.parse_change(kind, data)
    xfrm.parse_association(data)


# -- desired state -----------------------------------------------------------------------------------------------------


class Kernel:
    """Policies in a dictionary by the packets that they are for, as the kernel has them."""

    def __init__(self) -> None:
        self.there: dict[bytes, Message] = {}

    def batch(self, messages: list[Message]) -> list[Any]:
        for message in messages:
            direction = message.body[160] if message.type == 0x19 else message.body[60]
            key = message.body[:56] + bytes([direction])
            if message.type == 0x19:
                self.there[key] = message
            else:
                del self.there[key]
        return []

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        return [message.body for message in self.there.values()]

    def policies(self) -> set[xfrm.Policy]:
        return {one for message in self.there.values() if (one := xfrm.parse_policy(message.body))}


class Told:
    """A charon that keeps what it is told."""

    def __init__(self) -> None:
        self.connections: dict[str, dict[str, Any]] = {}
        self.looked = 0

    def want(self, connections: dict[str, dict[str, Any]]) -> None:
        self.connections = connections

    def look(self) -> None:
        self.looked += 1


def backend(kernel: Kernel, told: Told, **more: Any) -> IpsecBackend:
    made = IpsecBackend(conf(**IPSEC, **more), EXTERNAL)
    made._netlink, made._charon, made._subnet = kernel, told, OWN  # type: ignore[assignment]
    return made


def test_a_peer_is_three_policies_and_a_connection() -> None:
    kernel, told = Kernel(), Told()
    ipsec = backend(kernel, told, UDPEncap=True)
    ipsec.update({OWN.supernet(): lease(2, "vxlan"), IPv4Network("10.244.2.0/24"): lease(2, "ipsec")}, False)
    assert kernel.policies() == policies(2)
    ((name, connection),) = told.connections.items()
    assert name == "192.168.50.1-10.244.1.0/24-10.244.2.0/24-192.168.50.2"
    assert connection["proposals"] == ["aes256-sha256-modp4096"]
    assert connection["encap"] == "yes"
    ((child, settings),) = connection["children"].items()
    assert child == "10.244.1.0/24-10.244.2.0/24"
    assert (settings["reqid"], settings["policies"], settings["start_action"]) == ("11", "no", "start")
    assert settings["esp_proposals"] == ["aes128gcm16-sha256-prfsha256-ecp256"]


def test_policies_go_with_their_lease_and_leftovers_with_evidence() -> None:
    kernel, told = Kernel(), Told()
    ipsec = backend(kernel, told)
    kernel.batch([xfrm.set_policy(policy) for policy in policies(8)])

    def update(*numbers: int, may_remove: bool = False, look: bool = True) -> set[xfrm.Policy]:
        ipsec._unsure = look
        ipsec.update({(one := lease(n, "ipsec")).subnet: one for n in numbers}, may_remove)
        return kernel.policies()

    assert update() == policies(8)
    assert update(2, 3) == policies(2) | policies(3) | policies(8)
    assert update(3, look=False) == policies(3) | policies(8)
    assert update(3, may_remove=True) == policies(3)
    kernel.there.clear()
    assert update(3) == policies(3)
    # A peer that moved: its policies are replaced, not doubled.
    moved = Lease(IPv4Network("10.244.3.0/24"), lease(9, "ipsec").attrs)
    ipsec.update({moved.subnet: moved}, True)
    assert {policy.far for policy in kernel.policies() if policy.direction == xfrm.OUT} == {IPv4Address("192.168.50.9")}
    assert len(kernel.there) == 3


def test_only_what_spoils_a_policy_of_ours_is_noticed() -> None:
    kernel, told = Kernel(), Told()
    ipsec = backend(kernel, told)
    ipsec.update({(one := lease(2, "ipsec")).subnet: one}, False)
    out, *_ = xfrm.policies_of(OWN, HERE, IPv4Network("10.244.2.0/24"), IPv4Address("192.168.50.2"))
    other = out._replace(far=IPv4Address("192.168.50.9"))
    stranger = out._replace(source=IPv4Network("10.9.0.0/16"))

    class Monitor:
        said: tuple[list[xfrm.Change], bool] = ([], False)

        def read(self) -> tuple[list[xfrm.Change], bool]:
            return self.said

    monitor = Monitor()
    ipsec._monitor = monitor  # type: ignore[assignment]

    def noticed(*changes: xfrm.Change, gone: bool = False) -> bool:
        monitor.said = list(changes), gone
        return ipsec.noticed()

    assert not noticed()
    assert not noticed(xfrm.Change(out.packets, out), xfrm.Change(stranger.packets, None))
    assert noticed(xfrm.Change(stranger.packets, None), xfrm.Change(out.packets, None))
    assert noticed(xfrm.Change(out.packets, other))
    assert noticed(xfrm.Change(None, None))
    assert told.looked == 0
    assert not noticed(gone=True)
    assert told.looked == 1
    assert not backend(Kernel(), told).noticed()


def test_overhead_and_bad_input() -> None:
    assert IpsecBackend(conf(**IPSEC), EXTERNAL).mtu == 1423
    assert IpsecBackend(conf(**IPSEC, UDPEncap=True), EXTERNAL).mtu == 1415
    with pytest.raises(NetConfError, match="password is too short") as refused:
        IpsecBackend(conf(Type="ipsec", PSK="secret" * 15), EXTERNAL)
    assert "secret" not in str(refused.value)
    with pytest.raises(NetConfError, match="ESPProposal"):
        IpsecBackend(conf(**IPSEC, ESPProposal=7), EXTERNAL)
    with pytest.raises(BackendError, match="too few"):
        IpsecBackend(conf(**IPSEC), EXTERNAL._replace(mtu=100))
    with pytest.raises(Ignored, match="vxlan"):
        IpsecBackend(conf(**IPSEC), EXTERNAL).wants(lease(2, "vxlan"), facts())
