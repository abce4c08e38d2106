""".ci/run: which stages it runs, side by side or not, what it counts, and what it says where a build is late.

The script runs for real in a checkout of its own, whose `run` and Python are fakes that keep a record of their calls.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

CI = Path(__file__).parents[2] / ".ci" / "run"

RUN = """#!/bin/sh
echo "run $(id -u) $*" >>"$CALLS"
name=$1 words=$*
while [ $# -gt 0 ]; do
    case $1 in
        --reports)
            case $2 in *manifests* | *full*) folder=$2 ;; *) folder=$2/$name ;; esac
            mkdir -p "$folder"
            cp "$JUNIT" "$folder/junit.xml"
            ;;
        --junit-xml=*second*) mkdir -p reports/tests; cp "$SECOND" "${1#*=}"; grep -q '<failure ' "$SECOND" && exit 1 ;;
        --junit-xml=*)
            mkdir -p reports/tests
            if [ -n "${FIRST-}" ]; then cp "$FIRST" "${1#*=}"; exit 1; fi
            cp "$JUNIT" "${1#*=}"
            ;;
    esac
    shift
done
echo "output of $name"
case " $SLOW " in *" $name "*) echo "begins" >>"$CALLS"; sleep 0.5; echo "ends" >>"$CALLS" ;; esac
case " $FAILS " in *" $name "*) exit 1 ;; esac
case " $words " in *" ${FAILS_WITH:-nothing} "*) exit 1 ;; esac
"""

PYTHON = """#!/bin/sh
case "$*" in
    *'kernel build') sleep "${BUILD_SECONDS-0}"; echo "at net/ipv4"; exit "${BUILD_EXIT-0}" ;;
    *'kernel path') echo "$KERNEL" ;;
    *'kernel check') echo "check $(id -u)" >>"$CALLS" ;;
    *'testbed engine up')
        echo "engine up $TESTBED_STATE $(stat -c %a "$TESTBED_STATE")" >>"$CALLS"
        exit "${ENGINE_EXIT-0}"
        ;;
    *'testbed down --all') echo "labs down $TESTBED_STATE" >>"$CALLS" ;;
    *'testbed engine down') echo "engine down $TESTBED_STATE" >>"$CALLS" ;;
    '-c '*find_containerlab*) exit "${CONTAINERLAB_EXIT-0}" ;;
    '-c '*) ;;
    *) exec "$PYTHON" "$@" ;;
