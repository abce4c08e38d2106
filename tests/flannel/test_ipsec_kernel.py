"""ipsec in a kernel that has ESP, by charon: policies and associations come, heal, and outlive a restart."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flannel.corelab import HEALS_WITHIN, Flanneld, Node, peer, until
from tests.flannel.ipseclab import IPSEC, PSK, pairs, shown


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
