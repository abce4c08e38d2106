"""JSON inside a YAML file, with its errors on the YAML file's lines."""

from __future__ import annotations

import json
import re
from typing import Any

from testbed.errors import Fault

MAX_DEPTH = 32


class JsonText:
    """A JSON text in a ConfigMap: its value (None where it cannot be read), and the faults of reading it."""

    def __init__(self, file: str, key: str, text: str, first_line: int, block: bool) -> None:
        self.file = file
        self.key = key
        self.text = text
        self.first_line = first_line
        self.block = block
        self.faults: list[Fault] = []
        self.value: Any = None
        self._read()

    def _read(self) -> None:
        try:
            self.value = json.loads(self.text, object_pairs_hook=self._pairs, parse_constant=_no_constant)
        except json.JSONDecodeError as error:
            self.faults.append(self._fault_on(error.lineno, f"not JSON: {_lower(error.msg)}", self._hint(error)))
        except RecursionError:
            self.faults.append(self._fault_on(1, "not JSON that flannel could read: nested too deep"))
        except ValueError as error:  # NaN and kin, or a number of thousands of digits
            self.faults.append(self._fault_on(1, f"not JSON: {error}"))
        if _depth(self.value) > MAX_DEPTH:
            self.faults.append(self._fault_on(1, f"nested deeper than {MAX_DEPTH} levels"))
            self.value = None

    def _pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                self.faults.append(self.fault(key, "given twice", "the last one would count: keep one"))
            result[key] = value
        return result

    def _hint(self, error: json.JSONDecodeError) -> str:
        line = self.text.splitlines()[error.lineno - 1] if error.lineno <= len(self.text.splitlines()) else ""
        if re.search(r"(//|#|/\*)", line):
            return "JSON has no comments"
        if error.msg.startswith("Illegal trailing comma") or re.match(r"\s*[}\]]", self.text[error.pos :]):
            return "is there a comma after the last entry?"
        return ""

    def fault(self, key: str, what: str, hint: str = "") -> Fault:
        """A fault of a key, written `Backend.VNI`; on the line where the key's last part is first written.

        Where that is missing it is the line of the part before it.
        """
        names = re.split(r"[.\[]", key) if "[" not in key else [key.split("[")[0]]
        found = (re.search(rf'"{re.escape(name)}"\s*:', self.text, re.IGNORECASE) for name in reversed(names) if name)
        match = next(filter(None, found), None)
        line = self.text.count("\n", 0, match.start()) + 1 if match else 1
        return self._fault_on(line, what, hint, key)

    def _fault_on(self, line: int, what: str, hint: str = "", key: str = "") -> Fault:
        where = self.first_line + line - 1 if self.block else self.first_line
        return Fault(self.file, where, f"{self.key}: {key}" if key else self.key, what, hint)


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON value")


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _depth(value: Any) -> int:
    """Levels of nesting, counted without recursion: the reader's own limit is far higher than this module's."""
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        depth += 1
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return depth
