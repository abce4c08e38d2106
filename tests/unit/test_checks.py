"""The catalogue, the rows that functions check, and the paths of a lab."""

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
from click.testing import CliRunner

from testbed import checks
from testbed.collecting import IPV6_NEEDED
from testbed.commands.checks import checks as command
from testbed.data import folder
from testbed.errors import LabError
from testbed.flannelspec import BACKENDS
from testbed.report.expected import load_expected
from testbed.topology import load_topology

INDEX = "{schema: 1, needs: {moon: needs the moon}, groups: [A]}"
ROW = "- {id: A-01, group: A, claim: c, backends: [vxlan], paths: [ctl], source: s, mutation: m, lab: [netns]%s}"


def test_the_catalogue_has_every_row_once() -> None:
    rows = checks.load_catalogue()
    assert len(rows) >= 260
    assert sum(row.smoke for row in rows.values()) >= 83
    assert {row.group for row in rows.values()} == {row.id.rpartition("-")[0] for row in rows.values()}
    assert all(row.claim and row.mutation and row.source and row.backends and row.paths for row in rows.values())


@pytest.mark.parametrize("wrong", [", needs: sun", ", colour: red", "}\n- {id: A-02"])
def test_a_broken_catalogue_is_the_labs_fault(wrong: str, tmp_path: Path) -> None:
    (tmp_path / "index.yaml").write_text(INDEX)
    (tmp_path / "A.yaml").write_text(ROW % ", needs: moon")
    assert checks.load_catalogue(tmp_path)["A-01"].reason == "needs the moon"
    checks.load_catalogue.cache_clear()
    (tmp_path / "A.yaml").write_text(ROW % wrong)
    with pytest.raises(LabError, match="broken"):
        checks.load_catalogue(tmp_path)


def test_every_function_of_the_suites_is_a_row() -> None:
    written = checks.implemented()
    assert set(written) <= set(checks.load_catalogue())
    text = "".join(path.read_text() for path in folder("suites").glob("test_*.py"))
    assert text.count("\n@check(") == text.count("\ndef test_") == len(written)


def test_every_smoke_row_of_a_backend_that_is_there_is_checked_or_says_why_not() -> None:
    here = {name for name, backend in BACKENDS.items() if backend.implemented}
    missing = {
        row.id
        for row in checks.load_catalogue().values()
        if row.smoke and here & set(row.backends) and row.id not in checks.implemented() and not row.reason
    }
    assert not missing


NOBODYS = [
    IPv4Network(text) for text in ("192.0.2.0/24", "169.254.0.0/16", "224.0.0.0/4", "10.224.0.0/16", "192.168.0.0/16")
]
"""For documentation, one link, groups; the one that a row is about for being mistyped; one outside every Network."""


def test_no_check_contains_an_address_or_sleeps_or_starts_a_process() -> None:
    import re

    for path in folder("suites").glob("test_*.py"):
        code = path.read_text()
        addresses = {IPv4Address(found) for found in re.findall(r"\d+\.\d+\.\d+\.\d+", code)}
        strange = [address for address in addresses if not any(address in network for network in NOBODYS)]
        assert not strange, f"{path.name}: {strange}: the lab knows its addresses"
        assert not re.search(r"\bsleep\b|import subprocess|import time", code), path.name


def test_expected_counts_are_about_rows_that_are_checked() -> None:
    rows, written = checks.load_catalogue(), set(checks.implemented())
    for run, backend in BACKENDS.items():
        expected = load_expected(run, "smoke")
        assert (expected is not None) == backend.implemented, run
        if expected is None:
            continue
        assert expected.topology == backend.topology
        ids = {item.partition("[")[0] for item in expected.skipped}
        assert ids <= set(rows)
        about = [rows[row] for row in written if run in rows[row].backends and rows[row].smoke]
        # Other runs can be given IPv6, by --net-conf: then nothing is compared.
        groups = {row.group for row in about if row.needs != IPV6_NEEDED or backend.dual}
        assert set(expected.held) == groups


def test_paths_of_racks() -> None:
    lab = load_topology("racks", "unit")
    paths = checks.paths_of(lab, "vxlan")
    assert {kind: (p.source, p.target) for kind, p in paths.items()} == {
        "SN": ("worker1/client", "worker1/testapp"),
        "SS": ("worker1/client", "worker2/testapp"),
        "XS": ("worker1/client", "worker3/testapp"),
        "PN": ("worker1/client", "worker2"),
        "OUT": ("worker1/client", "outside"),
    }
    assert str(paths["XS"]) == "XS-worker1/client->worker3/testapp"
    assert "host-gw" in checks.paths_of(lab, "host_gw")["XS"].reason


def test_a_lab_without_a_path_says_why() -> None:
    paths = checks.paths_of(load_topology("flat", "unit"), "vxlan")
    assert paths["XS"].reason
    assert not paths["SS"].reason
    assert str(paths["XS"]) == "XS"


@pytest.mark.parametrize(
    ("backend", "encapsulated", "direct"),
    [("vxlan", {"SS", "XS"}, set()), ("vxlan_direct", {"XS"}, {"SS"}), ("host_gw", set(), {"SS", "XS"})],
)
def test_which_paths_are_tunnelled(backend: str, encapsulated: set[str], direct: set[str]) -> None:
    kinds = ("SS", "XS")
    assert {k for k in kinds if checks.applies(k, backend, encapsulated=True, direct=False)} == encapsulated
    assert {k for k in kinds if checks.applies(k, backend, encapsulated=False, direct=True)} == direct
    assert all(checks.applies(k, backend, encapsulated=False, direct=False) for k in kinds)


def test_the_command_tells_what_is_implemented() -> None:
    found = json.loads(CliRunner().invoke(command, ["--json"]).output)
    rows = {row["id"]: row for row in found["checks"]}
    assert found["schema"] == 1
    assert len(rows) == len(checks.load_catalogue())
    assert {row["id"] for row in rows.values() if row["implemented"]} == set(checks.implemented())
    assert not rows["SVC-04"]["implemented"]
    assert "kube-proxy" in rows["SVC-04"]["reason"]
    assert rows["VXE-01"]["reason"] == ""
    text = CliRunner().invoke(command, []).output
    assert "* VXE-01" in text
    assert f"{len(checks.implemented())} of {len(found['checks'])} rows implemented" in text
