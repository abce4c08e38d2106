"""Commands for labs of containers that are killed at random moments leave nothing that `testbed down --all` does not
remove, and touch nothing of anybody else's.

A few kills by default; the soak makes 50 of them (TESTBED_CLAB_KILLS).
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.deadline import Deadline
from testbed.engine import private
from testbed.engine.find import find_engine
from testbed.images import store
from tests.engines import engine_state, using
from tests.labs.helpers import unique

KILLS = int(os.environ.get("TESTBED_CLAB_KILLS", "3"))
SEED = int(os.environ.get("TESTBED_SEED", "0")) or random.SystemRandom().randrange(1 << 32)
CGROUPS = Path("/sys/fs/cgroup")


@pytest.fixture(scope="module")
def engine() -> Iterator[Path]:
    with engine_state() as folder, using(folder):
        client = find_engine().client
        tag = store.ensure(client, store.kind_of("host"))
        client.containers.run(
            tag, ["sleep", "infinity"], name="somebodys", network_mode="none", volumes=["/usr:/usr:ro"], detach=True
        )
        yield folder


def present(folder: Path) -> set[str]:
    """All that labs might leave: containers, networks, links, rules, mounts of namespaces, cgroups, files."""
    engine = private.running()
    assert engine
    client = find_engine().client
    found = {f"container {one.name} {one.status}" for one in client.containers.list(all=True)}
    found |= {f"network {one.name}" for one in client.networks.list()}
    for argv in (["ip", "-o", "link"], ["ls", "/run/netns"], ["iptables", "-S"], ["nft", "list", "tables"]):
        done = subprocess.run([*engine.entering(), *argv], capture_output=True, text=True, check=False)
        found |= {f"{argv[0]}: {line.split(' mtu ')[0]}" for line in done.stdout.splitlines()}
    groups = [path for root in CGROUPS.glob("*") for path in (root / engine.cgroup.lstrip("/")).glob("*/")]
    groups += (CGROUPS / engine.cgroup.lstrip("/")).glob("*/")
    found |= {f"cgroup {path}" for path in groups}
    return found | {f"file {path}" for path in folder.rglob("*") if folder / "engine" not in (path, *path.parents)}


def succeed(*argv: str) -> None:
    """Run a command that has to succeed."""
    done = subprocess.run([sys.executable, "-m", "testbed", *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"testbed {' '.join(argv)}: {done.returncode}\n{done.stdout}{done.stderr}"


def kill_after(seconds: float, *argv: str) -> bool:
    """Run a command and kill it after so many seconds; whether it had not ended before."""
    words = [sys.executable, "-m", "testbed", *argv]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return True
    return False


def test_killed_commands_leave_nothing(engine: Path) -> None:
    dice = random.Random(SEED)
    print(f"TESTBED_SEED={SEED}")
    before, killed = present(engine), 0
    assert any("somebodys running" in line for line in before)
    for number in range(KILLS):
        name = unique("soak")
        up = ("up", "flat", "--backend", "host_gw", "--lab", "clab", "--name", name)
        down = ("down", "--name", name)
        what = up if number % 3 else down
        if what is down:
            succeed(*up)
        moment = dice.uniform(0.3, 8 if what is up else 2)
        killed += kill_after(moment, *what)
        succeed("down", "--all")
        # The engine takes a moment to let go of what a removed container was made of.
        clean = Deadline(20).poll(lambda: present(engine) == before or None)
        assert clean, f"killing {what[0]} ({number}) after {moment:.2f} s: {sorted(present(engine) ^ before)}"
    assert killed, "nothing was killed: the moments are badly chosen"
