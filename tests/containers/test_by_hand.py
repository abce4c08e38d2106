"""What `testbed render` writes, run by hand as its README says, word for word, on a private at_home."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

from testbed.clab.program import find_containerlab
from testbed.engine.private import PrivateEngine
from testbed.errors import LabError
from testbed.labs import interpreter
from tests.labs.helpers import unique

STEP = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
SECONDS = 240

# containerlab's own words, said where a private engine's containers are to be seen.
CONTAINERLAB = """#!/bin/sh
exec {way} sh -c 'cd "$0" && exec "$@"' "$PWD" {python} -I -S {box} {folder} {program} "$@"
"""


@pytest.fixture
def programs(at_home: PrivateEngine, tmp_path: Path) -> Path:
    """A folder with `testbed`, and a `containerlab` that works on that at_home."""
    try:
        program = find_containerlab().path
    except LabError as error:
        pytest.skip(str(error))
    folder, aside = tmp_path / "bin", tmp_path / "aside"
    folder.mkdir()
    aside.mkdir()
    box = aside / "box.py"
    box.write_text(resources.files("testbed.clab").joinpath("box.py").read_text())
    words = {"way": " ".join(at_home.entering()), "python": interpreter(), "box": box, "folder": aside}
    (folder / "containerlab").write_text(CONTAINERLAB.format(program=program, **words))
    (folder / "testbed").write_text(f'#!/bin/sh\nexec {sys.executable} -m testbed "$@"\n')
    for path in folder.iterdir():
        path.chmod(0o755)
    return folder


def section(readme: str, title: str) -> list[str]:
    """The blocks of commands below a heading."""
    return STEP.findall(next(part for part in readme.split("\n## ") if part.startswith(title)))


def test_the_rendered_readme_brings_up_a_lab_with_flannel(
    at_home: PrivateEngine, programs: Path, tmp_path: Path
) -> None:
    folder, name = tmp_path / "lab", unique("hand").replace("-", "")
    # An engine without a way out pulls no image: routers are what nodes are.
    words = ["render", "--target", "clab", "--name", name, "--image", "frr=testbed-node:latest", "-o", str(folder)]
    subprocess.run([sys.executable, "-m", "testbed", *words], check=True)
    env = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "DOCKER_HOST": at_home.address,
        "CLAB_VERSION_CHECK": "disable",
        "CLAB_LABDIR_BASE": str(tmp_path),
    }

    def run(*argv: str) -> str:
        done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, timeout=SECONDS, check=False)
        assert done.returncode == 0, f"{argv}\n{done.stdout}{done.stderr}"
        return done.stdout

    readme = (folder / "README.md").read_text()
    *steps, removal = section(readme, "On containerlab")
    assert len(steps) == 4
    for step in steps:
        run("sh", "-eu", "-c", step)
    address = run("docker", "exec", f"clab-{name}-worker3", "ip", "-4", "-o", "address", "show", "flannel.1")
    found = re.search(r"inet ([0-9.]+)/32", address)
    assert found, address
    received = ("docker", "exec", f"clab-{name}-worker3", "cat", "/sys/class/net/flannel.1/statistics/rx_packets")
    before = int(run(*received))
    ping = ("docker", "exec", f"clab-{name}-worker1", "ping", "-c", "2", "-W", "5", found[1])
    assert " 0% packet loss" in run(*ping)
    assert int(run(*received)) >= before + 2, "not over vxlan"
    run("sh", "-eu", "-c", removal)
    assert run("docker", "ps", "--all", "--quiet") == ""
