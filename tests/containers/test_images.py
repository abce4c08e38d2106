"""`testbed images`: made, listed, written out, and brought in again elsewhere as what it was."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import docker
import pytest

from testbed.engine.private import PrivateEngine
from testbed.images import store


def images(*words: str, stdout: int | None = subprocess.PIPE) -> subprocess.CompletedProcess[bytes]:
    argv = [sys.executable, "-m", "testbed", "images", *words]
    return subprocess.run(argv, stdout=stdout, stderr=subprocess.PIPE, check=False, timeout=120)


def listed() -> dict[str, bool]:
    answer = json.loads(images("list", "--json").stdout)
    assert answer["engine"]
    return {row["name"]: row["in_engine"] for row in answer["images"]}


@pytest.fixture
def client(at_home: PrivateEngine) -> docker.DockerClient:
    return docker.DockerClient(base_url=at_home.address, version="auto")


def test_an_image_is_made_and_listed(client: docker.DockerClient) -> None:
    kind = store.KINDS["host"]
    if store.present(client, kind):
        client.images.remove(kind.tag, force=True)
    assert listed()["host"] is False
    done = images("build", "host", "--tag", "mine/node:7")
    assert (done.returncode, done.stdout.decode().strip()) == (0, "mine/node:7"), done.stderr
    assert listed()["host"] is True
    assert client.images.get("mine/node:7").id == client.images.get(kind.tag).id
    client.images.remove("mine/node:7")


def test_what_is_exported_comes_back_as_the_same(client: docker.DockerClient, tmp_path: Path) -> None:
    archive = tmp_path / "host.tar"
    done = images("export", "host", "-o", str(archive))
    assert done.returncode == 0, done.stderr
    with tarfile.open(archive) as tar:
        assert "etc/testbed-init" in tar.getnames()
    done = images("import", str(archive), "--tag", "port.example:5000/elsewhere/node")
    assert done.returncode == 0, done.stderr
    found = client.images.get("port.example:5000/elsewhere/node:latest")
    images("build", "host")
    made = client.images.get(store.KINDS["host"].tag)
    assert found.attrs["RootFS"] == made.attrs["RootFS"], "the same files"
    for key in ("Cmd", "Env"):
        assert found.attrs["Config"][key] == made.attrs["Config"][key], key
    client.images.remove("port.example:5000/elsewhere/node")


def test_an_image_is_called_what_rendered_files_call_it(client: docker.DockerClient, tmp_path: Path) -> None:
    archive = tmp_path / "tiny.tar"
    with tarfile.open(archive, "w") as tar:
        tar.addfile(tarfile.TarInfo("nothing"), io.BytesIO())
    done = images("import", str(archive))
    assert (done.returncode, done.stdout.decode().strip()) == (0, "testbed-node:latest"), done.stderr
    client.images.remove("testbed-node:latest")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("build", "nope"), 3, "there is no image 'nope'"),
        (("build", "host", "--tag", "No Name"), 3, "'No Name' is no name of an image"),
        (("import", "/nonexistent/file.tar"), 3, "cannot read"),
        (("import", "/proc/self/status", "--tag", "-x"), 3, "'-x' is no name of an image"),
        (("import", "/proc/self/status"), 2, "cannot be imported"),
        (("export", "host", "-o", "/nonexistent/x.tar"), 3, "cannot write"),
    ],
)
def test_bad_input_is_one_error(at_home: PrivateEngine, words: tuple[str, ...], code: int, said: str) -> None:
    done = images(*words)
    assert done.returncode == code, done.stderr
    assert said in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()


def test_without_an_engine_there_is_still_a_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TESTBED_STATE", str(tmp_path / "s"))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none")
    done = images("list", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["engine"] is False
    assert {"frr", "kind", "node"} <= set(answer["named"])
    assert images("build", "host").returncode == 2
