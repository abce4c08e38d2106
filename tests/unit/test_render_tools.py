"""The rendered files, judged by the tools that they are for: containerlab, kind and FRR themselves."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from testbed.clabernetes import render_clabernetes
from testbed.commands.render import write_files
from testbed.flannelbuild import default_flannel
from testbed.flannelspec import BACKENDS
from testbed.model import LabSpec
from testbed.render import CLAB, CLAB_KIND, KIND, Images, kind_nodes, render_all, render_frr
from testbed.tools import ToolUnavailable, build_tool
from testbed.topology import load_topology

TOPOLOGIES = ("racks", "flat", "clos")
FRR = ("/usr/lib/frr", "/usr/libexec/frr")


def tool(name: str) -> Path:
    try:
        return build_tool(name)
    except ToolUnavailable as error:
        pytest.skip(str(error))


class _Engine(http.server.BaseHTTPRequestHandler):
    """As much of Docker's API as containerlab asks for before it reads a topology: that it is there."""

    def do_GET(self) -> None:
        body = json.dumps({"ApiVersion": "1.47", "Version": "27.0"}).encode()
        self.send_response(200)
        self.send_header("Api-Version", "1.47")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
        """Say nothing."""

    def address_string(self) -> str:
        return ""


@pytest.fixture(scope="module")
def docker_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("d") / "s"
    with socketserver.ThreadingUnixStreamServer(str(path), _Engine) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"unix://{path}"
        server.shutdown()


def validate(folder: Path, file: str, docker_host: str) -> subprocess.CompletedProcess[str]:
    argv = [str(tool("containerlab")), "validate", "-t", str(folder / file)]
    env = {**os.environ, "DOCKER_HOST": docker_host, "CLAB_VERSION_CHECK": "disable"}
    return subprocess.run(argv, env=env, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("file", [CLAB, CLAB_KIND])
def test_containerlab_takes_the_topology(tmp_path: Path, docker_host: str, topology: str, file: str) -> None:
    lab = load_topology(topology, "t1")
    write_files(tmp_path, render_all(lab, default_flannel("vxlan")))
    result = validate(tmp_path, file, docker_host)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"nodes={len(lab.nodes)} links={len(lab.links)}" in " ".join((result.stdout + result.stderr).split())


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_containerlab_takes_what_is_given_to_clabernetes(tmp_path: Path, docker_host: str, topology: str) -> None:
    lab = load_topology(topology, "t1")
    *_, resource = yaml.safe_load_all(render_clabernetes(lab, Images()))
    definition = resource["spec"]["definition"]["containerlab"]
    write_files(tmp_path, {"definition.clab.yml": definition})
    result = validate(tmp_path, "definition.clab.yml", docker_host)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"nodes={len(lab.nodes)} links={len(lab.links)}" in " ".join((result.stdout + result.stderr).split())
    write_files(tmp_path, {"definition.clab.yml": definition.replace("exec:", "execute:", 1)})
    assert validate(tmp_path, "definition.clab.yml", docker_host).returncode != 0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("network-mode: none", "network-modee: none"),
        ('{node: "leaf1", interface: "swp1"', '{node: "leaf9", interface: "swp1"'),
        ("mtu: 9150", "mtu: much"),
        ("frr/daemons:", "frr/deamons:"),
    ],
)
def test_containerlab_refuses_what_is_wrong(tmp_path: Path, docker_host: str, old: str, new: str) -> None:
    """The control: what passes above passes because it is right."""
    files = dict(render_all(load_topology("racks", "t1"), default_flannel("vxlan")))
    assert old in files[CLAB]
    files[CLAB] = files[CLAB].replace(old, new, 1)
    write_files(tmp_path, files)
    assert validate(tmp_path, CLAB, docker_host).returncode != 0


