"""What labs of containers are made of, without an engine."""

from __future__ import annotations

import io
import json
import os
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from testbed.clab import program
from testbed.engine import private
from testbed.errors import LabError
from testbed.images import packages, root
from testbed.images.packages import Package, closure

ROOT = Path(__file__).parents[2]
RUNTIME = ROOT / "testbed/engine/runtime.py"
BOX = ROOT / "testbed/clab/box.py"


def parts(path: Path, tmp_path: Path) -> dict[str, object]:
    """A program's names, without its last line, which runs it."""
    copy = tmp_path / path.name
    text = path.read_text()
    assert text.endswith("\nmain()\n")
    copy.write_text(text.removesuffix("main()\n"))
    return runpy.run_path(str(copy))


def test_the_engine_has_no_door_but_its_socket_and_touches_no_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESTBED_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(private, "lacks_capabilities", lambda: False)
    argv = private._arguments("/usr/sbin/dockerd", Path("/data"), "/group")
    hosts = [word for word in argv if word.startswith(("--host", "-H"))]
    assert hosts == [f"--host=unix://{tmp_path}/state/engine/docker.sock"]
    assert {"--bridge=none", "--iptables=false", "--ip-forward=false", "--cgroup-parent=/group"} <= set(argv)
    assert not [word for word in argv if "runtime" in word]
    assert (tmp_path / "state/engine").stat().st_mode & 0o777 == 0o700


def test_only_an_engine_that_lacks_a_capability_gets_another_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESTBED_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(private, "lacks_capabilities", lambda: True)
    argv = private._arguments("/usr/sbin/dockerd", Path("/data"), "/group")
    path = tmp_path / "state/engine/runtime"
    assert argv[-2:] == [f"--add-runtime=testbed={path}", "--default-runtime=testbed"]
    assert path.read_text().startswith("#!/usr/")
    assert path.stat().st_mode & 0o777 == 0o700


def test_the_runtime_takes_out_what_is_missing_and_nothing_else(tmp_path: Path) -> None:
    runtime = parts(RUNTIME, tmp_path)
    rewrite, value_of = runtime["rewrite"], runtime["value_of"]
    assert callable(rewrite)
    assert callable(value_of)
    sets = {"bounding": ["CAP_SYS_RESOURCE", "CAP_NET_ADMIN"], "ambient": []}
    for name, document in (
        ("bundle", {"process": {"capabilities": sets, "x": 1}, "y": 2}),
        ("exec", {"capabilities": sets}),
    ):
        path = tmp_path / name
        path.write_text(json.dumps(document))
        rewrite(str(path), {"CAP_SYS_RESOURCE"})
        after = json.loads(path.read_text())
        assert after.get("process", after)["capabilities"] == {"bounding": ["CAP_NET_ADMIN"], "ambient": []}
        assert after.get("y") == document.get("y")
    rewrite(str(tmp_path / "nothing"), {"CAP_CHOWN"})
    assert value_of("--bundle", ["create", "--bundle", "/b", "id"]) == "/b"
    assert value_of("--bundle", ["create", "--bundle=/b", "id"]) == "/b"
    assert value_of("--process", ["create"]) is None
    names = runtime["names"]
    assert callable(names)
    assert (names()[0], names()[12], names()[24], len(names())) == ("CHOWN", "NET_ADMIN", "SYS_RESOURCE", 41)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts")
def test_containerlab_sees_a_proc_with_modules_and_files_of_its_own(tmp_path: Path) -> None:
    script = """
import os, subprocess
before = open("/etc/hosts").read()
open("/etc/hosts", "a").write("203.0.113.9 somebody\\n")
print(os.path.exists("/proc/modules"), open("/proc/self/comm").read().strip(), os.path.exists("/proc/sys/kernel"))
print(subprocess.run(["cat", f"/proc/self/comm"], capture_output=True, text=True).stdout.strip())
print(os.path.realpath("/proc/self").endswith(f"/{os.getpid()}"))
"""
    hosts = Path("/etc/hosts").read_text()
    argv = [sys.executable, "-I", "-S", str(BOX), str(tmp_path), sys.executable, "-c", script]
    env = os.environ | {"DOCKER_HOST": "unix:///nowhere"}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("True python")
    assert done.stdout.splitlines()[1:] == ["cat", "True"]
    assert Path("/etc/hosts").read_text() == hosts
    assert "somebody" in (tmp_path / "hosts").read_text()


