"""Captures with real tcpdumps, in network namespaces that this file makes and throws away."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from testbed.errors import LabError
from testbed.labs.base import Result
from testbed.probes.capture import Captures, Inconclusive, Tap, Target, capture_filter
from testbed.probes.flows import Nonce, ping
from testbed.probes.packets import Tunnel
from testbed.probes.pcap import Packet, PcapReader, to_pcap

A, B = IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2")

WIRING = """
set -e
mount -t tmpfs none /run
ip netns add far
ip link set lo up
ip link add near type veth peer name eth0 netns far
ip link add idle type dummy 2>/dev/null || ip link add idle type bridge
ip link set idle up
ip addr add 192.0.2.1/24 dev near
ip link set near up
ip netns exec far ip addr add 192.0.2.2/24 dev eth0
ip netns exec far ip link set eth0 up
echo ready
exec sleep 1000
"""


class Namespace:
    """A `Place` in a throw-away namespace, in a user namespace of one id as a lab's nodes are."""

    name = "near"

    def __init__(self, pid: int) -> None:
        self.enter = ["nsenter", "-t", str(pid), "-U", "--preserve-credentials", "-m", "-n", "--"]

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        timeout: float = 30.0,
        stdin: str | bytes | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Result:
        done = subprocess.run([*self.enter, *argv], capture_output=True, text=True, check=check, timeout=timeout)
        return Result(self.name, tuple(argv), done.returncode, done.stdout, done.stderr, 0.0)

    def spawn(
        self, argv: Sequence[str], *, pass_fds: Sequence[int] = (), stdin: bool = False
    ) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        return subprocess.Popen([*self.enter, *argv], stdin=pipe, stdout=pipe, stderr=pipe, pass_fds=pass_fds)


@pytest.fixture(scope="module")
def near() -> Iterator[Namespace]:
    argv = ["unshare", "-Urnmp", "--fork", "--kill-child", "sh", "-c", WIRING]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stderr is not None
        if holder.stdout.readline().strip() != "ready":
            pytest.skip(f"no namespaces here: {holder.stderr.read()[-300:]}")
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
        yield Namespace(int(children[0]))
        holder.kill()


@pytest.fixture
def captures(near: Namespace) -> Iterator[Captures]:
    with Captures(Tunnel()) as running:
        running.start([Target("near:near", near, "near"), Target("far:eth0", near, "eth0", "/run/netns/far")])
        yield running


def test_sees_a_ping_by_its_nonce_on_both_ends(near: Namespace, captures: Captures) -> None:
    window, nonce = captures.window(), Nonce.new()
    ping(near, B, nonce=nonce, count=3)
    ping(near, B, nonce=Nonce.new(), count=2)
    for name in ("near:near", "far:eth0"):
        seen = window.packets(name, nonce, at_least=6)
        assert [(p.ip.src, p.icmp.type) for p in seen if p.ip and p.icmp] == [(A, 8), (B, 0)] * 3
        assert all(p.length == 98 for p in seen)


def test_does_not_look_back_before_its_window(near: Namespace, captures: Captures) -> None:
    nonce, control = Nonce.new(), Nonce.new()
    earlier = captures.window()
    ping(near, B, nonce=nonce)
    assert len(earlier.packets("near:near", nonce, at_least=2)) == 2
    window = captures.window()
    ping(near, B, nonce=control)
    window.absent("near:near", nonce, control=control)


def test_absence_without_its_control_is_inconclusive(captures: Captures) -> None:
    with pytest.raises(Inconclusive, match="control"):
        captures.window().absent("near:near", Nonce.new(), control=Nonce.new())


def test_absence_fails_where_the_packet_is_there(near: Namespace, captures: Captures) -> None:
    window, nonce, control = captures.window(), Nonce.new(), Nonce.new()
    ping(near, B, nonce=nonce)
    ping(near, B, nonce=control)
    with pytest.raises(AssertionError, match="must not be there"):
        window.absent("far:eth0", nonce, control=control)


def test_dropped_packets_make_a_window_inconclusive(near: Namespace, captures: Captures) -> None:
    window, nonce = captures.window(), Nonce.new()
    before = captures.drops()
    assert before == {"near:near": 0, "far:eth0": 0}
    ping(near, B, nonce=nonce)
    window.packets("near:near", nonce)
    window.baseline(before)
    window.close()
    window.baseline({"near:near": -1, "far:eth0": 0})
    with pytest.raises(Inconclusive, match="near:near"):
        window.close()
    window.baseline({"near:near": 0, "far:eth0": -1})  # dropped where this window did not look
    window.close()


def test_a_burst_waits_for_a_tcpdump_that_cannot_run(near: Namespace, captures: Captures) -> None:
    window, nonce = captures.window(), Nonce.new()
    before = captures.drops()
    with captures.paused():
        assert ping(near, B, nonce=nonce, count=300, interval=0.002).lost == 0
    window.baseline(before)
    assert len(window.packets("near:near", nonce, at_least=600)) == 600
    window.close()


def test_an_interface_that_is_not_there_is_the_labs_fault(near: Namespace) -> None:
    with Captures(Tunnel()) as running, pytest.raises(LabError, match="No such device"):
        running.start([Target("near:nothing", near, "nothing")])


