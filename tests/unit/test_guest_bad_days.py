"""What stands in the way of a guest kernel: each is told with its cure, on real mounts and with real kills."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.errors import LabError
from testbed.guest import build, kernels
from testbed.guest.source import GuestUnavailable, Source
from testbed.labs import Quiet

HERE = Path(__file__).parents[2]
SOURCE = Source("linux-source-7.2", "7.2.1-1")

namespaces = subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0
needs_namespaces = pytest.mark.skipif(not namespaces, reason="mounts are made in a namespace, which is refused here")


def python(program: str, *mounts: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program below those mounts, `OPTIONS FOLDER` each, in a mount namespace of its own."""
    steps = [f"mount -t tmpfs -o {mount.split()[0]} none {mount.split()[1]}" for mount in mounts]
    script = " && ".join([*steps, 'exec "$@"'])
    argv = ["unshare", "-rm", "sh", "-c", script, "sh", sys.executable, "-c", program]
    env = {**os.environ, "PYTHONPATH": str(HERE)} | environment
    return subprocess.run(argv, env=env, capture_output=True, text=True, check=False, timeout=60)


TELL = """
from testbed.errors import TestbedError
try:
    {0}
except (TestbedError, OSError) as error:
    print(getattr(error, "hint", ""), error)
"""
CACHE = TELL.format("from testbed.guest import build; print('usable', build.cache_folder())")
SPACE = TELL.format("from testbed.guest import build; build.require_space(build.cache_folder()); print('usable')")
MEMORY = TELL.format("from testbed.guest import launch; print('taken', launch.memory_folder({0}, 256 << 20))")


@needs_namespaces
def test_a_cache_that_is_mounted_noexec_is_told(tmp_path: Path) -> None:
    said = python(CACHE, f"noexec {tmp_path}", XDG_CACHE_HOME=str(tmp_path)).stdout
    assert "noexec" in said
    assert "set XDG_CACHE_HOME" in said
    assert python(CACHE, f"size=1m {tmp_path}", XDG_CACHE_HOME=str(tmp_path)).stdout.startswith("usable")


@needs_namespaces
def test_a_disk_that_is_too_small_is_told(tmp_path: Path) -> None:
    said = python(SPACE, f"size=64m {tmp_path}", XDG_CACHE_HOME=str(tmp_path)).stdout
    assert "64 MiB are free" in said
    assert "XDG_CACHE_HOME" in said
    assert python(SPACE, f"size=3g {tmp_path}", XDG_CACHE_HOME=str(tmp_path)).stdout.startswith("usable")


@needs_namespaces
def test_a_folder_that_is_too_full_for_the_guest_s_own_files_is_told(tmp_path: Path) -> None:
    program = TELL.format(
        "from pathlib import Path; from testbed.guest import run; run.run(['true'], kernel=Path('/x'))"
    )
    said = python(program, f"size=8k {tmp_path}", TMPDIR=str(tmp_path))
    assert "no place for the files of a guest: No space left on device" in said.stdout, said.stderr
    assert "set TMPDIR" in said.stdout
    assert "the guest kernel cannot be read" in python(program, f"size=1m {tmp_path}", TMPDIR=str(tmp_path)).stdout


@needs_namespaces
def test_a_guest_s_memory_goes_where_there_is_room_and_programs_may_run(tmp_path: Path) -> None:
    small, closed, right = (tmp_path / name for name in ("small", "noexec", "right"))
    for folder in (small, closed, right):
        folder.mkdir()
    mounts = (f"size=64m {small}", f"noexec {closed}", f"size=512m {right}")
    both = [str(small), str(closed)]
    said = python(MEMORY.format([*both, str(right)]), *mounts).stdout
    assert said == f"taken {right}\n"
    said = python(MEMORY.format(both), *mounts).stdout
    assert "64 MiB free of the 256" in said
    assert f"{closed} is mounted noexec" in said
    assert "Set TMPDIR" in said
    assert "--shm-size=256m" in said


KILLED = """
import os, signal
from testbed.guest import build
def half(scratch, folder, progress):
    place = folder / build.fingerprint((), build.Source("linux-source-7.2", "1"), "gcc")
    (scratch / "linux").write_bytes(b"half a kernel")
    os.kill(os.getpid(), signal.SIGKILL)
build._build_in = half
build.require_compiler = build.require_space = lambda *_: None
build.build()
"""


def test_a_build_that_is_killed_leaves_no_kernel_and_no_lock_and_the_next_one_sweeps_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = {**os.environ, "PYTHONPATH": str(HERE), "XDG_CACHE_HOME": str(tmp_path)}
    killed = subprocess.run([sys.executable, "-c", KILLED], env=env, check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = build.cache_folder()
    assert list(cache.glob(".building-*/linux")), "it was killed half-way"
    assert build.find_built() is None
    made = build.Kernel(cache / "x" / "linux", "7.2", "built")
    monkeypatch.setattr(build, "_build_in", lambda *_: made)
    monkeypatch.setattr(build, "require_compiler", lambda: None)
    monkeypatch.setattr(build, "require_space", lambda _: None)
    assert build.build() == made
    assert not list(cache.glob(".building-*"))


def test_a_kernel_whose_file_was_cut_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "compiler", lambda: "gcc 1")
    cache, settings = (
        build.cache_folder(),
        build.fragment_settings((build.configuration_folder() / "fragment").read_text()),
    )
    place = cache / build.fingerprint(settings, SOURCE, "gcc 1")
    place.mkdir()
    program = place / "linux"
    program.write_bytes(b"a kernel" * 1000)
    facts = {"source": SOURCE.package, "version": SOURCE.version, "compiler": "gcc 1", "built_at": ""}
    digest = hashlib.sha256(program.read_bytes()).hexdigest()
    (place / "build.json").write_text(json.dumps(facts | {"sha256": digest}))
    assert build.cached(cache, settings, "gcc 1") is not None
    with program.open("r+b") as file:
        file.truncate(4000)
    assert build.cached(cache, settings, "gcc 1") is None


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_disk_that_fills_up_in_the_middle_is_told_as_that(tmp_path: Path) -> None:
    words = "as: fatal error: x.s: No space left on device"
    (tmp_path / "Makefile").write_text(f"linux:\n\t@echo '{words}' >&2; false\n")
    with pytest.raises(GuestUnavailable) as raised:
        build.compile_kernel(tmp_path, tmp_path / "log", Quiet())
    assert "the disk is full" in raised.value.what
    assert "XDG_CACHE_HOME" in raised.value.hint


@pytest.mark.parametrize("error", [GuestUnavailable("no compiler", hint="install one"), LabError("gcc crashed")])
def test_whatever_closes_one_way_the_next_is_tried(monkeypatch: pytest.MonkeyPatch, error: LabError) -> None:
    def fail(*_: object) -> build.Kernel:
        raise error

    packaged = build.Kernel(Path("/usr/bin/linux.uml"), "6.1", "packaged")
    monkeypatch.setattr(kernels, "given", lambda: None)
    monkeypatch.setattr(kernels, "find_built", lambda: None)
    monkeypatch.setattr(kernels, "build", fail)
    monkeypatch.setattr(kernels, "obtain_packaged", lambda _: packaged)
    assert kernels.obtain_kernel() == packaged
