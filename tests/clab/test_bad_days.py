"""Labs of containers on a bad day: one clear error, nothing left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.clab import program, remains
from testbed.engine import find, private
from testbed.engine.find import find_engine
from testbed.errors import LabBusyError, LabError
from testbed.images import store
from testbed.labs import kinds, state
from testbed.model import LabSpec
from testbed.render import cluster_name
from testbed.topology import load_topology
from tests.engines import engine_state, using
from tests.labs.helpers import unique


@pytest.fixture
def flat() -> LabSpec:
    return load_topology("flat", unique("bad"))


@pytest.fixture
def own_engine() -> Iterator[Path]:
    """An engine that the test may kill."""
    with engine_state() as folder, using(folder):
        yield folder


def test_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flat: LabSpec) -> None:
    monkeypatch.setenv("TESTBED_STATE", str(tmp_path / "state"))
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    monkeypatch.setattr(find, "DEFAULT_SOCKET", tmp_path / "docker.sock")
    with pytest.raises(LabError, match=r"no Docker engine runs here: there is no .*docker.sock\n.*testbed engine up"):
        kinds.bring_up("clab", flat)
    assert state.read_record(flat.id) is None


def test_an_engine_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESTBED_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
    with pytest.raises(LabError, match=r"no Docker engine answers at tcp://127.0.0.1:1"):
        find_engine()


def test_no_rights_to_the_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docker.sock").touch(mode=0o000)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root has all rights
    with pytest.raises(LabError, match=r"no rights to the Docker engine's socket .*\n.*group"):
        find_engine(f"unix://{tmp_path}/docker.sock")


def test_a_containerlab_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "containerlab"
    old.write_text("#!/bin/sh\necho '    version: 0.41.2'\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(LabError, match=r"containerlab 0.41.2 is too old\n.*0.64 or newer"):
        program.find_containerlab()


def test_a_program_that_is_no_containerlab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "containerlab"
    other.write_text("#!/bin/sh\necho hello\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(LabError, match="this is no containerlab: its version says 'hello'"):
        program.find_containerlab()


def test_an_image_that_the_engine_has_not(on_engine: Path, flat: LabSpec) -> None:
    with pytest.raises(LabError, match=r"the engine has no image nobody/has-it:1\n.*--image host or full"):
        kinds.bring_up("clab", flat, image="nobody/has-it:1")
    assert state.read_record(flat.id) is None


def test_containers_of_somebody_else_with_the_labs_name_are_left_alone(on_engine: Path, flat: LabSpec) -> None:
    client = find_engine().client
    tag = store.ensure(client, store.kind_of("host"))
    labels = {remains.LABEL: cluster_name(flat)}
    other = client.containers.create(tag, ["sleep", "1"], name="somebodys", labels=labels, network_mode="none")
    try:
        with pytest.raises(LabBusyError, match="has containers of a lab .* already: somebodys\n.*another --name"):
            kinds.bring_up("clab", flat)
        assert client.containers.get("somebodys").id == other.id
    finally:
        other.remove(force=True)


def test_an_engine_is_started_once(on_engine: Path) -> None:
    with pytest.raises(LabBusyError, match="the private engine is up already\n.*testbed engine down"):
        private.start()
    assert find_engine().client.ping()


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "testbed", *words], capture_output=True, text=True, check=False)


def test_an_engine_with_labs_is_not_removed_by_mistake(own_engine: Path, flat: LabSpec) -> None:
    kinds.bring_up("clab", flat)
    refused = command("engine", "down")
    assert refused.returncode == 2
    assert f"labs run on the private engine: {flat.id}\n" in refused.stderr
    assert find_engine().client.ping()
    assert command("engine", "down", "--force").returncode == 0
    assert not list(own_engine.iterdir())


def test_a_lab_whose_engine_was_killed_is_removed_all_the_same(own_engine: Path, flat: LabSpec) -> None:
    kinds.bring_up("clab", flat)
    engine = private.running()
    assert engine
    os.kill(engine.holder.pid, signal.SIGKILL)
    assert engine.holder.kill(20)
    with pytest.raises(LabError, match=f"lab {flat.id} is not up"):
        kinds.open_lab(flat.id)
    assert command("down", "--name", flat.id).stdout == f"removed {flat.id}\n"
    assert not list(own_engine.glob("*.json"))
    assert not (own_engine / "clab").exists()


@pytest.mark.parametrize("step", ["Deploying", "Addressing", "Waiting for BGP", "Starting flanneld", "DEP-"])
def test_an_engine_that_dies_in_the_middle(own_engine: Path, flat: LabSpec, tmp_path: Path, step: str) -> None:
    argv = [sys.executable, "-m", "testbed", "run", "host_gw", "--", "--lab", "clab", "--name", flat.id]
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [*argv, "--reports", str(tmp_path / "reports")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    ) as process:
        engine = private.running()
        assert engine
        assert process.stdout
        said = []
        before = {"Deploying": "image", "Addressing": "Deploying", "Waiting for BGP": "Copying"}
        wanted = before.get(step, {"Starting flanneld": "Writing"}.get(step, "Making pods"))
        for line in process.stdout:
            said.append(line)
            if wanted in line:
                time.sleep(0.1)  # into the step
                engine.holder.kill(20)
        code = process.wait(60)
    text = "".join(said)
    assert code == 2, text
    assert "Traceback" not in text
    assert state.read_record(flat.id) is None
    assert not (own_engine / "clab").exists()
