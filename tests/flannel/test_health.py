"""The health endpoint among clients that are slow, many, or gone."""

from __future__ import annotations

import contextlib
import http.client
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flannel.health import HealthError, HealthServer

CROWD = 1000


@pytest.fixture
def server() -> HealthServer:
    return HealthServer("127.0.0.1", 0)


def ask(server: HealthServer, path: str = "/healthz") -> tuple[int, str, float]:
    """Status, body, and how many seconds they took."""
    began = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), time.monotonic() - began


def connect(server: HealthServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=10)


def test_it_says_what_upstream_says(server: HealthServer) -> None:
    assert ask(server)[:2] == (200, "flanneld is running")
    assert ask(server, "/readyz")[:2] == (503, "flanneld is not ready yet")
    server.ready = True
    assert ask(server, "/readyz")[:2] == (200, "flanneld is ready")


def test_a_client_that_dribbles_holds_up_nobody_and_is_answered(server: HealthServer) -> None:
    with connect(server) as slow:
        for octet in b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r":
            slow.send(bytes([octet]))
        assert ask(server)[2] < 1
        slow.send(b"\n")
        assert b"200 OK" in slow.recv(4096)


def test_a_client_that_says_nothing_is_sent_away(server: HealthServer) -> None:
    with connect(server) as silent:
        assert silent.recv(1) == b""


def test_a_thousand_slow_clients_hold_up_nobody(server: HealthServer) -> None:
    """Kubernetes would kill a flanneld that does not answer its probe."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2 * CROWD + 200 and hard != resource.RLIM_INFINITY:
        pytest.skip(f"no more than {hard} open files are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * CROWD + 200), hard))
    try:
        crowd = []
        for number in range(CROWD):
            crowd.append(connect(server))
            with contextlib.suppress(OSError):
                crowd[-1].send(b"GET /")
            if number % 100 == 0:
                status, _, seconds = ask(server)
                assert status == 200
                assert seconds < 2, number
        assert ask(server)[0] == 200
        for client in crowd:
            client.close()
        assert ask(server)[0] == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


SERVER = """
import sys
sys.path.insert(0, sys.argv[1])
from flannel.health import HealthServer
print(HealthServer("127.0.0.1", 0).port, flush=True)
sys.stdin.read()
"""


def test_a_client_that_loses_its_place_as_it_speaks_ends_nobody() -> None:
    """The server finds a newcomer, and then a word of the one who had to make room, in one look."""
    argv = [sys.executable, "-IS", "-c", SERVER, str(Path(__file__).parents[2])]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        address = ("127.0.0.1", int(process.stdout.readline()))
        try:
            crowd = [socket.create_connection(address, timeout=5) for _ in range(64)]
            crowd[-1].sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
            assert crowd.pop().recv(99)  # so all of them have been let in
            crowd.append(socket.create_connection(address, timeout=5))
            crowd[-1].sendall(b"x")
            process.send_signal(signal.SIGSTOP)
            newcomer = socket.create_connection(address, timeout=5)
            for client in crowd:
                client.sendall(b"x")
            process.send_signal(signal.SIGCONT)
            newcomer.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
            assert newcomer.recv(99).startswith(b"HTTP/1.1 200 ")
        finally:
            process.kill()


def test_clients_that_come_and_go_at_the_same_moment_hold_up_nobody(server: HealthServer) -> None:
    ended = threading.Event()

    def come_and_go() -> None:
        while not ended.is_set():
            crowd = []
            with contextlib.suppress(OSError):
                for _ in range(80):
                    crowd.append(connect(server))
                    crowd[-1].send(b"x")
            for client in crowd:
                client.close()

    threads = [threading.Thread(target=come_and_go, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        assert all(ask(server)[0] == 200 for _ in range(50))
    finally:
        ended.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("data", [b"\r\n\r\n", b"x" * 9000, b"\xff\xfe /\r\n\r\n", b"GET /healthz\r\n\r\n"])
def test_what_is_no_request_is_refused(server: HealthServer, data: bytes) -> None:
    with connect(server) as client:
        client.sendall(data)
        with contextlib.suppress(ConnectionResetError):  # more was sent than was read
            assert client.recv(4096).startswith(b"HTTP/1.1 400 ")
    assert ask(server)[0] == 200


def test_a_port_that_is_taken_is_named(server: HealthServer) -> None:
    with pytest.raises(HealthError, match=f"127.0.0.1 port {server.port}"):
        HealthServer("127.0.0.1", server.port)
