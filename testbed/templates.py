"""The Jinja environment of every template: strict, and with a quoting filter for each kind of text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import jinja2

from testbed import data

_NEEDS_ESCAPE = re.compile(r"[^\x20-\x7e]")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]*")


def quoted(value: Any) -> str:
    """A value as YAML that is JSON at once: strings in double quotes with every unusual character escaped."""
    if value is not None and not isinstance(value, bool | int | float | str | list | tuple | dict):
        value = str(value)
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)
    return _NEEDS_ESCAPE.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    # YAML has one escape for characters beyond the basic plane, JSON a pair; only YAML is written with this filter.
    number = ord(match.group())
    return f"\\u{number:04x}" if number <= 0xFFFF else f"\\U{number:08x}"


def word(value: Any) -> str:
    """A value for a text without quoting: letters, digits and `._:/-` only.

    Raises ValueError for anything else, so that no value can add a line or a second word.
    """
    text = str(value)
    if not _WORD.fullmatch(text):
        raise ValueError(f"{text!r} cannot stand in this file")
    return text


def json_block(value: Any, indent: int) -> str:
    """A value as JSON for a literal block of YAML, whose lines stand `indent` blanks in; ASCII only."""
    text = json.dumps(_plain(value), indent=2, ensure_ascii=True, allow_nan=False)
    return text.replace("\x7f", "\\u007f").replace("\n", "\n" + " " * indent)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@cache
def environment(folder: str) -> jinja2.Environment:
    """The environment of one data folder's templates."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(data.folder(folder)),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # noqa: S701 - no HTML here; every value goes through `quoted` or `word`
        keep_trailing_newline=True,
        trim_blocks=False,
        auto_reload=False,
    )
    made.filters.update(quoted=quoted, word=word, json_block=json_block)
    return made


def render(folder: str, name: str, /, **values: Any) -> str:
    """Render one template of a data folder."""
    return environment(folder).get_template(name).render(values)
