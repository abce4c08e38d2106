"""ADD: what the delegate is handed, what is saved, and what goes wrong."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from flannel.cni import system
from tests.flannel.cnilab import DUAL_ENV, GOLDEN, Runtime


def test_add_hands_over_what_upstream_does(runtime: Runtime) -> None:
    assert runtime.ok("ADD", CNI_ARGS="A=1") == b'{"did": "ADD"}\n'
    call = runtime.calls()[0]
    assert call["stdin"].encode() == GOLDEN
    assert call["env"] == {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": "c1",
        "CNI_NETNS": "/proc/1/ns/net",
        "CNI_IFNAME": "eth0",
        "CNI_PATH": f"/none:{runtime.bin}",
        "CNI_ARGS": "A=1",
    }


def test_add_saves_before_it_hands_over(runtime: Runtime) -> None:
    (runtime.folder / "fail").write_text('{"code": 11, "msg": "no"}')
    assert runtime.fails("ADD") == {"code": 11, "msg": "no"}
    saved = runtime.data / "c1"
    assert saved.read_bytes() == GOLDEN
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600
    assert stat.S_IMODE(runtime.data.stat().st_mode) == 0o700
    assert [path.name for path in runtime.data.iterdir()] == ["c1"]


def test_the_folder_may_be_made_by_another_pods_plugin_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a new node several pods are added at the same time."""
    folder = tmp_path / "cni" / "flannel"

    def mkdir(path: str, mode: int) -> None:
        if Path(path).parent.exists():
            os.mkdir(path)
        os.mkdir(path, mode)

    monkeypatch.setattr(system, "mkdir", mkdir)
    system.makedirs(str(folder), 0o700)
    assert folder.is_dir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "flannel"):
        with pytest.raises(OSError, match="file"):
            system.makedirs(str(path), 0o700)


def test_dual_stack(runtime: Runtime) -> None:
    runtime.subnet_file.write_text(DUAL_ENV)
    runtime.ok("ADD")
    assert runtime.given()["ipam"] == {
        "type": "host-local",
        "ranges": [[{"subnet": "10.244.1.0/24"}], [{"subnet": "fd00:10:244:1::/64"}]],
        "routes": [{"dst": "10.244.0.0/16"}, {"dst": "fd00:10:244::/56"}],
    }
    assert runtime.given()["ipMasq"] is True


def test_what_the_user_says_wins(runtime: Runtime) -> None:
    runtime.make_delegate("macvlan")
    runtime.ok(
        "ADD",
        runtime.conf(
            delegate={"type": "macvlan", "mtu": 900, "ipMasq": True, "cniVersion": "0.1.0"},
            ipam={"type": "x", "dataDir": "/d", "ranges": [1], "routes": [{"dst": "10.0.0.0/8"}]},
            runtimeConfig={"mac": "x"},
            prevResult={},
            dns={},
        ),
    )
    assert runtime.given() == {
        "cniVersion": "0.3.1",
        "name": "cbr0",
        "type": "macvlan",
        "mtu": 900,
        "ipMasq": True,
        "runtimeConfig": {"mac": "x"},
        "ipam": {
            "type": "x",
            "dataDir": "/d",
            "ranges": [[{"subnet": "10.244.1.0/24"}]],
            "routes": [{"dst": "10.0.0.0/8"}, {"dst": "10.244.0.0/16"}],
        },
    }


def test_a_large_configuration_does_not_stick_in_a_pipe(runtime: Runtime) -> None:
    runtime.ok("ADD", runtime.conf(delegate={"x": "y" * 300000}))
    assert len(runtime.given()["x"]) == 300000


@pytest.mark.parametrize(
    ("keys", "fragment"),
    [
        ({"delegate": {"type": 5}}, "'type' of 'delegate'"),
        ({"delegate": {"name": "x"}}, "'name'"),
        ({"delegate": {"ipam": {}}}, "'ipam'"),
        ({"delegate": []}, "'delegate' must be an object"),
        ({"ipam": []}, "'ipam' must be an object"),
        ({"ipam": {"routes": {}}}, "'routes'"),
        ({"delegate": {"type": "nothing"}}, "failed to delegate add"),
        ({"delegate": {"type": "../bin/bridge"}}, "failed to delegate add"),
        ({"subnetFile": ""}, "failed to load flannel 'subnet.env' file"),
        ({"dataDir": "/proc/none"}, "failed to save"),
    ],
)
def test_what_add_cannot_do(runtime: Runtime, keys: dict[str, Any], fragment: str) -> None:
    error = runtime.fails("ADD", runtime.conf(**keys))
    assert error["code"] == 999
    assert fragment in error["msg"]
    assert runtime.calls() == []


def test_add_without_subnet_env(runtime: Runtime) -> None:
    runtime.subnet_file.unlink()
    error = runtime.fails("ADD")
    assert error["code"] == 999
    assert error["cniVersion"] == "0.3.1"
    assert "failed to load flannel 'subnet.env' file" in error["msg"]
    assert "flannel pod" in error["msg"]
    assert not runtime.data.exists()
