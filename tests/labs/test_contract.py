"""What every lab kind has to do; the suites rely on nothing else."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace

import pytest

from testbed.deadline import Deadline
from testbed.engine.find import FAR
from testbed.errors import CommandError, LabError
from testbed.labs import kinds, state
from testbed.labs.base import TIMED_OUT, Lab
from testbed.labs.farnode import FarNode
from testbed.labs.kinds import AnyLab
from testbed.topology import load_topology
from tests.labs.helpers import unique


@pytest.fixture(scope="module", params=["entered", "settled", "far"])
def lab(request: pytest.FixtureRequest, kind: str) -> Iterator[AnyLab]:
    """A lab of each kind; commands are run in it in every way that there is."""
    way: str = request.param
    if way == "far" and kind == "netns":
        pytest.skip("network namespaces are never elsewhere")
    with pytest.MonkeyPatch.context() as patch:
        if way == "far":
            patch.setenv(FAR, "1")
        made = kinds.bring_up(kind, load_topology("flat", unique("shared")))
        if way == "settled":
            made.settle(made.nodes)
        yield made
        made.down()


def test_a_command_returns_its_output_and_exit_code(lab: Lab) -> None:
    done = lab.node("worker1").run(["sh", "-c", "echo out; echo err >&2; exit 7"], check=False)
    assert (done.rc, done.stdout, done.stderr, done.where) == (7, "out\n", "err\n", "worker1")


def test_a_failing_command_raises_with_what_it_said(lab: Lab) -> None:
    with pytest.raises(CommandError, match=r"worker1: `ip link show nothing` exited 1\nDevice .* does not exist"):
        lab.node("worker1").run(["ip", "link", "show", "nothing"])


def test_a_command_that_is_not_there_raises(lab: Lab) -> None:
    with pytest.raises(CommandError, match="no-such-program"):
        lab.node("worker1").run(["no-such-program"])


def test_arguments_are_never_words_of_a_shell(lab: Lab) -> None:
    text = "$(id) `id` 'x' \"y\" ; \n * \\"
    assert lab.node("worker1").run(["printf", "%s", text]).stdout == text


def test_a_big_output_arrives_whole(lab: Lab) -> None:
    done = lab.node("worker1").run(["sh", "-c", "head -c 5000000 /dev/zero | tr '\\0' x"])
    assert len(done.stdout) == 5_000_000


def test_standard_input_arrives(lab: Lab) -> None:
    data = "line\n" * 100_000
    assert lab.node("worker1").run(["wc", "-c"], stdin=data).stdout.strip() == str(len(data))


def test_a_signal_that_ended_a_command_is_seen(lab: Lab) -> None:
    done = lab.node("worker1").run(["sh", "-c", "kill -9 $$"], check=False)
    assert done.rc in (-signal.SIGKILL, 128 + signal.SIGKILL)


def test_a_command_that_takes_too_long_is_killed_where_it_runs(lab: Lab) -> None:
    node = lab.node("worker1")
    done = node.run(["sleep", "7391"], check=False, timeout=0.3)
    assert done.rc == TIMED_OUT
    gone = Deadline(5).poll(lambda: not node.run(["pgrep", "-f", "sleep 7391"], check=False).ok)
    assert gone, "the command lives on in the lab"


def test_binary_files_go_in_and_out(lab: Lab) -> None:
    data = bytes(range(256)) * 1000
    node = lab.node("worker1")
    node.write("/var/lib/some/where/file", data, mode=0o750)
    assert node.read("/var/lib/some/where/file") == data
    assert node.run(["stat", "-c", "%a", "/var/lib/some/where/file"]).stdout.strip() == "750"


def test_a_missing_file_is_a_file_not_found(lab: Lab) -> None:
    with pytest.raises(FileNotFoundError, match="worker1:/nowhere"):
        lab.node("worker1").read("/nowhere")


def test_nodes_have_files_names_and_processes_of_their_own(lab: Lab) -> None:
    lab.node("worker1").write("/run/flannel/subnet.env", "mine")
    with pytest.raises(FileNotFoundError):
        lab.node("worker2").read("/run/flannel/subnet.env")
    names = [lab.node(name).run(["hostname"]).stdout.strip() for name in ("worker1", "worker2")]
    assert names == ["worker1", "worker2"]
    seen = lab.node("worker1").run(["ps", "-e", "-o", "pid="]).stdout.split()
    assert "1" in seen
    assert len(seen) < 10


def test_a_daemon_outlives_its_command_and_is_found_by_its_pid(lab: Lab) -> None:
    node = lab.node("worker2")
    pid = node.start(["sh", "-c", "echo started; exec sleep 60"], name="daemon", env={"WORD": "x"})
    assert node.read("/run/daemon.pid").decode().strip() == str(pid)
    assert Deadline(5).poll(lambda: node.read("/var/log/daemon.log") == b"started\n")
    # Until the shell has become `sleep` it has no environment that could be read.
    assert Deadline(5).poll(lambda: b"WORD=x" in node.read(f"/proc/{pid}/environ").split(b"\0"))
    node.run(["kill", str(pid)])
    gone = Deadline(5).poll(lambda: not node.run(["test", "-e", f"/proc/{pid}"], check=False).ok)
    assert gone, "nobody waits for dead children on a node"


def test_a_spawned_command_keeps_the_files_it_is_given(lab: Lab) -> None:
    reading, writing = os.pipe()
    process = lab.node("worker1").spawn(["bash", "-c", f"echo through >&{writing}"], pass_fds=[writing])
    os.close(writing)
    with os.fdopen(reading) as file:
        assert file.read() == "through\n"
    assert process.wait(10) == 0


def test_a_place_in_a_network_namespace_sees_that_network_and_the_nodes_files(lab: Lab) -> None:
    node = lab.node("worker1")
    node.run(["ip", "netns", "add", "inner"])
    place = node.netns("/run/netns/inner", "worker1/inner")
    assert "eth0" not in place.run(["ip", "-br", "link"]).stdout
    assert place.run(["hostname"]).stdout.strip() == "worker1"
    node.run(["ip", "netns", "delete", "inner"])


def test_nodes_reach_each_other_and_only_each_other(lab: Lab) -> None:
    node = lab.node("worker1")
    assert node.run(["ping", "-c", "1", "-W", "2", str(lab.node("worker2").spec.ip)]).ok
    links = {line.split()[0].partition("@")[0] for line in node.run(["ip", "-br", "link"]).stdout.splitlines()}
    assert links == {"lo", "eth0"}


def test_a_link_that_is_down_is_up_again_after_the_block(lab: AnyLab) -> None:
    node, other = lab.node("worker1"), str(lab.node("worker2").spec.ip)
    link = next(link for link in lab.spec.links if "worker1" in (link.a.node, link.b.node))
    with lab.fault(link.name, down=True):
        assert not node.run(["ping", "-c", "1", "-W", "1", other], check=False).ok
    assert node.run(["ping", "-c", "3", "-W", "2", other], check=False).ok


def test_a_machine_that_starts_anew_loses_what_a_machine_loses_and_nothing_else(lab: AnyLab) -> None:
    if isinstance(lab.node("worker2"), FarNode):
        with pytest.raises(LabError, match="cannot start anew"):
            lab.restart("worker2")
        return
    node = lab.node("worker2")
    node.write("/var/lib/kept", "on the disk")
    node.write("/run/lost", "in memory")
    node.run(["ip", "netns", "add", "lost"])
    node.run(["ip", "link", "add", "lost0", "type", "bridge"])
    node.start(["sleep", "7392"], name="lost")
    before = node.run(["ip", "-br", "address", "show", "dev", "eth0"]).stdout
    lab.restart("worker2")
    node = lab.node("worker2")
    assert node.read("/var/lib/kept") == b"on the disk"
    assert not node.run(["pgrep", "-f", "sleep 7392"], check=False).ok
    assert not node.run(["ls", "/run/lost", "/run/netns/lost"], check=False).stdout
    links = node.run(["ip", "-br", "address"]).stdout
    assert before in links
    assert "lost0" not in links
    other = lab.node("worker1")
    ping = ["ping", "-c", "1", "-W", "1", str(node.spec.ip)]
    assert Deadline(10).poll(lambda: other.run(ping, check=False).ok), "its neighbours do not reach it"
    assert node.run(["hostname"]).stdout == "worker2\n"


def test_a_router_that_starts_anew_routes_again(lab: AnyLab) -> None:
    if isinstance(lab.node("leaf1"), FarNode):
        pytest.skip("its engine is elsewhere")
    lab.restart("leaf1")
    outside = str(lab.spec.outside.ip)
    ping = ["ping", "-c", "1", "-W", "1", outside]
    assert Deadline(20).poll(lambda: lab.node("worker1").run(ping, check=False).ok), "no route beyond the leaf"


def test_a_lab_is_found_again_by_its_name(lab: AnyLab) -> None:
    found = kinds.open_lab(lab.spec.id)
    lab.node("worker1").write("/run/word", "of mine")
    assert found.node("worker1").read("/run/word") == b"of mine"


def test_a_lab_that_is_up_is_not_brought_up_again(lab: AnyLab) -> None:
    with pytest.raises(LabError, match=f"lab {lab.spec.id} is already up"):
        kinds.bring_up(lab.kind, lab.spec)
    assert lab.node("worker1").run(["true"]).ok


def test_two_labs_have_the_same_addresses_and_nothing_else_in_common(lab: AnyLab) -> None:
    other = kinds.bring_up(lab.kind, replace(lab.spec, id=unique("beside")))
    try:
        for each in (lab, other):
            each.node("worker1").write("/run/who", each.spec.id)
            assert each.node("worker1").run(["ping", "-c", "1", "-W", "2", str(lab.node("worker2").spec.ip)]).ok
        assert [one.node("worker1").read("/run/who").decode() for one in (lab, other)] == [lab.spec.id, other.spec.id]
    finally:
        other.down()
    assert state.read_record(other.spec.id) is None
    assert lab.node("worker1").run(["ping", "-c", "1", "-W", "2", str(lab.node("worker2").spec.ip)]).ok
