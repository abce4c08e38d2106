"""The kernel's notifications without the echo of our own writes, and a network that remembers its hash."""

from __future__ import annotations

import json
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from flannel.kernel import nftables
from flannel.lease import Subnet
from flannel.rules.keeper import Keeper
from tests.flannel.corelab import PYTHON, Node

SCRIPT = """
import json, sys
sys.path.insert(0, {lib!r})
from flannel.kernel import rtnl
from flannel.kernel.monitor import Monitor
from flannel.kernel.netlink import Netlink
from flannel.kernel.values import Neigh, Route
ours, other = Netlink(), Netlink()
monitor = Monitor(without_echo_of=ours.port)
index = rtnl.get_link(ours, name="eth0").ifindex
heard = {{}}
for name, netlink in (("ours", ours), ("other", other)):
    route = Route(0x0AF40900, 24, 0xC0A832FD, index)
    neighbour = Neigh(index, 0xC0A832FD, bytes([2, 0, 0, 0, 0, len(name)]))
    for what, message in (
        ("route", rtnl.set_route(route)), ("neighbour", rtnl.set_entry(neighbour)),
        ("no route", rtnl.delete_route(route)),
    ):
        assert not netlink.batch([message])
        changes, lost = monitor.read()
        heard[f"{{name}} {{what}}"] = [type(change.what).__name__ for change in changes]
print(json.dumps(heard))
"""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.close()


def test_only_the_echo_of_our_own_writes_is_left_out(node: Node) -> None:
    lib = str(Path(__file__).parent.parent.parent)
    heard = json.loads(node.run(PYTHON, "-IS", "-c", SCRIPT.format(lib=lib)))
    assert heard == {
        "ours route": [], "ours neighbour": [], "ours no route": ["SeenRoute"],
        "other route": ["SeenRoute"], "other neighbour": ["SeenEntry"], "other no route": ["SeenRoute"],
    }  # fmt: skip


def test_a_subnet_is_the_network_that_it_is() -> None:
    subnet, network = Subnet((IPv4Address("10.244.1.0"), 24)), IPv4Network("10.244.1.0/24")
    assert subnet == network
    assert hash(subnet) == hash(network)
    by_subnet: dict[IPv4Network, int] = {subnet: 1}
    assert {network: 1}[subnet] == by_subnet[network] == 1
    assert subnet != Subnet((IPv4Address("10.244.2.0"), 24))
    with pytest.raises(ValueError, match="host bits"):
        Subnet((IPv4Address("10.244.1.1"), 24))


class Quiet(Keeper):
    """A keeper of one chain, which the kernel says was touched."""

    def chains(self) -> list[tuple[str, str]]:
        return [("nat", "ours")]

    def repair(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("before", "written", "after", "when_told", "looks"),
    [
        (5, 2, 7, 7, False),  # the two transactions were ours, and nothing came since
        (5, 2, 7, 8, True),  # somebody wrote afterwards
        (5, 2, 8, 8, True),  # somebody wrote in between
        (5, 1, 5, 6, True),  # ours was not seen yet: better look
    ],
)
def test_the_echo_of_our_own_rules_is_no_reason_to_look(
    monkeypatch: pytest.MonkeyPatch, before: int, written: int, after: int, when_told: int, looks: bool
) -> None:
    now = iter((before, after, when_told))
    monkeypatch.setattr(nftables, "generation", lambda netlink: next(now))
    keeper: Any = Quiet(0)
    keeper._netlink = keeper._watch = Mock(touched=lambda chains: True)
    keeper.note_generation()
    keeper.wrote(written)
    assert keeper._may_have_changed(True) is looks


@pytest.mark.parametrize(("resync", "said"), [(5, "looking at them every 5 s"), (0, "not looking at them again")])
def test_want_of_notifications_is_told_with_what_is_done_then(
    resync: int, said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise OSError(1, "not permitted")

    monkeypatch.setattr("flannel.kernel.nftables.RuleWatch", refuse)
    Keeper(resync).subscribe()
    assert said in capfd.readouterr().err