def test_the_host_root_image_is_almost_empty_and_the_same_each_time() -> None:
    data = root.host_root()
    assert data == root.host_root()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        names = {member.name: member for member in archive.getmembers()}
        init = archive.extractfile("etc/testbed-init")
        assert init
        assert init.read().startswith(b"#!/bin/bash\n")
    assert names["usr"].isdir()
    assert not [name for name in names if name.startswith("usr/")]
    assert names["bin"].linkname == "usr/bin"
    assert names["tmp"].mode == 0o1777
    assert names["etc/testbed-init"].mode == 0o755
    assert {"etc/passwd", "etc/pam.d/frr", "run/frr", "var/lib"} <= set(names)
    assert {(member.mtime, member.uid) for member in names.values()} == {(0, 0)}
    assert len(data) < 4_000_000


def made_up(name: str, *needs: str) -> Package:
    return Package(name, "all", tuple(tuple(need.split("|")) for need in needs))


def test_the_closure_of_packages_has_all_that_is_needed_and_no_more() -> None:
    installed = {
        package.name: package
        for package in (
            made_up("a", "b", "c|d", "not-installed"),
            made_up("b", "a"),
            made_up("d", "e"),
            made_up("e"),
            made_up("unneeded", "a"),
        )
    }
    assert [package.name for package in closure(installed, ["a", "missing"])] == ["a", "b", "d", "e"]


def test_dependency_fields_are_read_as_dpkg_writes_them() -> None:
    text = "libc6 (>= 2.34), python3:any, mawk | awk (= 1), , "
    assert packages._choices(text) == (("libc6",), ("python3",), ("mawk", "awk"))


def test_installed_packages_are_read_and_what_they_provide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    query = tmp_path / "dpkg-query"
    lines = "a\\tamd64\\tinstalled\\t, b (>= 1)\\tvirtual\\nb\\tall\\tinstalled\\t, \\t\\n"
    lines += "gone\\tall\\tconfig-files\\t, \\t\\n"
    query.write_text(f"#!/bin/sh\nprintf '{lines}'\n")
    query.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = packages.installed()
    assert set(found) == {"a", "b", "virtual"}
    assert found["virtual"] is found["a"]
    with pytest.raises(LabError, match=r"not installed here: bash, .*\n.*apt-get install bash"):
        packages.self_contained()


def test_every_program_that_labs_run_is_in_a_package_of_the_image() -> None:
    try:
        found = packages.installed()
    except LabError as error:
        pytest.skip(str(error))
    files = {path for package in closure(found, packages.NEEDED) for path in package.files()}
    for name in ("sh", "ip", "nsenter", "setpriv", "tar", "mkdir", "tcpdump", "ping", "pgrep", "sysctl", "bash", "env"):
        places = {f"{folder}/{name}" for folder in ("/bin", "/sbin", "/usr/bin", "/usr/sbin")}
        assert places & files, f"{name} is in none of the image's packages"


@pytest.mark.parametrize(
    ("said", "version"),
    [("    version: 0.79.0", "0.79.0"), ("x\nversion: v1.2.3-rc1", "1.2.3"), ("version: 0.64.1", "0.64.1")],
)
def test_versions_of_containerlab(tmp_path: Path, said: str, version: str) -> None:
    path = tmp_path / "containerlab"
    path.write_text(f"#!/bin/sh\ncat <<'E'\n{said}\nE\n")
    path.chmod(0o755)
    assert program._checked_version(path) == version
