"""The commands that the documentation shows do work, as it shows them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.labs.helpers import need_lab, unique

CHECKOUT = Path(__file__).parents[2]
PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`((?:testbed|\./run) [^`]+)`")


def commands(kind: str, page: Path) -> list[str]:
    """Every command of a page that begins with that word, from its blocks and its lines, without comments."""
    text = page.read_text()
    lines = [line.partition("#")[0].strip() for block in BLOCK.findall(text) for line in block.splitlines()]
    spans = [" ".join(span.split()) for span in SPAN.findall(text)]
    return [line for line in dict.fromkeys([*lines, *spans]) if line.split()[:1] == [kind]]


RUNS = [(page.name, command) for page in PAGES for command in commands("./run", page)]
BY_HAND = commands("testbed", CHECKOUT / "README.md")
NO_ENGINE = os.getuid() != 0 or shutil.which("dockerd") is None
LAB_COMMANDS = {"up", "status", "exec", "capture", "shell", "trace", "graph", "down"}


def test_there_is_something_to_test() -> None:
    assert len(RUNS) >= 6, RUNS
    assert {command.split()[1] for command in BY_HAND} > LAB_COMMANDS


@pytest.mark.parametrize(("page", "command"), RUNS)
def test_a_run_of_the_documentation_is_one(page: str, command: str, tmp_path: Path) -> None:
    words = shlex.split(command)[1:]
    names = words[: words.index("--")] if "--" in words else words
    options = words[words.index("--") + 1 :] if "--" in words else []
    sessions = (CHECKOUT / "noxfile.py").read_text()
    if names == ["prepare"] or all(f"def {name}(" in sessions or f'"{name}":' in sessions for name in names):
        return  # a developer's session; CI runs them by themselves
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    stand_ins = {"kube-flannel.yml": str(CHECKOUT / "tests/data/s0-vxlan-direct.yml")}
    options = [stand_ins.get(word, re.sub(r"/path/to/\w+", str(program), word)) for word in options]
    argv = [sys.executable, "-m", "testbed", "run", *names, "--", *options, "--collect-only", "-q"]
    done = subprocess.run(argv, cwd=CHECKOUT, capture_output=True, text=True, check=False, timeout=120)
    if "the guest kernel cannot be built" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_commands_by_hand_work_one_after_the_other(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    need_lab()
    # Sockets stand in it, whose paths are short.
    env = os.environ | {"TESTBED_STATE": str(tmp_path_factory.mktemp("s"))}
    env.pop("DOCKER_HOST", None)

    def run(command: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", *shlex.split(command)]
        return subprocess.run(
            argv, cwd=tmp_path, env=env, input="exit\n", capture_output=True, text=True, check=False, timeout=120
        )

    manifest = CHECKOUT / "tests/golden/render/racks-s0-vxlan-direct/manifests/kube-flannel.yml"
    (tmp_path / "kube-flannel.yml").write_text(manifest.read_text())
    traffic: subprocess.Popen[bytes] | None = None
    try:
        for command in BY_HAND:
            if command.split()[1] == "engine" and NO_ENGINE:
                continue
            if command.split()[1] == "up":
                command = f"{command} --name {unique('docs')}"
            if command.split()[1] == "capture":
                ping = "exec worker3 -- ping -q -i 0.2 -c 60 203.0.113.8"
                traffic = subprocess.Popen([sys.executable, "-m", "testbed", *ping.split()], env=env, cwd=tmp_path)
            done = run(command)
            if command.split()[1] == "doctor":  # tells of this machine, whatever it is
                assert done.returncode in (0, 2), done.stderr
                continue
            assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    finally:
        run("testbed down --all")
        run("testbed engine down")
        if traffic:
            traffic.wait()
    assert (tmp_path / "lab.svg").read_text().startswith("<svg")


def test_the_drawing_in_the_readme_is_current() -> None:
    from testbed.report.drawing import draw
    from testbed.topology import load_topology

    assert (CHECKOUT / "docs/lab.svg").read_text() == draw(load_topology("racks", "drawing"))


def test_every_page_that_is_pointed_to_is_there() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} points to {target}"


def test_the_topology_in_the_documentation_is_one(tmp_path: Path) -> None:
    from testbed.topology import load_topology

    text = (CHECKOUT / "docs/topologies.md").read_text()
    path = tmp_path / "mine.yml"
    path.write_text(text.partition("```yaml\n")[2].partition("```")[0])
    lab = load_topology(str(path), "mine")
    assert [node.name for node in lab.cluster_nodes] == ["cp1", "node1", "node2"]
