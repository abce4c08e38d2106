"""The udp backend: what it does to a packet, and what it leaves in the kernel."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from flannel.backends.udpoffload import NO_OFFLOAD, Burst, take_hop
from flannel.backends.udpproxy import Proxy, Table, checksum, unreachable
from tests.flannel.corelab import HEALS_WITHIN, Node, children, peer, until


def packet(
    destination: str, *, ttl: int = 64, protocol: int = 17, payload: bytes = b"x" * 32, fragment: int = 0
) -> bytes:
    head = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 1, fragment, ttl, protocol, 0,
        IPv4Address("10.244.1.5").packed, IPv4Address(destination).packed,
    )  # fmt: skip
    return head[:10] + checksum(head).to_bytes(2, "big") + head[12:] + payload


def test_the_longest_prefix_wins() -> None:
    wide, narrow = ("192.0.2.1", 8285), ("192.0.2.2", 8285)
    table = Table({IPv4Network("10.244.2.0/24"): wide, IPv4Network("10.244.2.128/25"): narrow})
    assert table.find(IPv4Address("10.244.2.200").packed) == narrow
    assert table.find(IPv4Address("10.244.2.100").packed) == wide
    assert table.find(IPv4Address("10.244.3.1").packed) is None
    assert table.cache == {IPv4Address("10.244.2.200").packed: narrow, IPv4Address("10.244.2.100").packed: wide}


@pytest.mark.parametrize("ttl", [255, 64, 2])
def test_a_hop_is_taken_and_the_checksum_stays_right(ttl: int) -> None:
    for last in range(256):  # every carry of the checksum
        one = bytearray(packet(f"10.244.2.{last}", ttl=ttl))
        assert take_hop(one)
        assert one[8] == ttl - 1
        assert checksum(bytes(one[:20])) == 0


@pytest.mark.parametrize("ttl", [0, 1])
def test_a_packet_without_hops_ends(ttl: int) -> None:
    assert not take_hop(bytearray(packet("10.244.2.2", ttl=ttl)))


def test_who_sends_to_nobody_is_told() -> None:
    original = packet("10.244.9.9")
    answer = unreachable(original, IPv4Address("10.244.1.0").packed)
    assert checksum(answer[:20]) == 0
    assert checksum(answer[20:]) == 0
    assert answer[8:10] == b"\x08\x01"
    assert answer[12:20] == IPv4Address("10.244.1.0").packed + IPv4Address("10.244.1.5").packed
    assert answer[20:22] == b"\x03\x00"
    assert answer[28:] == original[:28]


@pytest.mark.parametrize(
    "original",
    [
        packet("10.244.9.9", protocol=1, payload=b"\x03\0" + b"x" * 30),  # an error is not answered with an error
        packet("10.244.9.9", fragment=100),
        packet("10.244.9.9", payload=b"x"),
        packet("10.244.9.9")[:24],
        b"\x60" + packet("10.244.9.9")[1:],
    ],
)
def test_who_must_not_be_told_is_not(original: bytes) -> None:
    assert unreachable(original, b"\x0a\xf4\x01\0") == b""


def until_closed(way: Callable[[], None]) -> None:
    with contextlib.suppress(OSError):
        way()


@pytest.mark.parametrize("offload", [True, False])
def test_packets_cross_both_ways_and_strange_ones_end(offload: bool) -> None:
    near, tun = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock, other = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
    for each in (sock, other):
        each.bind(("127.0.0.1", 0))
    own = IPv4Network("10.244.1.0/24")
    proxy = Proxy(tun.fileno(), sock, (int(own.network_address), int(own.netmask)), offload=offload)
    proxy.table = Table({IPv4Network("10.244.2.0/24"): other.getsockname()})
    for way in (proxy.send_out, proxy.take_in):
        threading.Thread(target=until_closed, args=(way,), daemon=True).start()
    for each in (near, other):
        each.settimeout(5)
    before = NO_OFFLOAD if offload else b""
    near.send(b"short")
    near.send(before + packet("10.244.2.2", ttl=1))
    near.send(before + packet("10.244.2.2", ttl=9))
    data, sender = other.recvfrom(2000)
    assert sender == sock.getsockname()
    assert data == packet("10.244.2.2", ttl=8)
    near.send(before + packet("10.244.7.7"))
    answer = near.recv(2000)
    assert answer[: len(before)] == before
    assert answer[len(before) :][20:22] == b"\x03\x00"
    strange = (b"", b"short", packet("10.244.1.5", ttl=1), packet("10.244.2.5"), packet("10.244.1.5")[:30])
    for data in (*strange, packet("10.244.1.5", ttl=9)):
        other.sendto(data, sock.getsockname())
    assert near.recv(2000) == before + packet("10.244.1.5", ttl=8)


def test_an_error_that_cannot_be_sent_costs_no_packet(monkeypatch: pytest.MonkeyPatch) -> None:
    coming, sent = [packet("10.244.7.7"), packet("10.244.2.2")], []

    def read(tun: int, buffers: list[bytearray]) -> int:
        if not coming:
            raise OSError(errno.EBADFD, "the device is gone")
        data = coming.pop(0)
        buffers[0][: len(data)] = data
        return len(data)

    def refuse(tun: int, pieces: list[bytes]) -> None:
        raise OSError(errno.ENOBUFS, "no memory")

    class Wire:
        def sendto(self, data: memoryview, peer: object) -> None:
            sent.append(bytes(data))

    monkeypatch.setattr(os, "readv", read)
    monkeypatch.setattr(os, "writev", refuse)
    proxy = Proxy(-1, Wire(), (0, 0), offload=False)  # type: ignore[arg-type]
    proxy.table = Table({IPv4Network("10.244.2.0/24"): ("192.0.2.1", 8285)})
    with pytest.raises(OSError, match="the device is gone"):
        proxy.send_out()
    assert sent == [packet("10.244.2.2", ttl=63)]


def test_a_kernel_that_takes_no_bursts_gets_datagrams_one_by_one() -> None:
    sent = []

    class Refusing:
        def sendmsg(self, pieces: list[bytes], told: list[object], flags: int, peer: object) -> None:
            if told:
                raise OSError(errno.EIO, "no checksum offload")
            sent.append(b"".join(pieces))

        def getsockopt(self, level: int, option: int) -> int:
            return 0

        def setsockopt(self, level: int, option: int, value: int) -> None:
            raise OSError(errno.ENOPROTOOPT, "no such option")

    proxy = Proxy(-1, Refusing(), (0, 0), offload=True)  # type: ignore[arg-type]
    proxy._send_burst(Burst([b"h1", b"one", b"h2", b"two"], 5), ("192.0.2.1", 8285))
    assert sent == [b"h1one", b"h2two"]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.close()


@pytest.mark.skipif(not os.access("/dev/net/tun", os.R_OK | os.W_OK), reason="no /dev/net/tun")
def test_the_kernel_holds_what_upstream_leaves_and_damage_heals(node: Node) -> None:
    daemon = node.start(backend={"Type": "udp", "Port": 8282})
    assert daemon.published() == {"ip": "192.168.50.1", "type": "", "data": None}
    shown = until(lambda: node.ip("-d addr show flannel0", check=False), "the device")
    assert re.search(r"<POINTOPOINT,MULTICAST,NOARP,UP,LOWER_UP> mtu 1472 .* qlen 500", shown)
    assert "tun type tun pi off" in shown
    assert "inet 10.244.1.0/32 scope global flannel0" in shown
    until(lambda: node.routes() == ["10.244.0.0/16 dev flannel0"], "the route")
    sockets = node.run("ss", "-ulpnH", "sport = :8282")
    assert "192.168.50.1:8282" in sockets
    assert '"flanneld"' in sockets
    for damage in (
        "link del flannel0",
        "link set flannel0 down",
        "route del 10.244.0.0/16",
        "link set flannel0 mtu 1400",
    ):
        node.ip(damage)
        until(
            lambda: node.routes() == ["10.244.0.0/16 dev flannel0"] and node.link("flannel0")["mtu"] == 1472,
            f"all back after `ip {damage}`",
            HEALS_WITHIN,
        )
    assert daemon.stop() == 0
    assert not node.link("flannel0")


@pytest.mark.skipif(not os.access("/dev/net/tun", os.R_OK | os.W_OK), reason="no /dev/net/tun")
def test_an_address_of_no_node_is_unreachable_and_a_stopped_daemon_carries_nothing(node: Node) -> None:
    daemon = node.start(backend={"Type": "udp"})
    # The peer is the node's own far end: what is sent to 10.244.2.0/24 comes back to the test as a datagram.
    daemon.list(peer(2, ip="192.168.50.1", kind=""))
    until(lambda: node.routes() == ["10.244.0.0/16 dev flannel0"], "the route")
    ended = node.run("ping", "-c1", "-W2", "10.244.9.9", check=False)
    assert "From 10.244.1.0 icmp_seq=1 Destination Net Unreachable" in ended
    os.kill(daemon.pid(), signal.SIGSTOP)
    ended = node.run("ping", "-c1", "-W1", "10.244.9.9", check=False)
    assert "Unreachable" not in ended
    os.kill(daemon.pid(), signal.SIGCONT)
    ended = node.run("ping", "-c1", "-W2", "10.244.9.9", check=False)
    assert "Unreachable" in ended


#: Print what was sent and received, as (bytes, hash).
SERVER = """
import hashlib, socket
listening = socket.create_server(("10.244.2.0", 5000))
connection, seen, size = listening.accept()[0], hashlib.sha256(), 0
while data := connection.recv(1 << 16):
    seen.update(data); size += len(data)
