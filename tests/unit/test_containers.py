"""What doctor says of labs of containers: the engine, and containerlab, found or how to be had; nothing is made."""

from __future__ import annotations

import http.server
import os
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed import containers, doctor, tools
from testbed.doctor import Finding
from testbed.engine import find, private
from testbed.errors import LabError


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with nothing on PATH, and no engine; returns the folder of its programs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TESTBED_STATE", str(tmp_path / "state"))
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    monkeypatch.setattr(doctor, "SYSTEM_FOLDERS", ())
    monkeypatch.setattr(find, "DEFAULT_SOCKET", tmp_path / "docker.sock")
    return folder


def program(path: Path) -> None:
    path.write_text("#!/bin/sh\necho go1.99\n")
    path.chmod(0o755)


def found() -> tuple[Finding, Finding]:
    return containers.findings()


def test_without_either_both_cures_are_told(machine: Path) -> None:
    engine, containerlab = found()
    assert (engine.ok, containerlab.ok) == (False, False)
    assert "apt-get install --no-install-recommends docker.io, then testbed engine up" in engine.cure
    assert "built with Go, which is missing" in containerlab.detail
    assert "golang" in containerlab.cure
    assert (engine.needed_by, containerlab.needed_by) == ((), ()), "no run of the embedded lab needs them"


@pytest.mark.skipif(os.geteuid() != 0, reason="others than root are told of root")
def test_with_dockerd_a_private_engine_is_the_cure(machine: Path) -> None:
    program(machine / "dockerd")
    assert found()[0].cure == "testbed engine up"


def test_containerlab_on_path_is_taken(machine: Path) -> None:
    program(machine / "containerlab")
    assert (found()[1].ok, found()[1].detail) == (True, str(machine / "containerlab"))


def test_one_that_was_built_is_found_and_none_is_built(machine: Path, tmp_path: Path) -> None:
    for name, source in (("go", None), ("nice", "#!/bin/sh\necho go1.99 amd64\n")):
        program(machine / name)
        if source:
            (machine / name).write_text(source)
    containerlab = found()[1]
    assert (containerlab.ok, containerlab.detail) == (False, "not built yet")
    assert "--lab clab" in containerlab.cure
    assert not list(tmp_path.rglob("containerlab-*"))
    place, _, _ = tools._place("containerlab")
    program(place)
    assert (found()[1].ok, found()[1].detail) == (True, str(place))


class _Docker(http.server.BaseHTTPRequestHandler):
    """As much of an engine as answers a ping."""

    def do_GET(self) -> None:
        body = b'{"ApiVersion": "1.47", "Version": "27.0", "KernelVersion": "0.0"}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
        """Say nothing."""

    def address_string(self) -> str:
        return ""


@pytest.fixture
def docker_host(tmp_path: Path) -> Iterator[str]:
    path = tmp_path / "engine"
    with socketserver.ThreadingUnixStreamServer(str(path), _Docker) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"unix://{path}"
        server.shutdown()


def test_an_engine_that_answers_is_told_by_its_address(
    machine: Path, docker_host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", docker_host)
    engine = found()[0]
    assert (engine.ok, engine.detail) == (True, f"another: {docker_host}")


def test_an_engine_that_is_dead_is_told_so(machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docker.sock").write_text("")
    engine = found()[0]
    assert not engine.ok
    assert "no Docker engine answers at" in engine.detail


@pytest.mark.skipif(os.geteuid() != 0, reason="only root starts an engine")
def test_a_state_folder_too_long_for_sockets_is_refused_at_once(
    machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(machine / "dockerd")
    place = tmp_path / ("x" * 80)
    monkeypatch.setenv("TESTBED_STATE", str(place))
    with pytest.raises(LabError, match="too long for its sockets"):
        private.start()
    assert list(place.iterdir()) == []
