"""The small HTTP client that etcd is spoken to with: every form an answer may have, however it is cut, and bad ones."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from flannel.stores.shorthttp import Answer, BadAnswerError, connect, post

LIB = str(Path(__file__).parent.parent.parent)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
LENGTH = HEAD + b"Content-Length: 12\r\n\r\n{}\n{}\n{}\n{}\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n4;a=b\r\n{}\n{\r\n08\r\n}\n{}\n{}\n\r\n0\r\nX-Trailer: 1\r\n\r\n"
UNTIL_CLOSED = HEAD + b"\r\n{}\n{}\n{}\n{}\n"


def said(program: str) -> str:
    """What a fresh interpreter prints."""
    argv = [sys.executable, "-IS", "-c", f"import sys; sys.path.insert(0, {LIB!r})\n{program}"]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()


@contextmanager
def answered(data: bytes, piece: int = 1 << 16) -> Iterator[Answer]:
    """The answer to what comes from the other end in pieces of so many bytes."""
    near, far = socket.socketpair()
    near.settimeout(10)

    def send() -> None:
        with closing(far), suppress(BrokenPipeError):
            for start in range(0, len(data), piece):
                far.sendall(data[start : start + piece])

    thread = threading.Thread(target=send)
    thread.start()
    try:
        with closing(near), closing(Answer(near)) as answer:
            yield answer
    finally:
        near.close()
        thread.join()


@pytest.mark.parametrize("piece", [1, 3, 1 << 16])
@pytest.mark.parametrize("data", [LENGTH, CHUNKED, UNTIL_CLOSED, b"HTTP/1.1 100 Continue\r\n\r\n" + LENGTH])
def test_whatever_says_where_an_answer_ends(data: bytes, piece: int) -> None:
    with answered(data, piece) as answer:
        assert (answer.status, answer.content_type) == (200, "application/json")
        assert answer.read() == b"{}\n{}\n{}\n{}\n"
        assert answer.read() == b""
    with answered(data, piece) as answer:
        assert [answer.readline() for _ in range(5)] == [b"{}\n"] * 4 + [b""]


def test_a_line_is_given_as_soon_as_it_has_come() -> None:
    """Before its chunk has ended, and before the next one begins."""
    near, far = socket.socketpair()
    with closing(near), closing(far):
        near.settimeout(10)
        far.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{}\n{}")
        with closing(Answer(near)) as answer:
            assert answer.readline() == b"{}\n"
            far.sendall(b"\r\n1\r\n\n")
            assert answer.readline() == b"{}\n"
            near.settimeout(0.05)
            with pytest.raises(TimeoutError):
                answer.readline()


def test_no_more_is_read_than_is_wanted() -> None:
    with answered(HEAD + b"Content-Length: 1000000\r\n\r\n" + bytes(1000000)) as answer:
        assert answer.read(10) == bytes(10)


def test_an_answer_without_a_body() -> None:
    with answered(b"HTTP/1.0 204 No Content\r\n\r\n") as answer:
        assert (answer.status, answer.read()) == (204, b"")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "without an answer"),
        (b"SSH-2.0-x\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 2x0 OK\r\n\r\n", "not HTTP"),
        (b"HTTP/2 200 OK\r\n\r\n", "not HTTP"),
        (HEAD, "without an answer"),
        (HEAD + b"X: y", "broke off"),
        (b"HTTP/1.1 200 " + b"x" * 70000, "broke off"),
        (HEAD + b"X: y\r\n" * 101 + b"\r\n", "too many headers"),
        (HEAD + b"Content-Length: 1_0\r\n\r\n", "length '1_0'"),
        (HEAD + b"Content-Length: -1\r\n\r\n", "length '-1'"),
        (HEAD + b"Transfer-Encoding: gzip\r\n\r\n", "coding 'gzip'"),
        (LENGTH[:-1], "in the middle"),
        (CHUNKED[:-25], "in the middle"),
        (CHUNKED[:-4], "broke off|without an answer"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n-4\r\n{}\n{\r\n", "chunk of size"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n\r\n", "chunk of size"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nfffffffff\r\n", "chunk of size"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}x\r\n", "longer than"),
    ],
)
def test_what_is_no_answer_is_named(data: bytes, why: str) -> None:
    with pytest.raises(BadAnswerError, match=why), answered(data) as answer:
        answer.read()


def test_a_line_without_an_end_takes_no_memory_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flannel.stores.shorthttp._MOST_HELD", 1 << 17)
    for way in ("read", "readline"):
        with (
            answered(HEAD + b"\r\n" + bytes(1 << 19)) as answer,
            pytest.raises(BadAnswerError, match="more than 131072"),
        ):
            getattr(answer, way)(*([1 << 20] if way == "read" else []))


def test_what_is_sent() -> None:
    near, far = socket.socketpair()
    with closing(near), closing(far):
        far.sendall(LENGTH)
        post(near, "[::1]:2379", "/v3/watch", {"Authorization": "token"}, b"{}").close()
        expected = b"POST /v3/watch HTTP/1.1\r\nHost: [::1]:2379\r\nContent-Length: 2\r\nAuthorization: token\r\n\r\n{}"
        assert far.recv(1 << 16) == expected
        for token in ("a\r\nX: y", "ä", "a\0"):
            with pytest.raises(BadAnswerError, match="header"):
                post(near, "h:1", "/", {"Authorization": token}, b"")
        far.setblocking(False)
        with pytest.raises(BlockingIOError):
            far.recv(1)


def test_a_name_that_no_host_can_have_is_an_error_like_any_other() -> None:
    with pytest.raises(OSError, match="name of a host|known|No address|resolution"):
        connect("ä" * 70, 1, 1)


def test_without_tls_nothing_of_it_is_loaded_and_never_the_larger_client() -> None:
    store = "from flannel.stores.etcd_client import EtcdClient, TlsFiles"
    shown = "print([one in sys.modules for one in ('ssl', '_ssl', 'http.client', 'email')])"
    assert said(f"{store}\n{shown}") == "[False, False, False, False]"


def test_an_ascii_name_needs_no_table_of_international_ones() -> None:
    program = """
import socket
from flannel.stores import shorthttp
server = socket.create_server(("127.0.0.1", 0))
for host in ("127.0.0.1", "localhost"):
    shorthttp.connect(host, server.getsockname()[1], 5).close()
print("encodings.idna" in sys.modules)
"""
    assert said(program) == "False"