print(size, seen.hexdigest())
"""
CLIENT = """
import hashlib, random, socket
data = random.Random(1).randbytes(6_000_001)
with socket.create_connection(("10.244.2.0", 5000), 10) as connection:
    connection.sendall(data)
print(len(data), hashlib.sha256(data).hexdigest())
"""


def connect(first: Node, second: Node) -> None:
    """Lay a link between two nodes instead of what they have, each end its eth0."""
    for one in (first, second):
        one.ip("link del eth0")
    outside = ["nsenter", "-t", str(children(first._holder.pid)[0]), "-n"]
    words = f"link add eth0 type veth peer name eth0 netns {children(second._holder.pid)[0]}"
    subprocess.run([*outside, "ip", *words.split()], check=True)
    for number, one in ((1, first), (2, second)):
        one.ip(f"addr add 192.168.50.{number}/24 dev eth0")
        one.ip("link set eth0 up")
        one.ip("route add default via 192.168.50.254")


@pytest.mark.skipif(os.geteuid() != 0, reason="two nodes of different owners cannot be linked")
@pytest.mark.parametrize("offloads", ["on", "off"])
def test_bulk_crosses_two_daemons_whole_and_in_packets_of_the_wire(tmp_path: Path, offloads: str) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    nodes = [Node(tmp_path / name) for name in ("first", "second")]
    first, second = nodes
    try:
        connect(first, second)
        for number, one in ((1, first), (2, second)):
            one.run(
                "ethtool",
                "-K",
                "eth0",
                "tx",
                offloads,
                "tso",
                offloads,
                "gso",
                offloads,
                "tx-udp-segmentation",
                offloads,
            )
            daemon = one.start(backend={"Type": "udp"}, subnet=f"10.244.{number}.0/24")
            daemon.tell(added={"subnet": f"10.244.{3 - number}.0/24", "ip": f"192.168.50.{3 - number}", "type": ""})
        until(lambda: " 0% packet loss" in first.run("ping", "-c1", "-W1", "10.244.2.0", check=False), "an answer")
        seen = tmp_path / "seen"
        filtered = "udp port 8285 and greater 1000"
        second.spawn(
            "tcpdump", "-ni", "eth0", "-Z", "root", "-l", "--immediate-mode", filtered, output=seen,
        )  # fmt: skip
        until(lambda: "listening on" in seen.read_text(), "tcpdump")
        server = second.spawn("/usr/bin/python3", "-IS", "-c", SERVER, output=tmp_path / "received")
        until(lambda: "10.244.2.0:5000" in second.run("ss", "-tlnH"), "the server")
        sent = first.run("/usr/bin/python3", "-IS", "-c", CLIENT)
        server.wait(timeout=30)
        assert (tmp_path / "received").read_text() == sent
        counters = second.run("nstat", "-asz", "TcpInCsumErrors", "UdpInErrors")
        errors = dict(re.findall(r"^(\w+) +(\d+)", counters, re.MULTILINE))
        assert errors == {"UdpInErrors": "0", "TcpInCsumErrors": "0"}
        large = [int(one) for one in re.findall(r"length (\d+)$", until(seen.read_text, "packets"), re.MULTILINE)]
        # By the kernel's offloads many packets pass a virtual link as one; a link without them shows those of the wire.
        assert max(large) > 1472 if offloads == "on" else max(large) == 1472
    finally:
        for one in nodes:
            one.close()
