"""Every statement about flannel's behaviour is held by a test, or is a deviation that is written down."""

from __future__ import annotations

import ast
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

HERE = Path(__file__).parents[2]
INDEX: dict[str, Any] = yaml.safe_load((HERE / "tests/flannel/behaviour.yaml").read_text())
STATEMENTS: dict[str, dict[str, Any]] = INDEX["statements"]


@cache
def held_by(path: str) -> frozenset[str]:
    """The tests that pytest finds in a file."""
    tree = ast.parse((HERE / path).read_text())
    return frozenset(
        node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    )


@cache
def deviations() -> tuple[str, ...]:
    """The first column of the table of deviations."""
    return tuple(row[1].strip() for row in table("# Deviations from upstream flannel"))


def table(heading: str) -> list[list[str]]:
    """The rows of a section's table in docs/deviations.md, without its head."""
    sections = (HERE / "docs/deviations.md").read_text().split("\n## ")
    [section] = [section for section in sections if section.startswith(heading)]
    return [line.split("|") for line in section.splitlines() if line.startswith("|")][2:]


def test_every_number_is_there_once() -> None:
    numbers = [f"{section}.{count}" for section, most in INDEX["sections"].items() for count in range(1, most + 1)]
    assert set(STATEMENTS) == {*numbers, *INDEX["more"]}
    keys = [line.strip() for line in (HERE / "tests/flannel/behaviour.yaml").read_text().splitlines()]
    assert [key for key, count in Counter(keys).items() if count > 1 and key[:1] == '"' and key[1:2].isdigit()] == []


def test_no_row_of_the_deviations_stands_twice() -> None:
    assert [row for row, count in Counter(deviations()).items() if count > 1] == []


def test_every_fault_of_upstreams_has_its_test() -> None:
    faults = {row[1].strip(): row[3].strip().strip("`") for row in table("Faults that were seen")}
    assert list(faults) == [f"F{number}" for number in range(1, 18)]
    for fault, test in faults.items():
        path, _, name = test.partition("::")
        assert name in held_by(path), f"{fault} names {test}, which is not there"


@pytest.mark.parametrize("number", STATEMENTS)
def test_a_statement_is_held(number: str) -> None:
    statement = STATEMENTS[number]
    assert statement["says"]
    assert statement.keys() <= {"says", "tests", "deviations"}
    held, excused = statement.get("tests", []), statement.get("deviations", [])
    assert held or excused, f"{number} is neither tested nor a deviation: {statement['says']}"
    for test in held:
        path, _, name = test.partition("::")
        assert name in held_by(path), f"{number} names {test}, which is not there"
    for beginning in excused:
        rows = [row for row in deviations() if row == beginning] or [
            row for row in deviations() if row.startswith(beginning)
        ]
        assert len(rows) == 1, f"{number} names the deviation {beginning!r}, of which there are {len(rows)}"
