"""Bars: how long checks took, and the figures of those that measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SCALE = 100.0
"""The width of the longest bar, in the units of its drawing."""


def bars(rows: Sequence[tuple[str, float, str]], most: int) -> list[dict[str, Any]]:
    """The longest of (name, seconds, anchor), each with its share of the longest."""
    longest = sorted(rows, key=lambda row: -row[1])[:most]
    top = max((seconds for _, seconds, _ in longest), default=0.0)
    return [
        {"name": name, "seconds": seconds, "anchor": anchor, "width": round(SCALE * seconds / top, 1) if top else 0.0}
        for name, seconds, anchor in longest
    ]


def figures_of(checks: Sequence[Mapping[str, Any]], document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The figures that checks measured, grouped by unit so that bars beside each other compare."""
    found: dict[str, list[dict[str, Any]]] = {}
    for view, check in zip(checks, document.get("checks", ()), strict=True):
        for figure in check.get("figures") or ():
            row = {
                "name": str(figure.get("figure", "")),
                "value": float(figure.get("value", 0.0)),
                "bound": figure.get("bound"),
                "check": view["id"],
                "anchor": view["anchor"],
                "verdict": view["verdict"],
            }
            found.setdefault(str(figure.get("unit", "")), []).append(row)
    groups = []
    for unit, rows in found.items():
        top = max(max(row["value"], float(row["bound"] or 0.0)) for row in rows) or 1.0
        for row in rows:
            row["width"] = round(SCALE * row["value"] / top, 1)
            row["mark"] = round(SCALE * float(row["bound"]) / top, 1) if row["bound"] else None
        groups.append({"unit": unit, "rows": rows})
    return groups
