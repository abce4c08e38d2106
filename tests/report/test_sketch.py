"""What the page tells of a lab's MTUs: those of the tunnel that packets go through, each beside what it has to be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from testbed.nodes.deploy import describe_lab
from testbed.options import RunOptions
from testbed.report import sketch
from testbed.report.page.build import mtu_row

ALONE = {"EnableIPv4": "false"}
WITH_IPV6 = ALONE | {"EnableIPv6": "true", "IPv6Network": "fd00:10:244::/56"}


class FakeFacts:
    """Devices of a node by name, with their MTUs."""

    def __init__(self, **mtus: int) -> None:
        self.mtus = mtus

    def node(self, _: str) -> FakeFacts:
        return self

    def link(self, name: str) -> SimpleNamespace | None:
        mtu = self.mtus.get(name.replace("-", "_").replace(".", "_"))
        return SimpleNamespace(mtu=mtu) if mtu else None


def told(backend: str, net_conf: dict[str, str], facts: FakeFacts) -> dict[str, Any]:
    """What the page is told of a lab without pods."""
    options = RunOptions(backend=backend, name="t1", net_conf=net_conf, store="kubernetes")
    spec, flannel = describe_lab(options)
    nodes = tuple(SimpleNamespace(name=node.name, spec=node) for node in spec.cluster_nodes)
    lab = SimpleNamespace(spec=spec)
    cluster = SimpleNamespace(
        lab=lab, flannel=flannel, options=options, pods={}, members=nodes, pod_cidr=str, pod_cidr6=str
    )
    return sketch.of(cluster, facts, {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("backend", "net_conf", "device", "mtu", "wanted"),
    [
        ("vxlan", {}, "flannel.1", 9100, 9100),
        ("dual_stack", {}, "flannel.1", 9100, 9100),
        ("dual_stack", ALONE, "flannel-v6.1", 9080, "9100, tunnel 9080"),
        ("wireguard", WITH_IPV6, "flannel-wg-v6", 9070, 9070),
    ],
    ids=["ipv4", "both", "ipv6 alone", "wireguard with ipv6 alone"],
)
def test_the_tunnel_is_that_of_the_pods_family(
    backend: str, net_conf: dict[str, str], device: str, mtu: int, wanted: object
) -> None:
    found = told(
        backend, net_conf, FakeFacts(eth0=9150, cni0=9100, flannel_1=9100, flannel_v6_1=9080, flannel_wg_v6=9070)
    )
    assert {names["tunnel"] for names in found["devices"].values()} == {device}
    row = mtu_row(found["mtus"][0])
    assert (row["tunnel"], row["wanted"]) == ({"value": mtu, "wrong": False}, wanted)


def test_a_tunnel_that_has_not_what_it_has_to_have_is_marked() -> None:
    for mtu in (9070, 9100):
        row = mtu_row(told("dual_stack", ALONE, FakeFacts(flannel_v6_1=mtu))["mtus"][0])
        assert row["tunnel"] == {"value": mtu, "wrong": True}


def test_a_report_without_what_the_tunnel_has_to_have_is_read() -> None:
    row = mtu_row({"machine": "worker1", "underlay": 9150, "tunnel": 9080, "bridge": 9100, "wanted": 9100})
    assert (row["tunnel"]["wrong"], row["wanted"]) == (True, 9100)
