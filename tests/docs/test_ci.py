"""docs/ci.md: its files are what the two systems read, their commands exist, and what it says of exit codes is true."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from testbed.errors import WORST_FIRST, Exit
from testbed.flannelspec import BACKENDS

CHECKOUT = Path(__file__).parents[2]
TEXT = (CHECKOUT / "docs/ci.md").read_text()


class _Loader(yaml.SafeLoader):
    """`on` is a word here, as it is for the systems that read it."""


_Loader.yaml_implicit_resolvers = {
    key: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:bool"]
    for key, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
GITHUB, GITLAB = (
    yaml.load(block, _Loader) for block in re.findall(r"^```yaml\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
)
GITLAB_JOBS = {name: job for name, job in GITLAB.items() if name not in ("default", "variables")}


def github_commands(job: dict[str, Any]) -> Iterator[str]:
    for step in job["steps"]:
        if "run" in step:
            for run in job.get("strategy", {}).get("matrix", {}).get("run", [""]):
                yield step["run"].replace("${{ matrix.run }}", run)


def gitlab_commands(job: dict[str, Any]) -> Iterator[str]:
    for line in [*job["script"], *job.get("after_script", [])]:
        for run in job.get("parallel", {}).get("matrix", [{}])[0].get("RUN", [""]):
            yield line.replace('"$RUN"', run)


COMMANDS = list(
    dict.fromkeys(
        [command for job in GITHUB["jobs"].values() for command in github_commands(job)]
        + [command for job in GITLAB_JOBS.values() for command in gitlab_commands(job)]
    )
)


def runs() -> list[tuple[list[str], list[str]]]:
    """Names and options of every ./run in them."""
    found = []
    for command in COMMANDS:
        words = shlex.split(command)
        if "./run" in words:
            words = words[words.index("./run") + 1 :]
            cut = words.index("--") if "--" in words else len(words)
            found.append((words[:cut], words[cut + 1 :]))
    return found


def test_every_backend_is_run_by_both() -> None:
    assert "${{" not in "".join(COMMANDS)
    [matrix] = GITLAB_JOBS["checks"]["parallel"]["matrix"]
    for names in (GITHUB["jobs"]["checks"]["strategy"]["matrix"]["run"], matrix["RUN"]):
        assert sorted(names) == sorted(BACKENDS)
    both = [names for names, options in runs() if "clab" in options and names != ["prepare"]]
    assert both == [["vxlan", "vxlan_direct", "host_gw", "udp"]] * len(both)
    assert len(both) == 2


def test_names_are_backends_and_their_options_are_taken() -> None:
    tried = set()
    for names, options in runs():
        assert set(names) <= {*BACKENDS, "prepare"}, names
        if names != ["prepare"] and tuple(options) not in tried:
            tried.add(tuple(options))
            argv = [sys.executable, "-m", "testbed", "run", "vxlan", "--", *options, "--collect-only", "-q"]
            done = subprocess.run(argv, cwd=CHECKOUT, capture_output=True, text=True, check=False, timeout=120)
            assert done.returncode == 0, done.stdout + done.stderr
    assert tried == {(), ("--lab", "clab")}


def test_commands_of_testbed_are_commands() -> None:
    found = [shlex.split(command)[1:] for command in COMMANDS if shlex.split(command)[0].endswith("/testbed")]
    assert found == [["engine", "up"], ["engine", "down"]]
    for words in found:
        argv = [sys.executable, "-m", "testbed", *words, "--help"]
        assert subprocess.run(argv, capture_output=True, check=False, timeout=60).returncode == 0, words


def test_what_an_ordinary_user_is_refused_is_what_doctor_knows() -> None:
    policy = "kernel.apparmor_restrict_unprivileged_userns"
    assert f"sudo sysctl -w {policy}=0" in COMMANDS
    assert policy in (CHECKOUT / "testbed/doctor.py").read_text()


def test_reports_are_kept_whatever_came_of_the_run() -> None:
    for name, job in GITHUB["jobs"].items():
        [upload] = [step for step in job["steps"] if step.get("uses", "").startswith("actions/upload-artifact")]
        assert (upload["if"], upload["with"]["path"]) == ("always()", "reports"), name
    for name, job in GITLAB_JOBS.items():
        kept = job["artifacts"]
        assert (kept["when"], kept["paths"]) == ("always", ["reports"]), name
        assert kept["reports"]["junit"] == "reports/*/junit.xml"


def test_junit_files_are_where_it_says(tmp_path: Path) -> None:
    """Of one run and of several: the default, and what several runs make of one folder."""
    from testbed.commands.run import with_reports_apart

    assert with_reports_apart("vxlan", ["--reports", "reports"]) == ["--reports", "reports/vxlan"]
    argv = [sys.executable, "-m", "testbed", "run", "--help"]
    said = " ".join(subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout.split())
    assert re.search(r"--reports DIR [^-]*reports/NAME", said), said


def test_caches_are_the_folders_that_are_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from testbed import tools

    paths = {s["with"]["path"] for j in GITHUB["jobs"].values() for s in j["steps"] if "cache@" in s.get("uses", "")}
    assert paths == {"~/.cache/testbed"}
    assert GITLAB["default"]["cache"]["paths"] == [".cache/testbed"]
    assert GITLAB["variables"]["XDG_CACHE_HOME"] == "$CI_PROJECT_DIR/.cache"
    for file in GITLAB["default"]["cache"]["key"]["files"]:
        assert (CHECKOUT / file).is_file(), file
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    assert tools._cache().is_relative_to(tmp_path / ".cache/testbed")


def test_exit_codes_are_those_that_there_are() -> None:
    rows = re.findall(r"^\| (\d+) \|", TEXT, re.MULTILINE)
    assert sorted(map(int, rows)) == sorted(map(int, Exit))
    order = re.search(r"in the order ([0-9, ]+)\.", TEXT)
    assert order
    assert [int(code) for code in order[1].split(",")] == [int(code) for code in WORST_FIRST]
    assert GITLAB["default"]["retry"]["exit_codes"] == [Exit.LAB]


def test_no_host_is_named() -> None:
    assert not re.search(r"\b[\w-]+\.(io|com|org|net|dev)\b", TEXT)
