"""VICI: how strongSwan's charon is told of connections and keys; messages are dictionaries of text, lists and more."""

from __future__ import annotations

import select
import socket
from collections.abc import Mapping
from typing import Any

_REQUEST, _RESPONSE, _UNKNOWN, _REGISTER, _UNREGISTER, _CONFIRM, _EVENT = 0, 1, 2, 3, 4, 5, 7
_SECTION, _SECTION_END, _VALUE, _LIST, _ITEM, _LIST_END = 1, 2, 3, 4, 5, 6
_LONGEST = 512 * 1024


class ViciError(Exception):
    """charon cannot be asked, or refused; the text says why. It holds no secret."""


class ViciRefused(ViciError):
    """charon understood, and does not do it."""


def encode(message: Mapping[str, Any]) -> bytes:
    """Pack a message."""
    parts = []
    for name, value in message.items():
        key = _named(name)
        if isinstance(value, Mapping):
            parts.append(bytes([_SECTION]) + key + encode(value) + bytes([_SECTION_END]))
        elif isinstance(value, list | tuple):
            items = b"".join(bytes([_ITEM]) + _valued(item) for item in value)
            parts.append(bytes([_LIST]) + key + items + bytes([_LIST_END]))
        else:
            parts.append(bytes([_VALUE]) + key + _valued(value))
    return b"".join(parts)


def _named(name: str) -> bytes:
    data = name.encode()
    return bytes([len(data)]) + data


def _valued(value: object) -> bytes:
    data = str(value).encode()
    return len(data).to_bytes(2, "big") + data


def decode(data: bytes) -> dict[str, Any]:
    """Unpack a message. Raises ViciError for one that is none."""
    try:
        message, end = _section(data, 0, depth=0)
    except (IndexError, UnicodeDecodeError) as error:
        raise ViciError(f"charon sent a broken message: {error}") from None
    if end != len(data):
        raise ViciError("charon sent a broken message: a section ends too early")
    return message


def _take(data: bytes, start: int, length: int) -> tuple[str, int]:
    if start + length > len(data):
        raise IndexError("it is cut off")
    return data[start : start + length].decode(), start + length


def _section(data: bytes, at: int, depth: int) -> tuple[dict[str, Any], int]:
    if depth > 32:
        raise IndexError("it is nested too deeply")
    found: dict[str, Any] = {}
    while at < len(data):
        kind = data[at]
        if kind == _SECTION_END and depth:
            return found, at + 1
        if kind not in (_SECTION, _VALUE, _LIST):
            raise IndexError(f"element {kind} where none can be")
        name, at = _take(data, at + 2, data[at + 1])
        if kind == _SECTION:
            found[name], at = _section(data, at, depth + 1)
        elif kind == _VALUE:
            found[name], at = _take(data, at + 2, int.from_bytes(data[at : at + 2], "big"))
        else:
            items = []
            while data[at] == _ITEM:
                item, at = _take(data, at + 3, int.from_bytes(data[at + 1 : at + 3], "big"))
                items.append(item)
            if data[at] != _LIST_END:
                raise IndexError("a list without an end")
            found[name], at = items, at + 1
    if depth:
        raise IndexError("a section without an end")
    return found, at


class Vici:
    """One conversation with charon. Seconds of `timeout`. Raises ViciError."""

    def __init__(self, path: str, timeout: float = 10.0) -> None:
        self._events: list[dict[str, Any]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(timeout)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise ViciError(f"cannot reach charon at {path}: {error.strerror or error}") from None

    def fileno(self) -> int:
        """The descriptor to wait for events by."""
        return self._socket.fileno()

    def close(self) -> None:
        """End it."""
        self._socket.close()

    def ask(self, command: str, message: Mapping[str, Any]) -> dict[str, Any]:
        """Have a command done and return what charon says of it."""
        self._send(_REQUEST, command, encode(message))
        kind, body = self._answer(command)
        if kind != _RESPONSE:
            raise ViciError(f"charon answered {command} with a packet of type {kind}")
        said = decode(body)
        if said.get("success", "yes") != "yes":
            raise ViciRefused(f"charon refused {command}: {said.get('errmsg', 'it does not say why')}")
        return said

    def listen(self, event: str) -> None:
        """Hear of an event from now on, see `events`."""
        self._register(_REGISTER, event)

    def events(self) -> list[dict[str, Any]]:
        """What has arrived since it was asked for last. It does not wait, but for the rest of what has begun."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        try:
            while poll.poll(0):
                kind, _ = self._packet()
                if kind != _EVENT:
                    raise ViciError(f"charon sent a packet of type {kind} that nobody asked for")
        except OSError as error:
            raise ViciError(f"charon stopped in the middle of an event: {error.strerror or error}") from None
        found, self._events = self._events, []
        return found

    def stream(self, command: str, event: str, message: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Have a command done that answers with events; returns these."""
        kept, self._events = self._events, []
        self._register(_REGISTER, event)
        self.ask(command, message)
        self._register(_UNREGISTER, event)
        found, self._events = self._events, kept
        return found

    def _register(self, kind: int, event: str) -> None:
        self._send(kind, event, b"")
        confirmed, _ = self._answer(event)
        if confirmed != _CONFIRM:
            raise ViciError(f"charon does not know the event {event}")

    def _send(self, kind: int, name: str, body: bytes) -> None:
        packet = bytes([kind]) + _named(name) + body
        try:
            self._socket.sendall(len(packet).to_bytes(4, "big") + packet)
        except OSError as error:
            raise ViciError(f"charon does not take {name}: {error.strerror or error}") from None

    def _answer(self, name: str) -> tuple[int, bytes]:
        """The next packet that is no event."""
        try:
            kind, body = self._packet()
            while kind == _EVENT:
                kind, body = self._packet()
        except OSError as error:
            raise ViciError(f"charon does not answer {name}: {error.strerror or error}") from None
        if kind == _UNKNOWN:
            raise ViciError(f"charon does not know {name}")
        return kind, body

    def _packet(self) -> tuple[int, bytes]:
        """The next packet; an event is kept."""
        data = self._receive(int.from_bytes(self._receive(4), "big"))
        if not data:
            raise ViciError("charon sent an empty packet")
        if data[0] == _EVENT:
            self._events.append(decode(data[2 + data[1] :] if len(data) > 1 else b""))
        return data[0], data[1:]

    def _receive(self, length: int) -> bytes:
        if length > _LONGEST:
            raise ViciError(f"charon announced a packet of {length} bytes")
        data = b""
        while len(data) < length:
            part = self._socket.recv(length - len(data))
            if not part:
                raise ViciError("charon closed the connection")
            data += part
        return data
