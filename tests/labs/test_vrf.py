"""Commands whose sockets are in a VRF, and leaves that route in one."""

from __future__ import annotations

import errno
import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest

from testbed.deadline import Deadline
from testbed.doctor import probe_features
from testbed.errors import LabError
from testbed.labs import interpreter, netns
from testbed.labs.fabric import wait_converged
from testbed.labs.netns import NetnsLab
from testbed.labs.netnsnode import NetnsNode
from testbed.labs.plan import VRF_EXEC
from testbed.nodes.deploy import with_pods
from testbed.topology import load_topology
from tests.labs.helpers import unique

TOPOLOGY = """\
mtu: 1500
spines: 2
outside: 203.0.113.8
leaf_vrf: fabric
racks:
  - {leaf: leaf1, subnet: 10.1.0.0/24, nodes: [master1]}
  - {leaf: leaf2, subnet: 10.2.0.0/24, nodes: [worker1]}
"""

#: Prints which device each kind of socket is bound to, and whether a program that is started inherits it.
SOCKETS = """
import json, socket as s
def device(x): return x.getsockopt(s.SOL_SOCKET, s.SO_BINDTODEVICE, 16).rstrip(b"\\0").decode()
kinds = {"tcp": (s.AF_INET, s.SOCK_STREAM), "udp6": (s.AF_INET6, s.SOCK_DGRAM), "unix": (s.AF_UNIX, s.SOCK_STREAM)}
found = {name: s.socket(*kind) for name, kind in kinds.items()}
waiting = s.socket(s.AF_INET, s.SOCK_STREAM | s.SOCK_NONBLOCK)
try:
    s.socket(s.AF_INET, s.SOCK_STREAM, 250)
    error = 0
except OSError as failed:
    error = failed.errno
print(json.dumps({"devices": {name: device(x) for name, x in found.items()}, "error": error,
    "inherited": [x.get_inheritable() for x in found.values()], "blocking": waiting.getblocking()}))
"""


#: Makes sockets until it may have no more.
UNTIL_FULL = """
import resource, socket
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
kept = []
try:
    while True:
        kept.append(socket.socket())
except OSError as error:
    print(error.errno)
"""


@pytest.fixture
def bound(lab: NetnsLab) -> NetnsNode:
    """A leaf whose commands' sockets are bound to a device: any does where the kernel has no VRFs."""
    leaf = lab.node("leaf1")
    leaf.write(VRF_EXEC, resources.files("testbed.labs").joinpath("vrfexec.py").read_bytes())
    return replace(leaf, via=(interpreter(), "-I", "-S", VRF_EXEC, "br0"))


def helpers(node: NetnsNode) -> bool:
    return node.run(["pgrep", "-f", VRF_EXEC], check=False).ok


def test_ip_sockets_are_bound_also_those_of_children_and_others_are_as_ever(bound: NetnsNode, lab: NetnsLab) -> None:
    program = [interpreter(), "-I", "-S", "-c", SOCKETS]
    found = json.loads(bound.run(["sh", "-c", '"$@"; exit $?', "sh", *program]).stdout)
    plain = json.loads(lab.node("leaf1").run(program).stdout)
    assert found["devices"] == {"tcp": "br0", "udp6": "br0", "unix": ""}
    assert plain["devices"] == {"tcp": "", "udp6": "", "unix": ""}
    assert {**found, "devices": {}} == {**plain, "devices": {}}
    assert found["error"] != 0


def test_a_bound_command_reaches_what_is_behind_its_device_only(bound: NetnsNode, lab: NetnsLab) -> None:
    ping = ["ping", "-c", "1", "-W", "1"]
    assert bound.run([*ping, str(lab.node("worker1").spec.ip)]).ok
    outside = str(lab.node("outside").spec.ip)
    wait_converged(lab)
    assert lab.node("leaf1").run([*ping, outside]).ok
    assert not bound.run([*ping, outside], check=False).ok


