"""The link that the tunnels go over: down and up again, without a carrier, and with another address."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address

import pytest

from testbed.deadline import Deadline
from tests.heals.heallab import HEALS_WITHIN, HealLab

#: A node that has moved tells the store, and peers follow.
MOVES_WITHIN = 5.0


@pytest.fixture(scope="module", params=["vxlan", "vxlan_direct", "host_gw", "udp", "ipip", "wireguard"])
def lab(request: pytest.FixtureRequest, make_lab: Callable[..., HealLab]) -> HealLab:
    """A cluster of each backend."""
    return make_lab(request.param)


def default_route(lab: HealLab) -> str:
    """What whoever keeps a node's addresses puts back after a flap."""
    return f"ip route replace default via {lab.cluster.lab.node(lab.victim).spec.gateway}"


def test_a_flapped_link_heals(lab: HealLab) -> None:
    before = lab.settled()
    lab.sh("ip link set eth0 down")
    lost = Deadline(HEALS_WITHIN).poll(lambda: lab.state() != before or None)
    assert lost, "a link that is down costs nothing"
    lab.sh(f"ip link set eth0 up; {default_route(lab)}")
    lab.eventually("underlay: link down and up", lambda: lab.state() == before, HEALS_WITHIN)
    lab.eventually("underlay: link down and up, until pods answer", lab.answers, HEALS_WITHIN)


def test_a_link_that_flaps_while_flanneld_is_stopped_heals(lab: HealLab) -> None:
    script = (
        f"ip link set eth0 down; ip link set eth0 up; ip link set eth0 down; ip link set eth0 up; {default_route(lab)}"
    )
    lab.settled()
    if lab.flannel.backend.run in ("host_gw", "vxlan_direct"):
        lab.heals("underlay: link down and up, twice, unseen", lambda: lab.sh(script))
    else:  # a tunnel's routes do not mind
        with lab.stopped():
            lab.sh(script)
    assert Deadline(HEALS_WITHIN).poll(lambda: lab.answers() or None)


def test_a_lost_carrier_heals(lab: HealLab) -> None:
    before = lab.settled()
    link = next(one for one in lab.cluster.lab.spec.links if lab.victim in (one.a.node, one.b.node))
    leaf = link.b if link.a.node == lab.victim else link.a
    for change in ("down", "up"):
        lab.ip(f"link set {leaf.iface} {change}", leaf.node)
    lab.eventually("underlay: carrier lost and back", lambda: lab.state() == before and lab.answers(), HEALS_WITHIN)


def test_a_renumbered_node_moves_without_a_restart(lab: HealLab) -> None:
    """The lease keeps its subnet, says the new address, and every peer sends there."""
    lab.settled()
    node = lab.cluster.lab.node("worker2")
    old = str(node.spec.ip)
    new = str(IPv4Address(int(node.spec.ip) + 100))
    length = node.spec.underlay.address.network.prefixlen if node.spec.underlay.address else 24
    subnet = lab.cluster.leases()["worker2"]["key"]

    def move(gone: str, come: str, what: str) -> None:
        lab.sh(
            f"ip addr del {gone}/{length} dev eth0; ip addr add {come}/{length} dev eth0; "
            f"ip route replace default via {node.spec.gateway}",
            node="worker2",
        )

        def followed() -> bool:
            values = [lease["value"]["PublicIP"] for lease in lab.cluster.leases().values() if lease["key"] == subnet]
            shown = [lab.state(name) for name in lab.names]
            stale = [line for state in shown for line in state if gone in line.replace("/", " ").split()]
            return values == [come] and not stale and lab.answers()

        lab.eventually(f"underlay: {what}", followed, MOVES_WITHIN)

    move(old, new, "a node's address changed")
    assert lab.cluster.flanneld_pid("worker2") is not None
    move(new, old, "a node's address changed back")
    lab.settled()
