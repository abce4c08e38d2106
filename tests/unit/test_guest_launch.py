"""Where a guest's memory goes, and which kernel a run is on."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from testbed.doctor import Diagnosis, Finding
from testbed.errors import InputError
from testbed.flannelspec import BACKENDS
from testbed.guest import launch, runs
from testbed.guest.build import Kernel
from testbed.guest.features import SYMBOLS
from testbed.options import RULES

NEEDED = 512 << 20


def statvfs(free: int, flags: int = 0) -> SimpleNamespace:
    return SimpleNamespace(f_bavail=free // 4096, f_frsize=4096, f_flag=flags)


@pytest.fixture
def mounts(monkeypatch: pytest.MonkeyPatch) -> dict[str, SimpleNamespace]:
    found: dict[str, SimpleNamespace] = {}

    def look(path: str) -> SimpleNamespace:
        if path not in found:
            raise FileNotFoundError(2, "No such file or directory")
        return found[path]

    monkeypatch.setattr(os, "statvfs", look)
    monkeypatch.setattr(os, "access", lambda *_: True)
    return found


def test_the_first_folder_that_can_hold_it_is_taken(mounts: dict[str, SimpleNamespace]) -> None:
    mounts |= {"/a": statvfs(64 << 20), "/b": statvfs(1 << 30, os.ST_NOEXEC), "/c": statvfs(1 << 30)}
    assert launch.memory_folder(["/none", "/a", "/b", "/c"], NEEDED) == "/c"


def test_no_folder_is_an_error_with_each_reason_and_the_cure(mounts: dict[str, SimpleNamespace]) -> None:
    mounts |= {"/dev/shm": statvfs(64 << 20), "/tmp": statvfs(1 << 30, os.ST_NOEXEC)}
    with pytest.raises(OSError, match="no folder can hold its memory") as raised:
        launch.memory_folder(["/gone", "/dev/shm", "/tmp"], NEEDED)
    text = str(raised.value)
    for said in ("64 MiB free", "noexec", "/gone: No such file", "TMPDIR", "--shm-size=512m"):
        assert said in text


def test_a_door_is_the_first_folder_that_is_closed_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = {"/a": 0o755, "/a/b": 0o700, "/a/b/c": 0o700}
    monkeypatch.setattr(os, "stat", lambda path: SimpleNamespace(st_mode=modes[path]))
    assert launch.closed_door("/a/b/c/d") == "/a/b"
    assert launch.closed_door("/a/b") == ""


@pytest.mark.parametrize(
    ("options", "value", "rest"),
    [
        (["--kernel", "guest", "-k", "x"], "guest", ["-k", "x"]),
        (["--kernel=host", "--kernel", "guest"], "guest", []),
        (["-k", "kernel"], None, ["-k", "kernel"]),
    ],
)
def test_an_option_is_read_and_taken_out(options: list[str], value: str | None, rest: list[str]) -> None:
    assert runs.value_of("--kernel", options) == value
    assert runs.without("--kernel", options) == rest


def test_auto_is_the_guest_only_where_the_host_lacks_something(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(runs.IN_GUEST, raising=False)
    monkeypatch.setattr(runs, "lacking", lambda run, features: ("wireguard",) if run == "wireguard" else ())
    assert runs.choose("vxlan", []) == "host"
    assert runs.choose("wireguard", []) == "guest"
    assert "wireguard" in capsys.readouterr().err
    assert runs.choose("wireguard", ["--kernel", "host"]) == "host"
    assert runs.choose("vxlan", ["--kernel=guest"]) == "guest"
    monkeypatch.setenv(runs.IN_GUEST, "7.2")
    assert runs.choose("wireguard", ["--kernel", "guest"]) == "host", "a guest starts no further one"


def test_a_run_needs_of_a_guest_what_its_backend_and_its_rules_take() -> None:
    assert runs.needs("wireguard", []) == ("wireguard", "iptables_nft")
    assert runs.needs("host_gw", ["--rules", "nftables"]) == ("nftables",)
    for run, backend in BACKENDS.items():
        for rules in RULES:
            found = runs.needs(run, [f"--rules={rules}"])
            assert set(found) <= set(SYMBOLS), "features by which a kernel is judged"
            assert set(backend.kernel_features) < set(found)


def test_a_guest_sees_the_files_that_options_name(tmp_path: Path) -> None:
    path = tmp_path / "flanneld"
    path.touch()
    options = ["--flanneld", f"worker1={path}", f"--manifest={path}", "--manifest", f"{path}.gone"]
    assert runs.named_paths(options) == [path, path]
    assert runs.named_paths(["-k", " or ".join(["VXE-01"] * 50)]) == [], "longer than any name can be"


def test_a_run_in_a_guest_keeps_track_of_its_labs_in_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESTBED_STATE", "/home/somebody/state")
    monkeypatch.delenv("TESTBED_TIME_SCALE", raising=False)
    found = runs.environment(Kernel(Path("/k"), "7.3", "built"))
    assert found["TESTBED_STATE"] == "/run/testbed"
    assert found[runs.IN_GUEST] == "7.3"
    assert "TESTBED_TIME_SCALE" not in found
    slow = Kernel(Path("/k"), "6.1", "qemu")
    assert runs.environment(slow)["TESTBED_TIME_SCALE"] == "10"
    monkeypatch.setenv("TESTBED_TIME_SCALE", "2")
    assert runs.environment(slow)["TESTBED_TIME_SCALE"] == "2", "whoever says so knows better"


def test_an_unknown_kernel_and_a_kept_guest_are_refused() -> None:
    with pytest.raises(InputError, match="hots"):
        runs.choose("vxlan", ["--kernel", "hots"])
    with pytest.raises(InputError) as raised:
        runs.refuse_what_guests_cannot(["--keep"])
    assert "--kernel host" in raised.value.hint


@pytest.mark.parametrize("words", [["--lab", "clab"], ["--lab=clab"]])
def test_containers_in_a_guest_are_refused(words: list[str]) -> None:
    runs.refuse_what_guests_cannot(["--lab", "netns"])
    with pytest.raises(InputError, match="not in a guest") as raised:
        runs.refuse_what_guests_cannot(words)
    assert "--kernel host" in raised.value.hint


def test_the_faults_of_a_topology_s_links_choose_the_guest_where_there_is_no_netem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(runs.IN_GUEST, raising=False)
    findings = tuple(Finding("kernel", name, ok) for name, ok in (("netem", False), ("veth", True)))
    monkeypatch.setattr(runs, "diagnose", lambda: Diagnosis({}, findings))
    path = tmp_path / "lab.yml"
    path.write_text("""\
options: {loss: {type: text, default: 1%}}
mtu: 1500
spines: 0
outside: 203.0.113.8
racks: [{leaf: leaf1, subnet: 10.1.0.0/24, nodes: [master1, worker1]}]
links: {worker1-leaf1: {loss: $loss}}
""")
    assert runs.choose("vxlan", []) == "host"
    assert runs.choose("vxlan", ["--topology", "racks"]) == "host"
    assert runs.choose("vxlan", ["--topology", str(path)]) == "guest"
    assert runs.choose("vxlan", [f"--topology={path}", "--set", "loss=2%"]) == "guest"
    assert runs.choose("vxlan", [f"--topology={path}", "--set", "loss=2"]) == "host", "a faulty file is told by the run"
    assert runs.choose("vxlan", [f"--topology={path}", "--kernel", "host"]) == "host"
