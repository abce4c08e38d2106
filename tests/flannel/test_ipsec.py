"""ipsec: VICI's and xfrm's bytes, what is wanted for a peer, and charon with policies in a kernel that has ESP."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import socket
import struct
import subprocess
import threading
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
from tests.flannel.corelab import HEALS_WITHIN, Flanneld, Node, peer, until

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


def packet(kind: int, name: str = "", message: dict[str, Any] | None = None) -> bytes:
    named = bytes([len(name)]) + name.encode() if name else b""
    body = bytes([kind]) + named + (vici.encode(message) if message else b"")
    return len(body).to_bytes(4, "big") + body


@contextlib.contextmanager
def charon(folder: Path, *answers: bytes, stays: bool = False) -> Iterator[tuple[vici.Vici, list[bytes]]]:
    """A conversation with one who answers each packet with the next of these, and then hangs up unless it stays."""
    heard: list[bytes] = []
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "vici"))
        server.listen()

        def serve() -> None:
            peer, _ = server.accept()
            with peer:
                for answer in answers:
                    heard.append(peer.recv(int.from_bytes(peer.recv(4, socket.MSG_WAITALL), "big"), socket.MSG_WAITALL))
                    peer.sendall(answer)
                if stays:
                    peer.recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        talk = vici.Vici(str(folder / "vici"), 5)
        yield talk, heard
        talk.close()
        thread.join()


RESPONSE, UNKNOWN, CONFIRM, EVENT = 1, 2, 5, 7


def test_events_between_answers_are_kept_and_a_stream_is_its_own(tmp_path: Path) -> None:
    up = packet(EVENT, "child-updown", {"up": "yes"})
    answers = (
        packet(CONFIRM) + up,
        up + packet(RESPONSE, message={"success": "yes"}),
        packet(CONFIRM),
        packet(EVENT, "list-sa", {"a": {"k": "1"}}) + packet(EVENT, "list-sa", {"b": {}}) + packet(RESPONSE),
        packet(CONFIRM),
    )
    with charon(tmp_path, *answers, stays=True) as (talk, heard):
        talk.listen("child-updown")
        assert talk.ask("load-conn", {"x": "y"}) == {"success": "yes"}
        assert talk.stream("list-sas", "list-sa", {}) == [{"a": {"k": "1"}}, {"b": {}}]
        assert talk.events() == [{"up": "yes"}, {"up": "yes"}]
    assert heard == [
        b"\x03\x0cchild-updown",
        b"\x00\x09load-conn\x03\x01x\x00\x01y",
        b"\x03\x07list-sa",
        b"\x00\x08list-sas",
        b"\x04\x07list-sa",
    ]


@pytest.mark.parametrize(
    "answer",
    [
        packet(UNKNOWN),
        packet(CONFIRM),
        packet(RESPONSE, message={"success": "no", "errmsg": "why"}),
        (0).to_bytes(4, "big"),
        (1 << 30).to_bytes(4, "big"),
        packet(RESPONSE)[:3],
        packet(EVENT, "e", {"a": "b"})[:-2],
        b"",
    ],
)
def test_an_answer_that_is_none_is_an_error(tmp_path: Path, answer: bytes) -> None:
    with charon(tmp_path, answer) as (talk, _), pytest.raises(vici.ViciError):
        talk.ask("stats", {})


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


# -- the kernel and charon ---------------------------------------------------------------------------------------------


def need_esp(made: Node) -> None:
    """Skip where there is no charon, or no ESP."""
    if not any(shutil.which(path) for path in ("charon-systemd", "/usr/lib/ipsec/charon")):
        pytest.skip("charon is not installed (Debian: charon-systemd)")
    probe = "xfrm state add src 192.0.2.1 dst 192.0.2.2 proto esp spi 1 aead rfc4106(gcm(aes)) 0x" + "00" * 20 + " 128"
    made.ip(probe, check=False)
    if "esp" not in made.ip("xfrm state", check=False):
        pytest.skip("this kernel has no ESP; the guest kernel has")
    made.ip("xfrm state flush")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    try:
        need_esp(made)
        yield made
    finally:
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


@pytest.mark.parametrize(
    "damage",
    [
        "xfrm policy flush",
        "xfrm policy delete src 10.244.1.0/24 dst 10.244.2.0/24 dir out",
        "xfrm policy delete src 10.244.3.0/24 dst 10.244.1.0/24 dir fwd",
        "xfrm policy update src 10.244.2.0/24 dst 10.244.1.0/24 dir in",
    ],
)
def test_damaged_policies_heal(node: Node, damage: str) -> None:
    daemon = node.start(backend=IPSEC)
    daemon.list(peer(2, kind="ipsec"), peer(3, kind="ipsec"))

    def whole() -> bool:
        return shown(node) == pairs(2, 3) and node.ip("xfrm policy list").count("reqid 11 mode tunnel") == 6

    until(whole, f"policies {shown(node)}\n{daemon.log}", HEALS_WITHIN)
    node.ip(damage)
    until(whole, f"policies after `ip {damage}`\n{daemon.log}", HEALS_WITHIN)


class Pair:
    """Two nodes on one cable, with flanneld on both."""

    def __init__(self, folder: Path) -> None:
        self.nodes: list[Node] = []
        for name in ("first", "second"):
            (folder / name).mkdir()
            self.nodes.append(Node(folder / name))
        first, second = self.nodes
        need_esp(first)
        second.ip("link del eth0")
        inside = second._enter[second._enter.index("-t") + 1]
        subprocess.run(
            [*first._enter[:3], "-n", "ip", "link", "set", "far", "netns", inside, "name", "eth0"], check=True
        )  # fmt: skip
        second.ip("link set eth0 up")
        second.ip("addr add 192.168.50.2/24 dev eth0")
        second.ip("route add default via 192.168.50.254")
        for number, made in enumerate(self.nodes, 1):
            made.ip(f"addr add 10.244.{number}.1/32 dev lo")
        self.daemons = [self.start(0), self.start(1)]

    def start(self, index: int) -> Flanneld:
        daemon = self.nodes[index].start(backend=IPSEC, subnet=f"10.244.{index + 1}.0/24")
        leases = [peer(number, kind="ipsec") for number in (1, 2)]
        daemon.list(*leases, own=False)
        return daemon

    def reaches(self) -> bool:
        return "1 received" in self.nodes[0].run(*PING, "-c", "1", "10.244.2.1", check=False)

    def associations(self, index: int) -> list[str]:
        return re.findall(r"spi (0x\S+)", self.nodes[index].ip("xfrm state"))

    def close(self) -> None:
        for made in self.nodes:
            made.close()


PING = ["ping", "-n", "-W", "1", "-I", "10.244.1.1"]
#: How long keys may take on a slow machine: a guest's one processor is shared.
AGREED_WITHIN = 4 * HEALS_WITHIN


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path)
    try:
        until(made.reaches, f"packets\n{made.daemons[0].log}", AGREED_WITHIN + 10)
        yield made
    finally:
        made.close()


def test_associations_that_are_gone_are_agreed_on_again(pair: Pair) -> None:
    for _ in range(2):
        before = set(pair.associations(0))
        pair.nodes[0].ip("xfrm state flush")
        until(pair.reaches, f"packets\n{pair.daemons[0].log}", AGREED_WITHIN)
        assert not before & set(pair.associations(0))
    pair.daemons[0].said("has gone from the kernel")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_restart_costs_no_association(pair: Pair, number: signal.Signals) -> None:
    first = pair.nodes[0]
    before = pair.associations(0)
    ping = subprocess.Popen(
        [*first._enter, *PING, "-i", "0.02", "-c", "400", "-q", "10.244.2.1"], stdout=subprocess.PIPE, text=True
    )
    pair.daemons[0].stop(number)
    assert pair.associations(0) == before
    until(lambda: not first.run("pgrep", "-r", "D,R,S", "charon", check=False), "the end of charon", HEALS_WITHIN)
    again = pair.start(0)
    until(lambda: len(set(pair.associations(0)) - set(before)) == 2, f"new ones\n{again.log}", AGREED_WITHIN)
    until(lambda: not set(before) & set(pair.associations(0)), f"the old ones are gone\n{again.log}", AGREED_WITHIN)
    said, _ = ping.communicate(timeout=60)
    received = re.search(r"(\d+) received", said)
    # The peer lets go of the old keys a moment before this node has the new ones.
    assert received, said
    assert int(received[1]) >= 398, f"{said}\n{again.log}"
    assert pair.reaches()
