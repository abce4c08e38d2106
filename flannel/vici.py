"""VICI: how strongSwan's charon is told of connections and keys; messages are dictionaries of text, lists and more."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

_REQUEST, _RESPONSE, _UNKNOWN = 0, 1, 2
_SECTION, _SECTION_END, _VALUE, _LIST, _ITEM, _LIST_END = 1, 2, 3, 4, 5, 6
_LONGEST = 512 * 1024


class ViciError(Exception):
    """charon cannot be asked, or refused; the text says why. It holds no secret."""


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
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(timeout)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise ViciError(f"cannot reach charon at {path}: {error.strerror or error}") from None

    def close(self) -> None:
        """End it."""
        self._socket.close()

    def ask(self, command: str, message: Mapping[str, Any]) -> dict[str, Any]:
        """Have a command done and return what charon says of it."""
        packet = bytes([_REQUEST]) + _named(command) + encode(message)
        try:
            self._socket.sendall(len(packet).to_bytes(4, "big") + packet)
            answer = self._receive(int.from_bytes(self._receive(4), "big"))
        except OSError as error:
            raise ViciError(f"charon does not answer {command}: {error.strerror or error}") from None
        if not answer or answer[0] == _UNKNOWN:
            raise ViciError(f"charon does not know {command}")
        if answer[0] != _RESPONSE:
            raise ViciError(f"charon answered {command} with a packet of type {answer[0]}")
        said = decode(answer[1:])
        if said.get("success", "yes") != "yes":
            raise ViciError(f"charon refused {command}: {said.get('errmsg', 'it does not say why')}")
        return said

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
