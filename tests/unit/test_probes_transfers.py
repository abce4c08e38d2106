"""Large transfers, sized packets and tcpdump's own filters, against the test application in a throw-away namespace."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest

from testbed.labs import interpreter
from testbed.labs.base import Result
from testbed.nodes.pods import server_program
from testbed.probes.flows import ICMP_HEADERS
from testbed.probes.pcap import Packet, to_pcap
from testbed.probes.recipe import selected
from testbed.probes.sized import unanswered
from testbed.probes.transfers import MIB, fetch, post

HERE, HERE6 = IPv4Address("127.0.0.1"), IPv6Address("::1")
NOBODY = IPv4Address("192.0.2.1")


class Namespace:
    """A `Place` in a namespace in which the test application listens."""

    name = "here"

    def __init__(self, pid: int) -> None:
        self.enter = ["nsenter", "-t", str(pid), "-U", "--preserve-credentials", "-n", "--"]

    def run(
        self, argv: Sequence[str], *, check: bool = True, timeout: float = 30.0, stdin: str | bytes | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Result:  # fmt: skip
        given = stdin.encode() if isinstance(stdin, str) else stdin
        done = subprocess.run([*self.enter, *argv], capture_output=True, check=check, timeout=timeout, input=given)
        return Result(self.name, tuple(argv), done.returncode, done.stdout.decode(), done.stderr.decode(), 0.0)

    def spawn(
        self, argv: Sequence[str], *, pass_fds: Sequence[int] = (), stdin: bool = False
    ) -> subprocess.Popen[bytes]:
        raise NotImplementedError


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Namespace]:
    program: Path = tmp_path_factory.mktemp("server") / "podserver.py"
    program.write_bytes(server_program())
    script = 'ip link set lo up; exec "$@"'
    server = [interpreter(), "-I", "-S", str(program), "here", "node", str(HERE)]
    argv = ["unshare", "-Urn", "sh", "-c", script, "sh", *server]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stderr is not None
        if holder.stdout.readline().strip() != "listening":
            pytest.skip(f"no namespaces here: {holder.stderr.read()[-300:]}")
        yield Namespace(holder.pid)
        holder.kill()


@pytest.mark.parametrize("target", [HERE, HERE6], ids=str)
def test_what_is_sent_and_fetched_is_whole(here: Namespace, target: IPv4Address | IPv6Address) -> None:
    for done in (
        post(here, target, 3 * MIB + 7),
        fetch(here, target, 3 * MIB + 7),
        post(here, target, MIB, segment=500),
    ):
        assert (done.error, done.whole) == ("", True), done
        assert done.rate > 0
    assert post(here, target, 3 * MIB + 7).size == 3 * MIB + 7
    assert fetch(here, target, 70_000).size == 70_000


def test_what_breaks_off_says_why(here: Namespace) -> None:
    done = post(here, NOBODY, MIB, wait=1)
    assert not done.whole
    assert "after 0 bytes" in done.error, done


def test_flows_without_an_answer_are_told(here: Namespace) -> None:
    assert unanswered(here, HERE, packet=9000, flows=8) == ()
    assert len(unanswered(here, NOBODY, packet=9000, flows=8, wait=0.05)) == 8
    too_large = 0xFFFF + ICMP_HEADERS
    assert len(unanswered(here, HERE, packet=too_large, flows=2, wait=0.05)) == 2


def test_tcpdump_selects_by_the_bytes_of_the_inner_header(here: Namespace) -> None:
    def packet(time: float, *, inner: str, outer: str = "10.0.0.1") -> Packet:
        inside = bytes.fromhex("45000014000000004001") + bytes(2) + IPv4Address(inner).packed + bytes(4)
        outside = bytes.fromhex("45000028000000004004") + bytes(2) + IPv4Address(outer).packed + bytes(4)
        data = bytes(12) + b"\x08\x00" + outside + inside
        return Packet(time, data, len(data))

    pcap = to_pcap([packet(1.5, inner="10.9.9.9"), packet(2.25, inner="10.8.8.8", outer="10.9.9.9")], 1)
    assert selected(here, pcap, "ip[32:4]=0x0a090909") == [1.5]
    assert selected(here, pcap, "ip[12:4]=0x0a090909") == [2.25]
