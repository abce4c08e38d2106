"""Reads YAML of strangers: with the line of every value, strict scalars, bounded in size, and every fault at once.

A plain `no` is the string "no", a MAC or `12:30` is a string, a number is decimal.  Nothing is constructed but
mappings, lists, strings, integers, floats, booleans and null.
"""

from __future__ import annotations

import pathlib
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from testbed.errors import Fault, InputError

MAX_BYTES = 512 * 1024
"""A larger file is no topology and no manifest; reading it would only take time."""

MAX_DEPTH = 48
MAX_VALUES = 50_000
"""Values of one file once its aliases are followed; what bounds an alias bomb."""

Path = tuple[str | int, ...]
"""Where a value sits: keys and list positions from the document's root."""

_CORE = "tag:yaml.org,2002:"
_STR = _CORE + "str"
_TAGS = frozenset({"map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge", "value"})
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,18})")
_FLOAT = re.compile(r"[-+]?[0-9]{1,18}\.[0-9]{1,18}([eE][-+]?[0-9]{1,2})?")
_WORDS: dict[str, Any] = {
    "true": True, "True": True, "TRUE": True,
    "false": False, "False": False, "FALSE": False,
    "null": None, "Null": None, "NULL": None, "~": None, "": None,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value is written. `line` is 1-based; `block` tells a literal block, whose text starts a line later."""

    line: int
    key_line: int
    block: bool = False

    @property
    def text_line(self) -> int:
        """The line of the first line of the value's text."""
        return self.line + 1 if self.block else self.line


@dataclass(slots=True)
class Document:
    """One YAML document: its plain value, and where each part of it is written."""

    file: str
    value: Any
    places: dict[Path, Place] = field(default_factory=dict)

    def line(self, path: Path) -> int:
        """The line of the key or item at that path, or of the nearest part above it that exists."""
        while path not in self.places:
            if not path:
                return 1
            path = path[:-1]
        return self.places[path].key_line

    def fault(self, path: Path, what: str, hint: str = "") -> Fault:
        """A fault at that path."""
        return Fault(self.file, self.line(path), spell(path), what, hint)


def spell(path: Path) -> str:
    """A path as people write it: `racks[0].nodes[2]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


class _Loader(yaml.SafeLoader):
    """Composes nodes only, and no deeper than allowed: the composer is recursive."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            mark = self.get_mark()
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class _Converter:
    """Turns composed nodes into plain values, noting lines and collecting faults."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.faults: list[Fault] = []
        self.values = 0
        self.exhausted = False

    def document(self, root: yaml.Node) -> Document:
        result = Document(self.file, None)
        result.value = self.convert(result, root, (), _line(root))
        return result

    def convert(self, document: Document, node: yaml.Node, path: Path, key_line: int) -> Any:
        block = isinstance(node, yaml.ScalarNode) and node.style in ("|", ">")
        document.places[path] = Place(_line(node), key_line, block)
        self.values += 1
        if self.values > MAX_VALUES or len(path) > MAX_DEPTH:
            if not self.exhausted:
                self.exhausted = True
                what = f"more than {MAX_VALUES} values or {MAX_DEPTH} levels once aliases are followed"
                self.faults.append(Fault(self.file, _line(node), "", what, "write it out without YAML aliases"))
            return None
        if node.tag.removeprefix(_CORE) not in _TAGS:
            hint = "write the plain value"
            self.faults.append(Fault(self.file, _line(node), spell(path), f"the tag {node.tag} is not taken", hint))
            return None
        if isinstance(node, yaml.MappingNode):
            return self.mapping(document, node, path)
        if isinstance(node, yaml.SequenceNode):
            return [
                self.convert(document, item, (*path, position), _line(item))
                for position, item in enumerate(node.value)
                if not self.exhausted
            ]
        return self.scalar(node)

    def mapping(self, document: Document, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in node.value:
            if self.exhausted:
                break
            if not isinstance(key, yaml.ScalarNode):
                self.faults.append(Fault(self.file, _line(key), spell(path), "a key has to be a word"))
                continue
            name = str(key.value)
            here = (*path, name)
            if name in result:
                first = document.line(here)
                self.faults.append(
                    Fault(self.file, _line(key), spell(here), f"given twice, first on line {first}", "keep one of them")
                )
                continue
            result[name] = self.convert(document, value, here, _line(key))
        return result

    def scalar(self, node: yaml.Node) -> Any:
        assert isinstance(node, yaml.ScalarNode)
        text = str(node.value)
        if node.style or node.tag == _STR:
            return text
        return plain(text)


def plain(text: str) -> Any:
    """The value of an unquoted scalar."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def parse(text: str, file: str) -> tuple[list[Document], list[Fault]]:
    """Read all documents of a text; empty ones are left out.

    Returns what could be read and the faults: syntax, duplicate keys, tags, too large, too deep.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        return [], [Fault(file, 0, "", f"larger than {MAX_BYTES // 1024} KiB", "give the file that was meant")]
    converter = _Converter(file)
    documents: list[Document] = []
    try:
        loader = _Loader(text)
        while loader.check_node():
            node = loader.get_node()
            assert node is not None  # check_node said that there is one
            documents.append(converter.document(node))
    except yaml.MarkedYAMLError as error:
        converter.faults.append(_syntax_fault(file, error))
    except yaml.YAMLError as error:  # a character that YAML forbids; it has a position but no line
        reason = getattr(error, "reason", str(error))
        line = text.count("\n", 0, getattr(error, "position", 0)) + 1
        converter.faults.append(Fault(file, line, "", f"not YAML: {reason}"))
    return [d for d in documents if d.value is not None], converter.faults


def _syntax_fault(file: str, error: yaml.MarkedYAMLError) -> Fault:
    mark = error.problem_mark or error.context_mark
    line = int(mark.line) + 1 if mark else 0
    hint = "YAML takes no tabs; indent with blanks" if "'\\t'" in str(error.problem) else ""
    return Fault(file, line, "", f"not YAML: {error.problem or error.context}", hint)


def read_text(path: str, *, what: str) -> str:
    """Return a user's text file; `what` says what it should have been, such as `manifest`.

    Raises InputError where there is none, where it is no UTF-8 text, or where it is too large.
    """
    try:
        with pathlib.Path(path).open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise InputError(faults=[Fault(path, 0, "", f"larger than {MAX_BYTES // 1024} KiB, so it is no {what}")])
        return data.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read the {what}: {error.strerror}", where=path) from None
    except ValueError as error:  # no UTF-8, or a NUL in the path
        raise InputError(f"the {what} is not UTF-8 text: {error}", where=path.replace("\0", "?")) from None
