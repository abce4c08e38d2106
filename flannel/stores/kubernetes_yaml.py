"""The part of YAML that kubeconfig files are written in, strictly: what lies beyond it is refused with its line."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

_FALSE_FRIENDS = "&*!%@`"  # anchors, aliases, tags, directives and reserved marks
_DEEPEST = 40
_BLANKS = " \t\r"


class YamlError(ValueError):
    """The text is not of the part of YAML that is read here; the text names the line."""


class _Line(NamedTuple):
    number: int
    indent: int
    text: str


def read(text: str) -> Any:
    """Return mappings as dict, sequences as list, scalars as str, bool or None (numbers stay text). Raises YamlError.

    JSON is YAML, and read as JSON.
    """
    if text.lstrip("\n" + _BLANKS).startswith("{"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise YamlError(f"it is not JSON: {error}") from None
    return _Reader(text).document()


class _Reader:
    def __init__(self, text: str) -> None:
        self._raw = text.split("\n")
        self._at = 0  # index into _raw of the next line

    def document(self) -> Any:
        line = self._peek()
        if line is not None and line.text == "---":
            self._at = line.number
            line = self._peek()
        if line is None:
            return None
        value = self._block(line.indent, 0)
        line = self._peek()
        if line is not None:
            raise YamlError(f"line {line.number}: {_shown(line.text)} does not belong to what stands above it")
        return value

    def _peek(self) -> _Line | None:
        """Return the next line that is neither empty nor a comment."""
        while self._at < len(self._raw):
            raw = self._raw[self._at].rstrip(_BLANKS)
            body = raw.lstrip(" ")
            if body and not body.startswith("#"):
                if body.startswith("\t"):
                    raise YamlError(f"line {self._at + 1}: a tab where spaces have to be")
                return _Line(self._at + 1, len(raw) - len(body), body)
            self._at += 1
        return None

    def _block(self, indent: int, depth: int) -> Any:
        if depth > _DEEPEST:
            raise YamlError(f"line {self._at + 1}: nested too deeply")
        line = self._peek()
        assert line is not None
        if line.text == "-" or line.text.startswith("- "):
            return self._sequence(indent, depth)
        return self._mapping(indent, depth)

    def _sequence(self, indent: int, depth: int) -> list[Any]:
        items: list[Any] = []
        while (line := self._peek()) is not None and line.indent == indent:
            if line.text != "-" and not line.text.startswith("- "):
                break  # a mapping's next key may stand as deep as its value's dashes
            rest = line.text[1:].lstrip(" ")
            if not rest or rest.startswith("#"):
                self._at = line.number
                items.append(self._nested(indent + 1, depth))
            elif _key_end(rest, line.number) >= 0 or rest.startswith("- "):
                # The item's own lines start where its first word stands: put spaces in the dash's place.
                inner = len(line.text) - len(rest)
                self._raw[self._at] = " " * (indent + inner) + rest
                items.append(self._block(indent + inner, depth + 1))
            else:
                self._at = line.number
                items.append(self._scalar(rest, line, indent))
        return items

    def _mapping(self, indent: int, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while (line := self._peek()) is not None and line.indent == indent:
            end = _key_end(line.text, line.number)
            if end < 0:
                if line.text == "-" or line.text.startswith("- "):
                    break
                raise YamlError(f"line {line.number}: KEY: VALUE was expected, not {_shown(line.text)}")
            if not line.text[:end].strip(_BLANKS):
                raise YamlError(f"line {line.number}: a key is missing before the colon")
            key = _plain(line.text[:end].rstrip(_BLANKS), line.number)
            if not isinstance(key, str):
                key = line.text[:end].rstrip(_BLANKS)
            if key in found:
                raise YamlError(f"line {line.number}: the key {_shown(key)} stands there twice")
            rest = line.text[end + 1 :].strip(_BLANKS)
            self._at = line.number
            if not rest or rest.startswith("#"):
                found[key] = self._value_below(indent, depth)
            else:
                found[key] = self._scalar(rest, line, indent)
        return found

    def _value_below(self, indent: int, depth: int) -> Any:
        line = self._peek()
        if line is not None and line.indent == indent and (line.text == "-" or line.text.startswith("- ")):
            return self._sequence(indent, depth + 1)
        return self._nested(indent + 1, depth)

    def _nested(self, least: int, depth: int) -> Any:
        line = self._peek()
        return None if line is None or line.indent < least else self._block(line.indent, depth + 1)

    def _scalar(self, text: str, line: _Line, indent: int) -> Any:
        if text[0] in "|>":
            return self._literal(text, line.number, indent)
        value = _plain(text, line.number)
        below = self._peek()
        if below is not None and below.indent > indent:
            raise YamlError(f"line {below.number}: a value of several lines is not read; write it on one")
        return value

    def _literal(self, head: str, number: int, indent: int) -> str:
        if head not in ("|", "|-", "|+"):
            raise YamlError(f"line {number}: {_shown(head)} is not read; of block texts only |, |- and |+ are")
        lines: list[str] = []
        while self._at < len(self._raw):
            raw = self._raw[self._at]
            if raw.strip(_BLANKS) and len(raw) - len(raw.lstrip(" ")) <= indent:
                break
            lines.append(raw)
            self._at += 1
        depth = min((len(raw) - len(raw.lstrip(" ")) for raw in lines if raw.strip(_BLANKS)), default=0)
        body = "\n".join(raw[depth:] for raw in lines)
        return body.rstrip("\n") + ("" if head == "|-" else "\n")


def _key_end(text: str, number: int) -> int:
    """Return where the colon of a key stands, -1 if the line has no key."""
    if text[0] in "'\"":
        close = _closing(text, number) + 1
        rest = text[close:].lstrip(" ")
        return close + text[close:].index(":") if rest.startswith(":") and rest[1:2] in ("", " ") else -1
    at = text.find(":")
    while at >= 0 and text[at + 1 : at + 2] not in ("", " "):
        at = text.find(":", at + 1)
    comment = text.find(" #")
    return -1 if 0 <= comment < at else at


def _closing(text: str, number: int) -> int:
    """Return where the quoted text that `text` starts with ends."""
    quote, at = text[0], 1
    while at < len(text):
        if quote == '"' and text[at] == "\\":
            at += 2
        elif text[at] == quote:
            if quote == "'" and text[at + 1 : at + 2] == "'":
                at += 2
            else:
                return at
        else:
            at += 1
    raise YamlError(f"line {number}: the quotation mark {quote} is not closed")


def _plain(text: str, number: int) -> Any:
    """Read a scalar that stands on one line."""
    if text[0] in "'\"":
        end = _closing(text, number)
        rest = text[end + 1 :].strip(_BLANKS)
        if rest and not rest.startswith("#"):
            raise YamlError(f"line {number}: {_shown(rest)} after a quoted text")
        if text[0] == "'":
            return text[1:end].replace("''", "'")
        try:
            return json.loads(text[: end + 1])
        except ValueError:
            raise YamlError(f"line {number}: an escape in {_shown(text)} is not read") from None
    text = text.partition(" #")[0].rstrip(_BLANKS)
    if not text:
        raise YamlError(f"line {number}: a text is missing")
    if text[0] in "{[":
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise YamlError(f"line {number}: {_shown(text)} is read only if it is JSON") from None
    if text[0] in _FALSE_FRIENDS or text[:2] == "? " or text in ("---", "..."):
        raise YamlError(f"line {number}: {_shown(text)}: anchors, tags and several documents are not read")
    if ": " in text or text.endswith(":"):
        raise YamlError(f"line {number}: {_shown(text)} is no plain text; put it in quotation marks")
    return {"null": None, "~": None, "true": True, "false": False}.get(text, text)


def _shown(text: str) -> str:
    """A piece of the file for an error: short, for what follows may be a secret."""
    return ascii(text if len(text) <= 24 else text[:20] + "...")
