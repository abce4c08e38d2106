"""Bringing up a cluster on a bad day: one clear error, the right exit code, nothing left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.errors import CommandError, Exit, LabError, ProductError
from testbed.labs import netns, state
from testbed.nodes import deploy, etcd, nodefiles, store
from testbed.nodes.cni import CniError
from testbed.nodes.deploy import Cluster
from testbed.options import RunOptions
from tests.labs.helpers import processes_of, unique


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunOptions]:
    """A run on the smallest lab; afterwards nothing of it may be there."""
    monkeypatch.setenv("TESTBED_TIME_SCALE", "0.5")
    made = RunOptions(backend="host_gw", name=unique("bad"))
    yield made
    assert processes_of(made.name) == []
    assert state.read_record(made.name) is None


def program(folder: Path, text: str) -> Path:
    """An executable script."""
    path = folder / "program"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def replace(options: RunOptions, **changes: object) -> RunOptions:
    """The same options but for some."""
    from dataclasses import replace as replaced

    return replaced(options, **changes)  # type: ignore[arg-type]


def test_a_flanneld_that_ends_is_the_products_failure(options: RunOptions, tmp_path: Path) -> None:
    wrong = program(tmp_path, "echo no luck today >&2; exit 1")
    with pytest.raises(ProductError, match="flanneld ended instead of getting ready\nno luck today") as caught:
        deploy.bring_up(replace(options, flanneld={"": wrong}))
    assert caught.value.exit_code == Exit.FAILED


def test_a_flanneld_that_is_never_ready_is_the_products_failure(
    options: RunOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deploy, "READY_SECONDS", 8.0)
    wrong = program(tmp_path, "echo thinking; exec sleep 60")
    with pytest.raises(ProductError, match=r"wrote no /run/flannel/subnet.env within 8 s\nthinking") as caught:
        deploy.bring_up(replace(options, flanneld={"worker2": wrong}))
    assert caught.value.where == "worker2"


def test_a_cni_plugin_that_refuses_is_the_products_failure(options: RunOptions, tmp_path: Path) -> None:
    wrong = program(tmp_path, """echo '{"cniVersion": "0.3.1", "code": 999, "msg": "not today"}'; exit 1""")
    with pytest.raises(CniError, match="CNI ADD by flannel failed with code 999: not today") as caught:
        deploy.bring_up(replace(options, cni_plugin={"": wrong}))
    assert caught.value.exit_code == Exit.FAILED


def test_an_etcd_that_does_not_answer_is_the_labs_fault(options: RunOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "ETCD_SECONDS", 1.0)
    monkeypatch.setattr(etcd.Etcd, "start", lambda self: None)
    with pytest.raises(LabError, match="master1: etcd did not answer within 1 s") as caught:
        deploy.bring_up(options)
    assert caught.value.exit_code == Exit.LAB


def test_an_etcd_that_went_away_is_the_labs_fault(options: RunOptions) -> None:
    lab = netns.bring_up(deploy.describe_lab(options)[0])
    try:
        cluster = Cluster(lab, deploy.describe_lab(options)[1], options)
        with pytest.raises(CommandError, match="Connection refused"):
            cluster.leases()
    finally:
        lab.down()


def test_routing_that_does_not_converge_is_the_labs_fault(options: RunOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    from testbed.labs import fabric

    monkeypatch.setattr(fabric, "CONVERGE_SECONDS", 1.0)
    monkeypatch.setattr(netns, "frr_folder", lambda: "/nowhere")
    with pytest.raises(LabError, match=r"BGP did not converge within 1 s:\n  leaf1 has 0 of 1 paths to 203.0.113.8/32"):
        deploy.bring_up(options)


@pytest.mark.parametrize(
    ("what", "message"),
    [("frr_folder", "FRR's zebra and bgpd are not installed"), ("cni_folder", "the CNI plugins bridge and host-local")],
)
def test_missing_tools_are_the_labs_fault_before_anything_is_made(
    what: str, message: str, options: RunOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(netns, "FRR_FOLDERS", () if what == "frr_folder" else netns.FRR_FOLDERS)
    monkeypatch.setattr(nodefiles, "CNI_FOLDERS", () if what == "cni_folder" else nodefiles.CNI_FOLDERS)
    with pytest.raises(LabError, match=message):
        deploy.bring_up(options)


def test_a_disk_without_room_for_the_labs_record_is_the_labs_fault(
    options: RunOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(LabError, match="cannot keep track of the lab: No space left on device"):
            netns.bring_up(deploy.describe_lab(options)[0])