def test_captures_again_where_an_interface_was_made_anew(near: Namespace) -> None:
    near.run(["ip", "link", "add", "again", "type", "bridge"])
    near.run(["ip", "link", "set", "again", "up"])
    with Captures(Tunnel()) as running:
        running.start([Target("near:again", near, "again")])
        tap = running.taps["near:again"]
        near.run(["ip", "link", "del", "again"])
        window = running.window()
        assert window.packets("near:again", Nonce.new(), seconds=5) == []
        assert tap.ended
        with pytest.raises(LabError):
            running.restart_ended()
        near.run(["ip", "link", "add", "again", "type", "bridge"])
        near.run(["ip", "link", "set", "again", "up"])
        running.restart_ended()
        assert running.taps["near:again"].listening
        near.run(["ip", "link", "del", "again"])
        assert running.window().packets("near:again", Nonce.new(), seconds=5) == []
        running.restart_ended([Target("near:near", near, "near")])
        assert set(running.taps) == {"near:near"}
        assert running.taps["near:near"].listening
        assert running.drops() == {"near:near": 0}


def test_nothing_runs_on_after_stop(near: Namespace) -> None:
    running = Captures(Tunnel())
    running.start([Target("near:near", near, "near")])
    assert near.run(["pgrep", "-xc", "tcpdump"], check=False).stdout.strip() != "0"
    before = len(os.listdir("/proc/self/fd"))
    running.stop()
    assert len(os.listdir("/proc/self/fd")) < before
    assert near.run(["pgrep", "-f", "tcpdump.*-i near$"], check=False).stdout == ""


@pytest.mark.parametrize(
    ("said", "ended"),
    [
        ("tcpdump: listening on eth0, link-type EN10MB (Ethernet), snapshot length 262144 bytes\n", False),
        ("tcpdump: 3 packets captured, 3 packets received by filter, 0 packets dropped by kernel\n", False),
        ("tcpdump: pcap_loop: The interface disappeared\n", True),
        ("0 packets captured\n0 packets received by filter\n0 packets dropped by kernel\n", True),
        ("tcpdump: veth9: No such device exists\n", True),
    ],
)
def test_knows_the_end_of_a_tcpdump_by_its_words(said: str, ended: bool) -> None:
    tap = Tap(Target("n:e", Namespace(1), "e"), PcapReader("n:e"))
    tap.say(said.encode())
    assert tap.ended is ended


def test_the_ring_is_bounded() -> None:
    tap = Tap(Target("n:e", Namespace(1), "e"), PcapReader("n:e"))
    for number in range(100):
        tap.add(Packet(float(number), bytes(100), 100), 1000)
    assert [p.time for p in tap.packets] == [float(n) for n in range(90, 100)]
    assert tap.size == 1000


@pytest.mark.parametrize("tunnel", [Tunnel(), Tunnel("vxlan", 8472), Tunnel("udp", 8285), Tunnel("ipip")])
def test_the_filter_is_one_that_tcpdump_takes(tunnel: Tunnel) -> None:
    done = subprocess.run(["tcpdump", "-d", "-y", "EN10MB", capture_filter(tunnel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def passes(tunnel: Tunnel, frame: bytes, folder: Path) -> bool:
    """Whether the always-on filter keeps a frame, by tcpdump's own word."""
    (folder / "in.pcap").write_bytes(to_pcap([Packet(1.0, frame, len(frame))], 1))
    argv = ["tcpdump", "-n", "-t", "-r", str(folder / "in.pcap"), capture_filter(tunnel)]
    return bool(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("kind", ["vxlan", "udp", "ipip"])
def test_the_filter_leaves_out_bulk_flows_in_a_tunnel_and_nothing_else(kind: str, tmp_path: Path) -> None:
    from scapy.layers.inet import ICMP, IP, TCP, UDP
    from scapy.layers.l2 import Ether
    from scapy.layers.vxlan import VXLAN

    tunnel = Tunnel(kind, 4999)
    outer = Ether() / IP(src="192.0.2.1", dst="192.0.2.2")
    outer = outer if kind == "ipip" else outer / UDP(sport=4999, dport=4999)
    outer = outer / VXLAN(vni=1) / Ether() if kind == "vxlan" else outer
    inner = outer / IP(src="198.51.100.1", dst="198.51.100.2")
    assert not passes(tunnel, bytes(inner / TCP(sport=40000, dport=5201)), tmp_path)
    assert not passes(tunnel, bytes(inner / UDP(sport=5299, dport=40000)), tmp_path)
    assert passes(tunnel, bytes(inner / UDP(sport=40000, dport=7)), tmp_path)
    # A ping whose checksum, where a port would be, reads as a bulk port.
    assert passes(tunnel, bytes(inner / ICMP(chksum=5250) / b"payload"), tmp_path)


def test_reads_a_stream_in_pieces_of_any_size() -> None:
    packets = [Packet(1.5, b"abc", 3), Packet(2.25, b"d" * 70, 1500)]
    stream = to_pcap(packets, 101)
    for size in (1, 7, 24, 1000):
        reader = PcapReader("n:e")
        found = [p for at in range(0, len(stream), size) for p in reader.feed(stream[at : at + size])]
        assert found == packets
        assert reader.link_type == 101


@pytest.mark.parametrize("stream", [b"\0" * 24, to_pcap([], 1) + b"\xff" * 16])
def test_a_broken_stream_is_the_labs_fault(stream: bytes) -> None:
    with pytest.raises(LabError):
        list(PcapReader("n:e").feed(stream))