def kindcheck(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    (folder / KIND).write_text(text)
    argv = [str(tool("kindcheck")), KIND]
    return subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("run", BACKENDS)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_kind_takes_the_cluster_and_applies_its_patches(tmp_path: Path, run: str, topology: str) -> None:
    """kind's own code decodes, validates and generates kubeadm's configuration, before and after v1beta4."""
    lab, flannel = load_topology(topology, "t1"), default_flannel(run)
    result = kindcheck(tmp_path, render_all(lab, flannel)[KIND])
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["podSubnet"].split(",")[0] == str(flannel.network)
    assert report["defaultCNI"] is False
    addresses = [str(lab.node(name).ip) for name in kind_nodes(lab)]
    assert [list(node["nodeIP"].values()) for node in report["nodes"]] == [[ip, ip] for ip in addresses]
    assert all("/opt/cni/bin" in node["mounts"] for node in report["nodes"])


def test_kinds_image_is_the_pinned_kinds_own(tmp_path: Path) -> None:
    result = kindcheck(tmp_path, render_all(load_topology("flat", "t1"), default_flannel("vxlan"))[KIND])
    assert json.loads(result.stdout)["defaultImage"] == Images().kind


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("podSubnet:", "podSubnets:"),
        ('"10.244.0.0/16"', '"10.244.0.0"'),
        ('role: "worker"', 'role: "walker"'),
        ("disableDefaultCNI: true", 'disableDefaultCNI: "perhaps"'),
    ],
)
def test_kind_refuses_what_is_wrong(tmp_path: Path, old: str, new: str) -> None:
    text = render_all(load_topology("racks", "t1"), default_flannel("vxlan"))[KIND]
    assert old in text
    assert kindcheck(tmp_path, text.replace(old, new, 1)).returncode != 0


def test_kind_would_ignore_a_patch_of_another_version(tmp_path: Path) -> None:
    """Why patches have no apiVersion: with one, the address never reaches the node."""
    text = render_all(load_topology("racks", "t1"), default_flannel("vxlan"))[KIND]
    patched = text.replace(
        "kind: JoinConfiguration", "apiVersion: kubeadm.k8s.io/v1beta2\n        kind: JoinConfiguration"
    )
    report = json.loads(kindcheck(tmp_path, patched).stdout)
    assert "10.0.0.12" not in report["nodes"][1]["nodeIP"].values()


def routers() -> Iterator[tuple[LabSpec, str]]:
    for topology in TOPOLOGIES:
        lab = load_topology(topology, "t1")
        yield from ((lab, node.name) for node in lab.nodes if node.routes)


# FRR's daemons change to a user of their own and leave folders in /var/tmp: here in one that goes with them.
IN_A_BOX = 'mount -t tmpfs none /var/tmp && cat >/var/tmp/frr.conf && exec "$@"'


def refused_lines(daemon: Path, config: str) -> dict[str, str]:
    """The lines of a configuration that a daemon does not take, by number."""
    argv = ["unshare", "--mount", "sh", "-c", IN_A_BOX, "-", str(daemon), "-C", "-f", "/var/tmp/frr.conf"]
    result = subprocess.run(argv, input=config, capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    said = (result.stdout + result.stderr).splitlines()
    found = [line.split("on config line ")[1].partition(":") for line in said if "on config line" in line]
    return {number: text.strip() for number, _, text in found}


@pytest.fixture(scope="module")
def daemons() -> list[Path]:
    folder = next((Path(f) for f in FRR if (Path(f) / "zebra").exists()), None)
    if folder is None:
        pytest.skip("FRR is not installed")
    if os.geteuid() != 0:
        pytest.skip("FRR's daemons check a configuration as root only")
    return [folder / "zebra", folder / "bgpd"]


@pytest.mark.parametrize(("lab", "name"), [pytest.param(*r, id=f"{r[0].topology}-{r[1]}") for r in routers()])
def test_frrs_daemons_take_every_line_between_them(daemons: list[Path], lab: LabSpec, name: str) -> None:
    """Each daemon takes its own commands of the one file; a line that neither takes would be lost without a word."""
    zebra, bgpd = (refused_lines(daemon, render_frr(lab.node(name), lab)["frr.conf"]) for daemon in daemons)
    assert zebra  # each refuses the other's lines, so that the file was read at all
    assert bgpd
    assert zebra.keys() & bgpd.keys() == set()


def test_a_line_that_no_daemon_takes_is_found(daemons: list[Path]) -> None:
    lab = load_topology("flat", "t1")
    text = render_frr(lab.node("leaf1"), lab)["frr.conf"].replace(" maximum-paths ", " maximum-pathes ")
    zebra, bgpd = (refused_lines(daemon, text) for daemon in daemons)
    assert [bgpd[number] for number in zebra.keys() & bgpd.keys()] == ["maximum-pathes 64"]


def test_a_tool_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = tool("kindcheck")
    stamp = first.stat().st_mtime_ns
    assert build_tool("kindcheck") == first
    assert first.stat().st_mtime_ns == stamp


def test_without_go_the_reason_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolUnavailable, match="built with Go, which is missing"):
        build_tool("kind")


@pytest.mark.skipif(shutil.which("go") is None, reason="Go is missing")
def test_a_cache_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ToolUnavailable, match="set XDG_CACHE_HOME"):
        build_tool("kind")
