"""The proof's own run: what it says of mutations that are noticed, that are not, and that are not undone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.labs.helpers import unique

HANDFUL = "VXD-04,VXE-03,L2-04,NAT-01,MTU-01"
"""One of each sort: on a device, on the wire, an absence, rules, and in flanneld's own code."""

FAULTY = r"""
- id: changes-nothing
  row: VXD-03
  do:
  - ip link set dev {tunnel} mtu {mtu}
  undo:
  - ip link set dev {tunnel} mtu {mtu}
  assertion: nothing
- id: noticed-by-another-assertion
  row: MTU-01
  held: true
  do:
  - ip link set dev {tunnel} mtu 1450
  heals: true
  assertion: "underlay \\d+"
- id: breaks
  row: VXD-04
  do:
  - ip link set dev nosuch mtu 1450
  heals: true
  assertion: has MTU 1450
- id: is-not-undone
  row: POD-09
  do:
  - ip link set dev {bridge} mtu 1300
  undo:
  - ip link set dev {bridge} mtu 1301
  assertion: "1300"
- id: comes-too-late
  row: VXD-04
  do:
  - ip link set dev {tunnel} mtu 1450
  heals: true
  assertion: has MTU 1450
"""

WITH_OTHERS = r"""
- id: more-than-said
  row: L2-02
  on: client_pod
  do:
  - ip route add {local_ip} via {gateway}
  undo:
  - ip route delete {local_ip} via {gateway}
  assertion: there, back
- id: as-said
  row: L2-02
  on: client_pod
  do:
  - ip route add {local_ip} via {gateway}
  undo:
  - ip route delete {local_ip} via {gateway}
  assertion: there, back
  also: [POD-05, L2-04]
"""


def run(folder: Path, *options: str) -> tuple[int, dict[str, dict[str, str]], str]:
    argv = [sys.executable, "-m", "testbed.mutants", "--backend", "vxlan", "--name", unique("mutants")]
    argv += ["--reports", str(folder), "--no-proofs", *options]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=240)
    told = ended.stdout + ended.stderr
    assert (folder / "mutants.json").is_file(), told
    found = {one["mutation"]: one for one in json.loads((folder / "mutants.json").read_text())["mutants"]}
    return ended.returncode, found, told


def test_a_handful_is_noticed_and_leaves_the_lab_whole(tmp_path: Path) -> None:
    code, found, told = run(tmp_path, "--only", HANDFUL)
    assert {one["row"] for one in found.values()} == set(HANDFUL.split(",")), told
    assert {one["outcome"] for one in found.values()} == {"killed"}, told
    assert code == 0, told


def test_what_goes_wrong_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "faulty.yaml").write_text(FAULTY)
    code, found, told = run(tmp_path, "--file", str(tmp_path / "faulty.yaml"))
    assert {name: one["outcome"] for name, one in found.items()} == {
        "changes-nothing": "survived",
        "noticed-by-another-assertion": "other",
        "breaks": "broken",
        "is-not-undone": "not whole",
        "comes-too-late": "not run",
    }, told
    assert "POD-09" in found["is-not-undone"]["said"]
    assert code == 1, told


def test_other_rows_that_fail_are_told_apart_from_those_that_may(tmp_path: Path) -> None:
    (tmp_path / "others.yaml").write_text(WITH_OTHERS)
    code, found, told = run(tmp_path, "--full", "--file", str(tmp_path / "others.yaml"))
    assert {name: one["outcome"] for name, one in found.items()} == {
        "more-than-said": "bystanders",
        "as-said": "killed",
    }
    assert found["more-than-said"]["said"].startswith("POD-05 failed too"), told
    assert code == 1, told
