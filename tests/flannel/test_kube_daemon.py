"""What flanneld makes of what a store remembers of its node: an operator's address, the MAC that peers know."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flannel.corelab import OWN, Node

MAC = "02:aa:bb:cc:dd:99"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.close()


def remembered(data: Any, kind: str = "vxlan") -> dict[str, str]:
    lease = {"subnet": OWN, "ip": "192.168.50.1", "type": kind, "data": data}
    return {"REMEMBERED": json.dumps({"lease": lease})}


def test_the_mac_that_was_published_is_taken_again(node: Node) -> None:
    daemon = node.start(environment=remembered({"VNI": 1, "VtepMAC": MAC}))
    assert node.link()["address"] == MAC
    assert daemon.published()["data"] == {"VNI": 1, "VtepMAC": MAC}


@pytest.mark.parametrize(
    ("data", "kind"),
    [({"VtepMAC": "01:00:5e:00:00:01"}, "vxlan"), ("junk", "vxlan"), (None, "vxlan"), ({"VtepMAC": MAC}, "wireguard")],
)
def test_what_is_no_mac_of_ours_is_not(node: Node, data: Any, kind: str) -> None:
    node.start(environment=remembered(data, kind))
    assert node.link()["address"] != MAC
    assert int(node.link()["address"][:2], 16) & 3 == 2


def test_the_operators_address_counts_above_the_flag(node: Node) -> None:
    node.ip("addr add 192.168.50.7/24 dev eth0")
    daemon = node.start("--public-ip=192.168.50.1", environment={"REMEMBERED": '{"public_ip": "192.168.50.7"}'})
    assert daemon.published()["ip"] == "192.168.50.7"


def test_the_operators_ipv6_address_counts_above_the_flag(node: Node) -> None:
    node.ip("addr add fd50::1/64 dev eth0 nodad")
    remembered = {"REMEMBERED": '{"public_ip6": "2001:db8::7"}'}
    daemon = node.start("--public-ipv6=2001:db8::8", environment=remembered, dual=True)
    assert daemon.published()["ip6"] == "2001:db8::7"
