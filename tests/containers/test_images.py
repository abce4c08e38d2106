"""`testbed images`: made, listed, written out, and brought in again elsewhere as what it was."""

from __future__ import annotations

import http.server
import io
import json
import socketserver
import subprocess
import sys
import tarfile
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import docker
import pytest

from testbed.engine.private import PrivateEngine
from testbed.images import store
from testbed.images.names import named_images


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


def test_the_private_engine_pulls_nothing_and_says_so(at_home: PrivateEngine) -> None:
    done = images("pull", "frr")
    assert done.returncode == 2
    assert "the private engine has no way out" in done.stderr.decode()


class _Puller(http.server.BaseHTTPRequestHandler):
    """As much of an engine as pulls images; one of them it cannot have."""

    asked: ClassVar[list[tuple[str, str]]] = []

    def _answer(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path.endswith("/json"):
            self._answer({"Id": "sha256:0", "RepoTags": []})
        else:
            self._answer({"ApiVersion": "1.47", "Version": "27.0"})

    def do_POST(self) -> None:
        words = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        self.asked.append((words["fromImage"][0], words.get("tag", [""])[0]))
        if words["fromImage"][0].startswith("dead.example/"):
            self._answer({"message": "no such host"}, 500)
        else:
            self._answer({"status": "Pulled"})

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
        """Say nothing."""

    def address_string(self) -> str:
        return ""


@pytest.fixture
def puller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    _Puller.asked.clear()
    with socketserver.ThreadingUnixStreamServer(str(tmp_path / "d"), _Puller) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/d")
        monkeypatch.setenv("TESTBED_STATE", str(tmp_path / "state"))
        yield _Puller.asked
        server.shutdown()


def test_an_engine_is_asked_for_digests_behind_the_mirror(puller: list[tuple[str, str]]) -> None:
    done = images("pull", "frr", "flannel", "--image-prefix", "mirror.example/hub")
    assert done.returncode == 0, done.stderr
    frr, flannel = named_images()["frr"], named_images()["flannel"]
    name, _, tag = flannel.name.partition(":")
    assert puller == [(f"mirror.example/hub/{frr.name}", frr.digest), (f"mirror.example/hub/{name}", tag)]
    puller.clear()
    assert images("pull").returncode == 0
    assert len(puller) == sum(not image.made for image in named_images().values())


def test_an_image_that_cannot_be_had_is_one_error(puller: list[tuple[str, str]]) -> None:
    done = images("pull", "frr", "--image-prefix", "dead.example")
    assert done.returncode == 2
    assert "cannot be pulled: no such host" in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()
    done = images("pull", "frr", "node")
    assert (done.returncode, len(puller)) == (3, 1), "node's is made, so nothing was asked for"


def test_without_an_engine_there_is_still_a_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TESTBED_STATE", str(tmp_path / "s"))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none")
    done = images("list", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["engine"] is False
    assert {"frr", "kind", "node"} <= set(answer["named"])
    assert images("build", "host").returncode == 2
