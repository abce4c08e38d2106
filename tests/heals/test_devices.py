"""Tunnel devices that somebody deleted or changed, behind flanneld's back or in the configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.heals.heallab import RESTARTS_WITHIN, HealLab

ALL = {
    "deleted": "ip link del {d}",
    "taken down": "ip link set {d} down",
    "its MTU changed": "ip link set {d} mtu 1300",
    "its address taken off": "ip addr flush dev {d} scope global",
    "a second address of the Network": "ip addr add 10.244.77.1/24 dev {d}",
}
VXLAN = {
    "its MAC changed": "ip link set {d} address 02:00:00:00:00:99",
    "its learning switched on": "ip link set {d} type vxlan id 1 learning",
    "made anew with another port": (
        "mac=$(ip -o link show {d} | sed 's/.*link.ether //;s/ .*//'); ip link del {d}; "
        "ip link add {d} address $mac type vxlan id 1 local {ip} dev eth0 dstport 4790 nolearning; ip link set {d} up"
    ),
    "made anew with another VNI": (
        "ip link del {d}; ip link add {d} type vxlan id 9 local {ip} dev eth0 dstport 8472; ip link set {d} up"
    ),
    "a device of another kind by its name": "ip link del {d}; ip link add {d} type bridge; ip link set {d} up",
}
IPIP = {
    "made anew with another address": (
        "ip link del {d}; ip link add {d} type ipip local 10.0.0.99 dev eth0; ip link set {d} up"
    ),
}
CASES = [
    (run, what)
    for run, cases in (("vxlan", ALL | VXLAN), ("udp", ALL), ("ipip", ALL | IPIP), ("wireguard", ALL))
    for what in cases
]


@pytest.fixture(scope="module")
def labs(make_lab: Callable[..., HealLab]) -> Callable[[str], HealLab]:
    """Return a function that gives the cluster of a run; one is there at a time."""
    there: dict[str, HealLab] = {}

    def lab_of(run: str) -> HealLab:
        if run not in there:
            there[run] = make_lab(run)
        return there[run]

    return lab_of


@pytest.mark.parametrize(("run", "what"), CASES)
def test_a_damaged_device_heals(labs: Callable[[str], HealLab], run: str, what: str) -> None:
    lab = labs(run)
    script = (ALL | VXLAN | IPIP)[what].format(d=lab.device, ip=lab.cluster.lab.node(lab.victim).spec.ip)
    lab.heals(f"device: {what}", lambda: lab.sh(script))
    assert lab.answers()


def info(key: str) -> Callable[[dict[str, Any]], Any]:
    """Return a look at one of a tunnel device's own settings."""
    return lambda link: link["linkinfo"]["info_data"].get(key)


@pytest.mark.parametrize(
    ("keys", "look", "wanted", "usual"),
    [
        ({"MTU": 1400}, lambda link: link["mtu"], 1350, 1450),
        ({"Learning": True}, info("learning"), True, False),
        ({"Port": 4789}, info("port"), 4789, 8472),
        ({"GBP": True}, info("gbp"), True, None),
    ],
)
def test_a_changed_configuration_reaches_the_device_and_is_taken_back(
    labs: Callable[[str], HealLab], keys: dict[str, Any], look: Callable[[dict[str, Any]], Any], wanted: Any, usual: Any
) -> None:
    lab = labs("vxlan")
    (key,) = keys
    before = {name: lab.link(name)["address"] for name in lab.names}
    net_conf = dict(lab.flannel.net_conf)
    backend = dict(net_conf["Backend"])
    for step, conf, expected in (
        ("changed", {**net_conf, "Backend": {**backend, **keys}}, wanted),
        ("taken back", net_conf, usual),
    ):
        lab.configure(conf)
        lab.restart()
        seen = {name: look(lab.link(name)) for name in lab.names}
        assert set(seen.values()) == {expected}, f"{key} {step}: {seen}"
        lab.eventually(f"configuration: {key} {step}, after the restart", lab.answers, RESTARTS_WITHIN)
        lab.settled()
    assert {name: lab.link(name)["address"] for name in lab.names} == before


def test_another_vni_moves_everything_to_another_device(labs: Callable[[str], HealLab]) -> None:
    lab = labs("vxlan")
    net_conf = dict(lab.flannel.net_conf)
    lab.configure({**net_conf, "Backend": {**net_conf["Backend"], "VNI": 7}})
    lab.restart()
    lab.eventually("configuration: VNI changed, after the restart", lab.answers, RESTARTS_WITHIN)
    for name in lab.names:
        assert "flannel.1" not in lab.ip("-br link", name), f"{name} still has the old device"
        assert lab.peers_routes(name)
        assert all("dev flannel.7 " in route for route in lab.peers_routes(name)), lab.peers_routes(name)
    lab.configure(net_conf)
    lab.restart()
    lab.eventually("configuration: VNI taken back, after the restart", lab.answers, RESTARTS_WITHIN)
    lab.settled()
