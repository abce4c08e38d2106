"""What a service manager is told: systemd's protocol, by a socket's path or by an abstract name."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from flannel.servicemanager import ServiceManager
from tests.flannel.corelab import PYTHON, Node, peer, until

#: Prints each datagram that comes as a line of JSON.
LISTENER = """
import json, socket, sys
name = sys.argv[1]
sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
sock.bind("\\0" + name[1:] if name[0] == "@" else name)
print("ready", flush=True)
while True:
    print(json.dumps(sock.recv(65536).decode()), flush=True)
"""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.close()


class Manager:
    """A service manager inside the node."""

    def __init__(self, node: Node, name: str, output: Path) -> None:
        self._output = output
        self.process: subprocess.Popen[bytes] = node.spawn(PYTHON, "-ISc", LISTENER, name, output=output)
        until(lambda: "ready" in output.read_text(), "the listener")

    def told(self) -> list[str]:
        """Every datagram so far."""
        return [json.loads(line) for line in self._output.read_text().splitlines()[1:]]


@pytest.mark.parametrize("name", ["/run/notify", "@flannel-test/notify"])
def test_a_life_is_told(node: Node, name: str, tmp_path: Path) -> None:
    manager = Manager(node, name, tmp_path / "told")
    daemon = node.start(environment={"NOTIFY_SOCKET": name})
    until(lambda: any("READY=1" in one for one in manager.told()), "READY=1")
    assert manager.told() == [
        "STATUS=waiting for the network configuration",
        "STATUS=starting",
        "READY=1\nSTATUS=running: vxlan, 10.244.1.0/24",
    ]
    daemon.tell(down="no route to host")
    daemon.list(peer(2))
    until(lambda: len(manager.told()) == 5, "the outage and its end")
    assert manager.told()[3:] == [
        "STATUS=the store is away; everything stays as it is",
        "STATUS=running: vxlan, 10.244.1.0/24",
    ]
    assert daemon.stop() == 0
    until(lambda: len(manager.told()) == 6, "the end")
    assert manager.told()[5] == "STOPPING=1\nSTATUS=ending"
    manager.process.kill()
    manager.process.wait()


def test_ready_is_said_when_subnet_env_is_there(node: Node, tmp_path: Path) -> None:
    manager = Manager(node, "/run/notify", tmp_path / "told")
    node.start(environment={"NOTIFY_SOCKET": "/run/notify"}, ready=False)
    until(lambda: any("READY=1" in one for one in manager.told()), "READY=1")
    assert "FLANNEL_MTU=1450" in node.run("cat", "/run/flannel/subnet.env")
    manager.process.kill()
    manager.process.wait()


def test_starting_anew_is_no_end(node: Node, tmp_path: Path) -> None:
    """A manager that is told of an end kills what goes on after a while."""
    manager = Manager(node, "/run/notify", tmp_path / "told")
    node.start(backend={"Type": "alloc"}, environment={"NOTIFY_SOCKET": "/run/notify"})
    node.ip("addr flush dev eth0")
    node.ip("addr add 192.168.50.99/24 dev eth0")
    node.ip("route replace default via 192.168.50.254")
    until(lambda: sum("READY=1" in one for one in manager.told()) == 2, "READY=1 again")
    assert "STATUS=starting anew" in manager.told()
    assert not any("STOPPING=1" in one for one in manager.told())
    manager.process.kill()
    manager.process.wait()


def test_a_manager_that_is_not_there_costs_a_line_of_log(node: Node) -> None:
    daemon = node.start(environment={"NOTIFY_SOCKET": "/run/nobody"})
    assert "cannot tell the service manager" in daemon.log
    assert daemon.stop() == 0


def test_a_status_cannot_hold_another_assignment(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        manager = ServiceManager(path)
        manager.tell("STATUS=a\nREADY=1")
        manager.tell("STATUS=a\nREADY=1")
        sock.setblocking(False)
        assert sock.recv(100) == b"STATUS=a READY=1"
        with pytest.raises(BlockingIOError):  # what is said twice is told once
            sock.recv(100)


def test_without_a_socket_to_tell_it_by_nothing_else_fails(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def none_left(*_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(socket, "socket", none_left)
    ServiceManager("/run/notify").tell("READY=1")
    assert "cannot tell the service manager at NOTIFY_SOCKET: [Errno 24]" in capfd.readouterr().err


def test_without_a_manager_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    before = len(os.listdir("/proc/self/fd"))
    ServiceManager.of_environment().tell("READY=1")
    assert len(os.listdir("/proc/self/fd")) == before
