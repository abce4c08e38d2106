"""IPv6 beside IPv4: what a lab with IPv6 is, and the backends whose run has IPv6 only where it is asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.guest.build import find_built
from testbed.guest.kernels import given
from testbed.ipv6 import with_ipv6
from testbed.labs import netns
from testbed.labs.fabric import missing_paths, wait_converged
from testbed.labs.netns import NetnsLab
from testbed.tools import ToolUnavailable, build_tool
from testbed.topology import load_topology
from tests.labs.helpers import unique

HERE = Path(__file__).parents[2]
SECONDS = 600
WITH_IPV6 = ("--net-conf", "EnableIPv6=true", "--net-conf", "IPv6Network=fd00:10:244::/56")


@pytest.fixture(scope="module")
def lab() -> Iterator[NetnsLab]:
    """A bare lab with both families."""
    lab = netns.bring_up(with_ipv6(load_topology("racks", unique("six"))))
    wait_converged(lab)
    yield lab
    lab.down()


def test_every_node_reaches_every_machine_by_ipv6(lab: NetnsLab) -> None:
    for node in lab.spec.cluster_nodes:
        for machine in lab.spec.nodes:
            argv = ["ping", "-n", "-c", "1", "-W", "2", str(machine.ip6)]
            assert lab.node(node.name).run(argv, check=False).ok, f"{node.name} does not reach {machine.name}"


def test_no_address_waits_for_a_duplicate(lab: NetnsLab) -> None:
    for node in lab.spec.nodes:
        waiting = lab.node(node.name).run(["ip", "-6", "address", "show", "tentative"]).stdout
        assert not waiting, f"{node.name}: {waiting}"


def test_a_path_of_ipv6_that_is_missing_is_told(lab: NetnsLab) -> None:
    leaf = lab.node("leaf1")
    leaf.run(["sh", "-c", 'kill -s STOP "$(cat /run/zebra.pid)"'])  # it would put the route back
    leaf.run(["ip", "-6", "route", "flush", "exact", "fd50:0:0:2::/64"])
    assert missing_paths(lab, leaf.spec) == ["leaf1 has 0 of 2 paths to fd50:0:0:2::/64"]


def held(tmp_path: Path, backend: str, *words: str, only: str = "V6") -> Counter[str]:
    """Run the checks of IPv6, all of which have to hold; returns how many did by row."""
    argv = [sys.executable, "-m", "testbed", "run", backend, *WITH_IPV6, "--reports", str(tmp_path / "report")]
    argv += ["--name", unique("six"), *words, "-k", only]
    done = subprocess.run(argv, cwd=HERE, env=os.environ, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report" / "checks.json").read_text())
    return Counter(one["id"] for one in report["checks"] if one["verdict"] == "held")


#: Rows about every backend, along the paths that nodes of one subnet have.
EVERYWHERE = Counter(
    {"V6-01": 1, "V6-02": 1, "V6-03": 1, "V6-04": 1, "V6-07": 1, "V6-08": 1, "V6-13": 1, "V6-14": 2, "V6-15": 1}
    | {"V6-16": 1}
)


#: Both paths of the first rows and of V6-13: racks have nodes of one subnet and of two.
WIREGUARD_ALONE = EVERYWHERE + Counter({"V6-01": 1, "V6-02": 1, "V6-13": 1, "V6-17": 1})


def test_host_gw_routes_both_families(tmp_path: Path) -> None:
    assert held(tmp_path, "host_gw") == EVERYWHERE + Counter({"V6-09": 1, "V6-12": 1})


def test_direct_routing_in_both_families_with_nftables(tmp_path: Path) -> None:
    rows = held(tmp_path, "vxlan_direct", "--rules", "nftables", only="V6-03 or V6-06 or V6-09 or V6-10 or V6-12")
    assert rows == Counter({"V6-03": 1, "V6-06": 1, "V6-09": 1, "V6-10": 1, "V6-12": 1})


@pytest.mark.parametrize(("backend", "rows"), [("dual_stack", 21), ("host_gw", 13)])
def test_ipv6_alone(tmp_path: Path, backend: str, rows: int) -> None:
    try:
        build_tool("kubernetes")
    except ToolUnavailable as error:
        pytest.skip(str(error))
    found = held(tmp_path, backend, "--store", "kubernetes", "--net-conf", "EnableIPv4=false")
    assert found.total() == rows
    assert {row for row in found if not row.startswith("V6-")} <= {"RES-03"}  # the tunnel of IPv6 deleted


def test_wireguard_carries_ipv6_alone(tmp_path: Path) -> None:
    if given() is None and find_built() is None:
        pytest.skip("no guest kernel is here: `testbed kernel build` makes one")
    try:
        kubernetes = build_tool("kubernetes")
    except ToolUnavailable as error:
        pytest.skip(str(error))
    if os.geteuid() == 0 and not all(folder.stat().st_mode & 0o001 for folder in kubernetes.parents):
        pytest.skip(f"the guest, which is no root of this machine's, does not reach {kubernetes}")
    words = ("--store", "kubernetes", "--net-conf", "EnableIPv4=false", "--net-conf", "Mode=auto")
    assert held(tmp_path, "wireguard", *words) == WIREGUARD_ALONE


@pytest.mark.parametrize("mode", ["separate", "auto", "ipv6"])
def test_wireguard_carries_both_families(tmp_path: Path, mode: str) -> None:
    if given() is None and find_built() is None:
        pytest.skip("no guest kernel is here: `testbed kernel build` makes one")
    rows = held(tmp_path, "wireguard", "--net-conf", f"Mode={mode}", only="V6-01 or V6-17")
    assert rows == Counter({"V6-01": 2, "V6-17": 1})
