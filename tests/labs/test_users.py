"""The same lab for root, for root of a user namespace, and for an ordinary user."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.labs.helpers import unique

CHECKOUT = Path(__file__).parents[2]

UP = """
import sys
from testbed.labs import netns
from testbed.topology import load_topology
lab = netns.bring_up(load_topology("flat", sys.argv[1]))
try:
    print(lab.node("worker1").run(["id", "-u"]).stdout, lab.node("worker1").run(["iptables", "-S"]).rc)
    print(lab.node("worker1").run(["ping", "-c", "1", str(lab.node("worker2").spec.ip)]).rc)
finally:
    lab.down()
"""

ORDINARY_UID = "54322"

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")


def up_as(prefix: list[str], name: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Bring a lab up and down behind a prefix that changes who one is."""
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(CHECKOUT), "HOME": str(tmp_path)}
    argv = [*prefix, sys.executable, "-c", UP, unique(name)]
    return subprocess.run(argv, env=env, capture_output=True, text=True, check=False, timeout=120, cwd="/")


@needs_root
def test_an_ordinary_user(tmp_path: Path) -> None:
    prefix = ["setpriv", "--reuid", ORDINARY_UID, "--regid", ORDINARY_UID, "--clear-groups", "--inh-caps=-all"]
    done = up_as(prefix, "user", tmp_path)
    Path(f"/tmp/testbed-{ORDINARY_UID}").rmdir()
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "0", "0"]


def test_root_of_a_user_namespace(tmp_path: Path) -> None:
    state = tmp_path / "state"
    done = up_as(["unshare", "-Ur", "env", f"TESTBED_STATE={state}"], "userns", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "0", "0"]


def test_no_right_to_make_namespaces_is_an_error_that_says_so(tmp_path: Path) -> None:
    forbid = 'echo 0 >/proc/sys/user/max_user_namespaces; exec "$@"'
    state = tmp_path / "state"
    prefix = ["unshare", "-Ur", "env", f"TESTBED_STATE={state}", "sh", "-c", forbid, "sh"]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(CHECKOUT), "HOME": str(tmp_path)}
    argv = [*prefix, sys.executable, "-m", "testbed", "up", "flat", "--name", unique("forbidden")]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False, timeout=120, cwd="/")
    assert done.returncode == 2, done.stderr
    assert "the lab could not be made: unshare" in done.stderr
    assert "hint: `testbed doctor` says what is missing" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(state.glob("*"))
