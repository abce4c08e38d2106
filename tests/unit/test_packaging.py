"""The two wheels: what is in them, and that they work from any folder, installed."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from email import message_from_string
from pathlib import Path

import click
import pytest

from testbed import cli

HERE = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wheels")
    for source in (HERE, HERE / "flannel"):
        argv = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
        argv += ["-w", str(folder), str(source)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return {path.name.partition("-")[0]: path for path in folder.glob("*.whl")}


def contents(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def requirements(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_string(archive.read(name).decode()).get_all("Requires-Dist") or []


@pytest.mark.parametrize("name", ["testbed", "flannel"])
def test_only_the_package_lands_in_site_packages(wheels: dict[str, Path], name: str) -> None:
    tops = {path.partition("/")[0] for path in contents(wheels[name])}
    assert {top for top in tops if not top.endswith(".dist-info")} == {name}


def test_the_testbed_carries_its_data(wheels: dict[str, Path]) -> None:
    inside = set(contents(wheels["testbed"]))
    for folder in ("topologies", "kind-configs", "manifests", "suites", "flannel"):
        for path in (HERE / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert f"testbed/{path.relative_to(HERE)}" in inside
    for path in (HERE / "testbed").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert str(path.relative_to(HERE)) in inside


def test_flannel_depends_on_nothing(wheels: dict[str, Path]) -> None:
    assert [line for line in requirements(wheels["flannel"]) if "extra ==" not in line] == []
    inside = {Path(name).name for name in contents(wheels["flannel"])}
    assert "pyproject.toml" not in inside
    assert "lease.py" in inside


def test_flannel_imports_nothing_of_the_testbed(wheels: dict[str, Path]) -> None:
    with zipfile.ZipFile(wheels["flannel"]) as archive:
        for name in archive.namelist():
            assert b"import testbed" not in archive.read(name), name
            assert b"from testbed" not in archive.read(name), name


def test_installed_it_works_from_another_folder(wheels: dict[str, Path], tmp_path: Path) -> None:
    """In an environment of its own, that borrows only this one's dependencies."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / "bin/python"
    argv = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*argv, *map(str, wheels.values())], check=True, capture_output=True)
    [site] = venv.glob("lib/python*/site-packages")
    # Links to the dependencies, not a path to their folder: the .pth file in there leads back to this checkout.
    for path in Path(pytest.__file__).parents[1].iterdir():
        ours = path.name.startswith(("testbed", "flannel")) or path.suffix == ".pth"
        if not ours and not (site / path.name).exists():
            (site / path.name).symlink_to(path)

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        env = {"PATH": "/usr/bin:/bin"}
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, env=env)

    where = run(python, "-c", "import testbed, flannel; print(testbed.__file__, flannel.__file__)")
    assert where.returncode == 0, where.stderr
    assert str(HERE / "testbed") not in where.stdout
    command = str(venv / "bin/testbed")
    assert "run" in run(command, "--help").stdout
    for name in cli.cli.list_commands(click.Context(cli.cli)):
        helped = run(command, name, "--help")
        assert helped.returncode == 0, helped.stderr
        assert "Usage: testbed" in helped.stdout
    folders = run(python, "-c", "from testbed.data import FOLDERS, folder\nfor name in FOLDERS: print(folder(name))")
    assert folders.returncode == 0, folders.stderr
    assert all(line.startswith(str(site)) for line in folders.stdout.splitlines())


def test_every_dependency_is_locked_by_hash() -> None:
    project = tomllib.loads((HERE / "pyproject.toml").read_text())
    wanted = project["project"]["dependencies"] + project["dependency-groups"]["dev"]
    lines = [line for line in (HERE / "requirements.lock").read_text().splitlines() if line[:1].isalnum()]
    locked = {line.partition("==")[0] for line in lines}
    for requirement in wanted:
        assert requirement.partition(">=")[0] in locked
    blocks = (HERE / "requirements.lock").read_text().split("\n")
    for number, line in enumerate(blocks):
        if line[:1].isalnum():
            assert "--hash=sha256:" in blocks[number + 1], line
    assert "://" not in "".join(blocks), "no index, so that the user's own is used"