esac
"""


def junit(*cases: str) -> str:
    """A JUnit file of tests: `name` for one that held, `name failure` or `name skipped` for others."""
    pairs = (case.partition(" ") for case in cases)
    inner = "".join(
        f'<testcase classname="m" name="{name}">{kind and f"<{kind} />"}</testcase>' for name, _, kind in pairs
    )
    return f"<testsuites><testsuite>{inner}</testsuite></testsuites>"


JUNIT = junit("a", "b", "c skipped")


class Checkout:
    """A checkout with CI's script, and fakes of what it calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls_file = folder / "calls"
        self.calls_file.touch()
        self.calls_file.chmod(0o666)
        (folder / "junit.xml").write_text(JUNIT)
        (folder / "reports").mkdir()
        (folder / "cache/0123").mkdir(parents=True)
        (folder / "cache/0123/linux").touch()
        for path, text in ((folder / "run", RUN), (folder / ".venv/bin/python", PYTHON)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        (folder / ".venv/testbed-stamp").touch()
        (folder / ".ci").mkdir()
        shutil.copy(CI, folder / ".ci/run")

    def start(self, **environment: str) -> subprocess.Popen[str]:
        env = {
            "PATH": os.environ["PATH"],
            "CALLS": str(self.calls_file),
            "JUNIT": str(self.folder / "junit.xml"),
            "KERNEL": str(self.folder / "cache/0123/linux"),
            "PYTHON": sys.executable,
            "TMPDIR": str(self.folder),
            "CI_APT": "no-such-apt",
            "CI_DOCKERD": "sh",  # one that there is
        }
        return subprocess.Popen(
            [str(self.folder / ".ci/run")],
            env=env | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def ci(self, **environment: str) -> tuple[int, str]:
        process = self.start(**environment)
        said, _ = process.communicate(timeout=60)
        return process.returncode, said

    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines()


@pytest.fixture
def checkout() -> Iterator[Checkout]:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Checkout(Path(name))


USERS = ["0", "54321"] if os.getuid() == 0 else [str(os.getuid())]


def runs(checkout: Checkout, *words: str) -> list[str]:
    """The calls of `run` that have all those words."""
    return [call for call in checkout.calls() if call.startswith("run ") and set(words) <= set(call.split())]


def test_every_stage_runs_for_everybody_and_all_is_counted(checkout: Checkout) -> None:
    code, said = checkout.ci()
    assert code == 0, said
    for user in USERS:
        assert f"check {user}" in checkout.calls()
        plain = [call for call in runs(checkout, user, "vxlan") if "clab" not in call.split()]
        plain = [call for call in plain if "--full" not in call.split()]
        assert ["guest" in call.split() for call in plain] == [False, True]
        assert len(runs(checkout, user, "wireguard")) == 1
    root = os.getuid() == 0  # who alone can have containers
    # The manifests', each user's, the containers', every row's, the tests': two passed and one skipped in each.
    reports = 4 + 3 * len(USERS) + root + 1 + 1
    alone = 2 + len(USERS) + 1  # packages, style, each user's check, the mutants
    skipped = reports + (not root)
    assert f" {2 * reports + alone} passed, 0 failed, {skipped} skipped in " in said.splitlines()[-1], said


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can start a Docker engine")


@needs_root
def test_containers_run_on_an_engine_of_their_own_that_is_removed(checkout: Checkout) -> None:
    code, said = checkout.ci()
    assert code == 0, said
    [run] = runs(checkout, "vxlan", "clab")
    assert run.startswith("run 0 vxlan vxlan_direct host_gw udp -- --lab clab ")
    calls = checkout.calls()
    up, down = (call for call in calls if call.startswith("engine "))
    assert (up.split()[:2], down.split()[:2]) == (["engine", "up"], ["engine", "down"])
    assert up.split()[2] == down.split()[2], "the same engine"
    assert up.split()[3] == "700", "others' folders are refused"
    assert up.split()[2].startswith(str(checkout.folder)), "CI's own, not the user's"
    [labs] = (call for call in calls if call.startswith("labs down "))
    assert labs.split()[2] == up.split()[2]
    assert calls.index(up) < calls.index(run) < calls.index(labs) < calls.index(down)


@needs_root
def test_containers_that_fail_are_the_exit_code_and_leave_no_engine(checkout: Checkout) -> None:
    code, said = checkout.ci(FAILS_WITH="clab")
    assert code == 1
    assert "FAILED containers: vxlan vxlan_direct host_gw udp: exit 1" in said
    assert [call.split()[1] for call in checkout.calls() if call.startswith("engine ")] == ["up", "down"]
    assert runs(checkout, "tests")


@needs_root
def test_an_engine_that_does_not_start_fails_and_runs_nothing_on_it(checkout: Checkout) -> None:
    code, said = checkout.ci(ENGINE_EXIT="2")
    assert code == 2
    assert "FAILED containers: vxlan vxlan_direct host_gw udp: exit 2" in said
    assert not runs(checkout, "vxlan", "clab")


@needs_root
@pytest.mark.parametrize(
    ("environment", "why"),
    [({"CI_DOCKERD": "no-such-dockerd"}, "no dockerd"), ({"CONTAINERLAB_EXIT": "2"}, "no containerlab")],
)
def test_without_what_containers_need_their_stage_is_skipped_by_name(
    checkout: Checkout, environment: dict[str, str], why: str
) -> None:
    code, said = checkout.ci(**environment)
    assert code == 0, said
    [line] = [line for line in said.splitlines() if line.startswith("SKIPPED containers: vxlan")]
    assert why in line
    assert not runs(checkout, "vxlan", "clab")
    assert not [call for call in checkout.calls() if call.startswith("engine ")]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else, too")
def test_two_guests_run_side_by_side_and_their_output_is_not_mixed(checkout: Checkout) -> None:
    _, said = checkout.ci(SLOW="ipip")
    marks = [call for call in checkout.calls() if call in ("begins", "ends")]
    assert marks == ["begins", "begins", "ends", "ends"]
    lines = said.splitlines()
    for who in ("root", "an ordinary user"):
        start = lines.index(f"===== ipip ipip_direct wireguard ipsec dual_stack as {who}")
        assert lines[start + 1] == "output of ipip"
        assert lines[start + 2].startswith(f"===== ipip ipip_direct wireguard ipsec dual_stack as {who}: exit 0")


def test_a_stage_that_fails_stops_no_other_and_is_the_exit_code(checkout: Checkout) -> None:
    code, said = checkout.ci(FAILS="lint")
    assert code == 1
    assert "FAILED style and types: exit 1" in said
    assert " 1 failed," in said.splitlines()[-1]
    assert runs(checkout, "tests")


@pytest.mark.parametrize(("second", "code"), [("b", 0), ("b failure", 1)])
def test_a_few_tests_that_fail_have_a_second_chance_and_are_named(checkout: Checkout, second: str, code: int) -> None:
    (checkout.folder / "first.xml").write_text(junit("a", "b failure", "c skipped"))
    (checkout.folder / "second.xml").write_text(junit(second))
    files = {name: str(checkout.folder / f"{name.lower()}.xml") for name in ("FIRST", "SECOND")}
    ended, said = checkout.ci(**files)
    assert ended == code, said
    [again] = [call for call in runs(checkout, "tests") if "second.xml" in call]
    assert "--last-failed" in again
    assert ("UNSTEADY tests: m::b" in said) == (code == 0)
    assert f" {code} failed," in said.splitlines()[-1]


def test_many_tests_that_fail_have_no_second_chance(checkout: Checkout) -> None:
    (checkout.folder / "first.xml").write_text(junit(*(f"t{number} failure" for number in range(9))))
    code, said = checkout.ci(FIRST=str(checkout.folder / "first.xml"))
    assert (code, len(runs(checkout, "tests"))) == (1, 1)
    assert " 9 failed," in said.splitlines()[-1]


def test_a_guest_kernel_that_is_late_skips_its_stages_by_name(checkout: Checkout) -> None:
    code, said = checkout.ci(BUILD_SECONDS="100", CI_TOTAL_SECONDS="60", CI_TESTS_SECONDS="59")
    assert code == 0, said
    for name in ("guest: checks", "guest: vxlan host_gw udp", "ipip ipip_direct wireguard ipsec dual_stack"):
        assert f"SKIPPED {name}: the guest kernel was not built in the time that there was" in said
    assert runs(checkout, "tests")
    assert not runs(checkout, "wireguard")


def test_a_guest_kernel_that_cannot_be_built_fails_and_says_why(checkout: Checkout) -> None:
    code, said = checkout.ci(BUILD_EXIT="2")
    assert code == 2
    assert "at net/ipv4" in said, "the build's own words"
    assert "FAILED the guest kernel: exit 2" in said
    assert "SKIPPED guest: checks: there is no guest kernel" in said
    assert runs(checkout, "tests")


def test_an_interrupt_ends_builds_and_stages(checkout: Checkout) -> None:
    seconds = f"45.{os.getpid()}"  # by which it is known
    process = checkout.start(BUILD_SECONDS=seconds, SLOW="lint")
    deadline = time.monotonic() + 20
    while "begins" not in checkout.calls() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 130
    left = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.parent.exists()]
    assert f"sleep\0{seconds}\0".encode() not in left
    assert not runs(checkout, "tests")