def test_exit_codes_signals_input_and_output_are_the_command_s(bound: NetnsNode) -> None:
    assert bound.run(["sh", "-c", "cat; echo err >&2; exit 7"], check=False, stdin="in").stderr == "err\n"
    assert bound.run(["sh", "-c", "cat; exit 7"], check=False, stdin="in").stdout == "in"
    assert bound.run(["sh", "-c", "exit 7"], check=False).rc == 7
    assert bound.run(["sh", "-c", "kill -9 $$"], check=False).rc in (-signal.SIGKILL, 128 + signal.SIGKILL)
    missing = bound.run(["no-such-program"], check=False)
    assert (missing.rc, missing.stderr) == (127, "no-such-program: No such file or directory\n")


def test_who_may_have_no_more_sockets_is_told_so(bound: NetnsNode) -> None:
    done = bound.run([interpreter(), "-I", "-S", "-c", UNTIL_FULL], timeout=10)
    assert int(done.stdout) == errno.EMFILE


def test_a_vrf_that_is_not_there_is_told(bound: NetnsNode) -> None:
    done = replace(bound, via=(*bound.via[:-1], "red")).run(["true"], check=False)
    assert (done.rc, done.stderr) == (1, "there is no VRF red\n")


def test_the_helper_ends_with_the_last_that_could_ask(bound: NetnsNode, lab: NetnsLab) -> None:
    leaf = lab.node("leaf1")
    bound.run(["sh", "-c", "sleep 60 >/dev/null 2>&1 & echo $! >/run/sleep.pid"])
    assert helpers(leaf)
    leaf.run(["sh", "-c", 'kill "$(cat /run/sleep.pid)"'])
    assert Deadline(5).poll(lambda: not helpers(leaf) or None), "a helper lives on"


def test_a_machine_without_a_vrf_is_itself(lab: NetnsLab) -> None:
    assert lab.node("leaf1").in_vrf() is lab.node("leaf1")


def load(folder: Path) -> NetnsLab:
    (folder / "lab.yml").write_text(TOPOLOGY)
    return netns.bring_up(load_topology(str(folder / "lab.yml"), unique("vrf")))


def test_a_kernel_without_vrfs_says_so(tmp_path: Path) -> None:
    if probe_features()["vrf"]["ok"]:
        pytest.skip("this kernel has VRFs")
    with pytest.raises(LabError, match=r"no vrf, which leaves are to have(.|\n)*--kernel guest"):
        load(tmp_path)


@pytest.fixture(scope="module")
def fabric(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NetnsLab]:
    if not probe_features()["vrf"]["ok"]:
        pytest.skip("this machine's kernel has no VRFs")
    lab = load(tmp_path_factory.mktemp("fabric"))
    wait_converged(lab)
    yield lab
    lab.down()


def test_in_the_fabric_routing_is_in_the_vrf_alone(fabric: NetnsLab) -> None:
    assert fabric.node("master1").run(["ping", "-c", "1", "-W", "2", str(fabric.node("worker1").spec.ip)]).ok
    for leaf in ("leaf1", "leaf2"):
        node = fabric.node(leaf)
        assert node.run(["ip", "-4", "route", "show"]).stdout == ""
        routes = json.loads(node.run(["ip", "-j", "-4", "route", "show", "vrf", "fabric"]).stdout)
        far = "10.2.0.0/24" if leaf == "leaf1" else "10.1.0.0/24"
        assert [len(route["nexthops"]) for route in routes if route["dst"] == far] == [2]
    assert fabric.node("spine1").in_vrf() is fabric.node("spine1")


def test_commands_in_the_vrf_reach_the_fabric_and_others_do_not(fabric: NetnsLab) -> None:
    ping = ["ping", "-c", "1", "-W", "2", str(fabric.node("worker1").spec.ip)]
    leaf = fabric.node("leaf1")
    assert leaf.in_vrf().run(ping).where == "leaf1/fabric"
    assert not leaf.run(ping, check=False).ok
    assert with_pods(fabric)["leaf1/fabric"].run(ping).ok


def test_the_fabric_goes_round_a_link_that_is_down(fabric: NetnsLab) -> None:
    with fabric.fault("leaf1-spine1", down=True):
        assert fabric.node("master1").run(["ping", "-c", "2", "-W", "2", str(fabric.node("worker1").spec.ip)]).ok
