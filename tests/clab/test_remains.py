"""Labs of containers go for good: what is still on its way is waited for, and what stays is said."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
from http import HTTPStatus
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import requests
from docker.errors import APIError, NotFound

from testbed.clab import remains
from testbed.clab.program import Containerlab
from testbed.engine.find import Engine, find_engine
from testbed.errors import LabError
from testbed.images import store
from testbed.labs import kinds, state
from testbed.topology import load_topology
from tests.labs.helpers import unique


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """State of the test's own, without an engine."""
    monkeypatch.setenv("TESTBED_STATE", str(tmp_path / "s"))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none")
    return tmp_path / "s"


class Containers:
    """An engine's list of containers of one lab, a look at a time."""

    def __init__(self, *looks: list[str], refusal: Exception | None = None) -> None:
        self.looks, self.refusal, self.removed = list(looks), refusal, list[str]()

    def list(self, **_: Any) -> list[Any]:
        names = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        return [self._one(name) for name in names]

    def _one(self, name: str) -> Mock:
        one = Mock(labels={remains.TOPOLOGY_FILE: f"{remains.folder_of('one')}/lab.clab.yml"})
        one.name = name

        def remove(**_: Any) -> None:
            self.removed.append(name)
            if self.refusal:
                raise self.refusal

        one.remove = remove
        return one


def engine_of(containers: Containers) -> Engine:
    return Engine("tcp://192.0.2.1:1", Mock(containers=containers), None)


def refusal(status: int) -> APIError:
    answer = requests.Response()
    answer.status_code = status
    return APIError("no", response=answer)


def test_a_container_that_somebody_removes_already_is_waited_for(home: Path) -> None:
    containers = Containers(["a"], ["a"], ["a"], ["a"], [], refusal=refusal(HTTPStatus.CONFLICT))
    remains.remove(engine_of(containers), "one", complete=True)
    assert containers.looks == [[]]
    gone = Containers(["a"], [], refusal=NotFound("gone"))
    remains.remove(engine_of(gone), "one", complete=True)


def test_a_container_that_a_killed_containerlab_asked_for_is_waited_for(home: Path) -> None:
    containers = Containers([], [], [], ["late"], [])
    remains.remove(engine_of(containers), "one", complete=False)
    assert containers.removed == ["late"]


def test_containers_that_stay_are_told_and_so_are_refusals(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remains, "GONE_SECONDS", 0.2)
    folder = remains.folder_of("one")
    folder.mkdir(parents=True)
    with pytest.raises(LabError, match="lab one left containers behind: a b"):
        remains.remove(engine_of(Containers(["a", "b"])), "one", complete=True)
    with pytest.raises(LabError, match="lab one cannot be removed: 500 "):
        remains.remove(
            engine_of(Containers(["a"], refusal=refusal(HTTPStatus.INTERNAL_SERVER_ERROR))), "one", complete=True
        )
    assert folder.exists(), "files go after containers"


def test_somebody_elses_containers_are_not_ours(home: Path) -> None:
    containers = Containers(["a"])
    engine = engine_of(containers)
    assert [one.name for one in remains.containers(engine, "one")] == ["a"]
    for other in ("on", "one-more", "two"):
        assert not remains.containers(engine, other)


def test_removals_wait_for_a_containerlab_whose_caller_is_gone(home: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounts")
    program, pid = tmp_path / "containerlab", tmp_path / "pid"
    program.write_text(f'#!/bin/sh\nsleep 1000 >/dev/null 2>&1 &\necho "$!" >{pid}\n')
    program.chmod(0o755)
    folder = remains.folder_of("one")
    folder.mkdir(parents=True)
    with remains.one_at_a_time() as lock:
        Containerlab(program, "0").deploy(folder, Engine("unix:///none", Mock(), None), lock)
    left = int(pid.read_text())
    handle = os.pidfd_open(left)
    looker = os.open(state.state_folder(), os.O_RDONLY)
    try:
        with pytest.raises(BlockingIOError):
            fcntl.flock(looker, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(looker)
        os.close(handle)
    with remains.one_at_a_time():  # it is ours once that has gone
        assert True


def test_folders_without_a_record_are_swept_but_not_those_in_use(home: Path) -> None:
    for name in ("lost", "being-made"):
        (remains.folder_of(name) / "frr").mkdir(parents=True)
    with state.locked("being-made"):
        assert kinds.down_all() == ["lost"]
        assert [path.name for path in remains.folders().iterdir()] == ["being-made"]
    assert kinds.down_all() == ["being-made"]
    assert not list(home.iterdir())


def test_containers_without_a_record_are_swept_by_their_folder(on_engine: Path) -> None:
    client = find_engine().client
    tag = store.ensure(client, store.kind_of("host"))
    for name, folder in (("lost", remains.folder_of("lost")), ("somebodys", on_engine / "elsewhere")):
        labels = {remains.TOPOLOGY_FILE: f"{folder}/lab.clab.yml"}
        client.containers.create(tag, ["sleep", "1"], name=name, labels=labels, network_mode="none")
    try:
        remains.folder_of("lost").mkdir(parents=True)
        assert kinds.down_all() == ["lost"]
        assert [one.name for one in client.containers.list(all=True)] == ["somebodys"]
    finally:
        client.containers.get("somebodys").remove(force=True)


def test_a_lab_whose_files_cannot_be_removed_is_still_known(on_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = load_topology("flat", unique("stays"))
    lab = kinds.bring_up("clab", spec)

    def refused(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(path / "frr"))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refused)
        with pytest.raises(LabError, match=f"files of lab {spec.id} cannot be removed: Operation not permitted"):
            lab.down()
        assert state.read_record(spec.id)
        with pytest.raises(LabError, match="cannot be removed"):
            kinds.down_all()
    assert kinds.down_all() == [spec.id]
