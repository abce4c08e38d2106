"""ipsec: VICI's and xfrm's bytes, what is wanted for a peer, and charon with policies in a kernel that has ESP."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flannel import vici
from flannel.backends.base import BackendError, Ignored
from flannel.backends.ipsec import IpsecBackend
from flannel.kernel import xfrm
from flannel.kernel.netlink import Message
from flannel.lease import Lease
from flannel.netconf import NetConfError
from tests.flannel.backendlab import EXTERNAL, conf, facts, lease
from tests.flannel.corelab import HEALS_WITHIN, Node, peer, until

PSK = "a pre-shared key of a test, which is no secret, but has to be long: " * 2
IPSEC = {"Type": "ipsec", "PSK": PSK}
OWN, HERE = IPv4Network("10.244.1.0/24"), IPv4Address("192.168.50.1")


def policies(number: int) -> set[xfrm.Policy]:
    subnet, there = IPv4Network(f"10.244.{number}.0/24"), IPv4Address(f"192.168.50.{number}")
    return set(xfrm.policies_of(OWN, HERE, subnet, there))


# -- VICI --------------------------------------------------------------------------------------------------------------


def test_a_message_is_packed_as_charon_reads_it() -> None:
    assert vici.encode({"a": "x", "l": ["1", "22"], "s": {"k": "v"}}) == bytes.fromhex(
        "03 01 61 0001 78"  # KEY_VALUE a = x
        "04 01 6c 05 0001 31 05 0002 3232 06"  # LIST l = 1, 22
        "01 01 73 03 01 6b 0001 76 02"  # SECTION s { k = v }
    )


def test_a_message_comes_back() -> None:
    message = {"success": "no", "errmsg": "ä", "list": [], "section": {"inner": {"deep": ["x" * 300]}}, "empty": ""}
    assert vici.decode(vici.encode(message)) == message
    assert vici.decode(b"") == {}


@pytest.mark.parametrize(
    "data",
    [
        "02",
        "03",
        "0301",
        "030161",
        "03016100ff78",
        "0101 61",
        "04016c",
        "04016c05",
        "04016c0500013107",
        "09",
        "030161000180",
    ],
)
def test_a_broken_message_is_an_error(data: str) -> None:
    with pytest.raises(vici.ViciError):
        vici.decode(bytes.fromhex(data))


@given(st.binary(max_size=300))
@settings(max_examples=200)
def test_no_bytes_break_the_reader(data: bytes) -> None:
    with contextlib.suppress(vici.ViciError):
        vici.decode(data)


def test_deep_nesting_is_an_error_not_a_crash() -> None:
    with pytest.raises(vici.ViciError, match="deeply"):
        vici.decode(b"\x01\x01a" * 5000)


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

    def want(self, connections: dict[str, dict[str, Any]]) -> None:
        self.connections = connections


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


# -- the kernel and charon ---------------------------------------------------------------------------------------------


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    if not any(shutil.which(path) for path in ("charon-systemd", "/usr/lib/ipsec/charon")):
        pytest.skip("charon is not installed (Debian: strongswan-charon or charon-systemd)")
    probe = "xfrm state add src 192.0.2.1 dst 192.0.2.2 proto esp spi 1 aead rfc4106(gcm(aes)) 0x" + "00" * 20 + " 128"
    made.ip(probe, check=False)
    if "esp" not in made.ip("xfrm state", check=False):
        pytest.skip("this kernel has no ESP; the guest kernel has")
    made.ip("xfrm state flush")
    yield made
    made.close()


def shown(node: Node) -> list[str]:
    lines = node.ip("xfrm policy list", check=False).splitlines()
    heads = [line for line in lines if line.startswith("src ") and "socket" not in line]
    return sorted(line.strip() for line in heads if " 10.244." in f" {line}" or "10.244." in line)


def pairs(*numbers: int) -> list[str]:
    out = [f"src 10.244.1.0/24 dst 10.244.{n}.0/24" for n in numbers]
    return sorted([*out, *[f"src 10.244.{n}.0/24 dst 10.244.1.0/24" for n in numbers] * 2])


def connections(node: Node) -> str:
    return node.run("swanctl", "--list-conns", "--uri", "unix:///run/flannel/charon.vici", check=False)


def test_policies_and_charon_follow_the_leases(node: Node) -> None:
    daemon = node.start(backend=IPSEC)
    assert daemon.published() == {"ip": "192.168.50.1", "type": "ipsec", "data": None}
    daemon.list(peer(2, kind="ipsec"), peer(3, kind="ipsec"))
    until(lambda: shown(node) == pairs(2, 3), f"policies {shown(node)}\n{daemon.log}", HEALS_WITHIN)
    assert "proto esp reqid 11 mode tunnel" in node.ip("xfrm policy list")
    until(lambda: connections(node).count("10.244.1.0/24-10.244.") >= 4, f"connections\n{daemon.log}")
    assert "FLANNEL_MTU=1423" in node.run("cat", "/run/flannel/subnet.env")
    assert PSK not in daemon.log
    daemon.tell(removed=peer(2, kind="ipsec"))
    until(lambda: shown(node) == pairs(3), "one peer's policies", HEALS_WITHIN)
    until(lambda: "10.244.2.0/24" not in connections(node), "one connection")
    # charon that ends comes back with what it was told.
    node.run("pkill", "-x", "charon-systemd", check=False)
    node.run("pkill", "-x", "charon", check=False)
    daemon.said("charon has ended")
    until(lambda: "10.244.3.0/24" in connections(node), f"the connection is back\n{daemon.log}")
    assert daemon.stop() == 0
    assert "Stopped charon daemon" in daemon.log
    assert shown(node) == pairs(3)
    # Another backend: nothing catches its packets.
    node.start(backend={"Type": "host-gw"})
    assert shown(node) == []
