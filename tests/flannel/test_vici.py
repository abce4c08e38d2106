"""VICI, charon's protocol: its bytes, and a conversation with one who does not keep to it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flannel import vici


def test_a_message_is_packed_as_charon_reads_it() -> None:
    assert vici.encode({"a": "x", "l": ["1", "22"], "s": {"k": "v"}}) == bytes.fromhex(
        "03 01 61 0001 78"  # KEY_VALUE a = x
        "04 01 6c 05 0001 31 05 0002 3232 06"  # LIST l = 1, 22
        "01 01 73 03 01 6b 0001 76 02"  # SECTION s { k = v }
    )


def test_a_message_comes_back() -> None:
    message = {"success": "no", "errmsg": "ä", "list": [], "section": {"inner": {"deep": ["x" * 300]}}, "empty": ""}
    assert vici.decode(vici.encode(message)) == message
    assert vici.decode(b"") == {}


@pytest.mark.parametrize(
    "data",
    [
        "02",
        "03",
        "0301",
        "030161",
        "03016100ff78",
        "0101 61",
        "04016c",
        "04016c05",
        "04016c0500013107",
        "09",
        "030161000180",
    ],
)
def test_a_broken_message_is_an_error(data: str) -> None:
    with pytest.raises(vici.ViciError):
        vici.decode(bytes.fromhex(data))


@given(st.binary(max_size=300))
@settings(max_examples=200)
def test_no_bytes_break_the_reader(data: bytes) -> None:
    with contextlib.suppress(vici.ViciError):
        vici.decode(data)


def test_deep_nesting_is_an_error_not_a_crash() -> None:
    with pytest.raises(vici.ViciError, match="deeply"):
        vici.decode(b"\x01\x01a" * 5000)


def packet(kind: int, name: str = "", message: dict[str, Any] | None = None) -> bytes:
    named = bytes([len(name)]) + name.encode() if name else b""
    body = bytes([kind]) + named + (vici.encode(message) if message else b"")
    return len(body).to_bytes(4, "big") + body


@contextlib.contextmanager
def charon(folder: Path, *answers: bytes, stays: bool = False) -> Iterator[tuple[vici.Vici, list[bytes]]]:
    """A conversation with one who answers each packet with the next of these, and then hangs up unless it stays."""
    heard: list[bytes] = []
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "vici"))
        server.listen()

        def serve() -> None:
            peer, _ = server.accept()
            with peer:
                for answer in answers:
                    heard.append(peer.recv(int.from_bytes(peer.recv(4, socket.MSG_WAITALL), "big"), socket.MSG_WAITALL))
                    peer.sendall(answer)
                if stays:
                    peer.recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        talk = vici.Vici(str(folder / "vici"), 5)
        yield talk, heard
        talk.close()
        thread.join()


RESPONSE, UNKNOWN, CONFIRM, EVENT = 1, 2, 5, 7


def test_events_between_answers_are_kept_and_a_stream_is_its_own(tmp_path: Path) -> None:
    up = packet(EVENT, "child-updown", {"up": "yes"})
    answers = (
        packet(CONFIRM) + up,
        up + packet(RESPONSE, message={"success": "yes"}),
        packet(CONFIRM),
        packet(EVENT, "list-sa", {"a": {"k": "1"}}) + packet(EVENT, "list-sa", {"b": {}}) + packet(RESPONSE),
        packet(CONFIRM),
    )
    with charon(tmp_path, *answers, stays=True) as (talk, heard):
        talk.listen("child-updown")
        assert talk.ask("load-conn", {"x": "y"}) == {"success": "yes"}
        assert talk.stream("list-sas", "list-sa", {}) == [{"a": {"k": "1"}}, {"b": {}}]
        assert talk.events() == [{"up": "yes"}, {"up": "yes"}]
    assert heard == [
        b"\x03\x0cchild-updown",
        b"\x00\x09load-conn\x03\x01x\x00\x01y",
        b"\x03\x07list-sa",
        b"\x00\x08list-sas",
        b"\x04\x07list-sa",
    ]


@pytest.mark.parametrize(
    "answer",
    [
        packet(UNKNOWN),
        packet(CONFIRM),
        packet(RESPONSE, message={"success": "no", "errmsg": "why"}),
        (0).to_bytes(4, "big"),
        (1 << 30).to_bytes(4, "big"),
        packet(RESPONSE)[:3],
        packet(EVENT, "e", {"a": "b"})[:-2],
        b"",
    ],
)
def test_an_answer_that_is_none_is_an_error(tmp_path: Path, answer: bytes) -> None:
    with charon(tmp_path, answer) as (talk, _), pytest.raises(vici.ViciError):
        talk.ask("stats", {})
