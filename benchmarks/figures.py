"""Figures side by side: this project's, another program's and the floor; as a table and as bench.json."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1


@dataclass
class Figure:
    """One figure. `aim` is what ours over the peer's should be at most, or at least where `more_is_better`.

    `floor` is what the same takes at the very least (its meaning is in `floor_is`); None where nothing was measured.
    """

    figure: str
    unit: str
    ours: float | None
    peer: float | None = None
    floor: float | None = None
    aim: float | None = None
    more_is_better: bool = False
    floor_is: str = ""
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Ours over the peer's."""
        return self.ours / self.peer if self.ours is not None and self.peer else None

    @property
    def met(self) -> bool | None:
        """Whether the aim is met; None where there is no aim or nobody to compare with."""
        if self.ratio is None or self.aim is None:
            return None
        return self.ratio >= self.aim if self.more_is_better else self.ratio <= self.aim

    def as_json(self) -> dict[str, Any]:
        """All of it, what follows from it too."""
        return {**asdict(self), "ratio": self.ratio, "met": self.met}


def from_json(row: dict[str, Any]) -> Figure:
    """What `as_json` gave."""
    return Figure(**{key: value for key, value in row.items() if key not in ("ratio", "met")})


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = int(Path("/proc/meminfo").read_text().split()[1]) // 1024
    load = os.getloadavg()
    return {
        "processors": os.cpu_count(), "model": model, "memory_mb": memory, "kernel": platform.release(),
        "load": [round(one, 2) for one in load],
    }  # fmt: skip


def version_of(argv: Sequence[str]) -> str:
    """The first line that a program says of its version; empty where it says none."""
    try:
        ended = subprocess.run(list(argv), capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    said = (ended.stdout + ended.stderr).strip().splitlines()
    return said[0] if said else ""


def table(figures: Sequence[Figure]) -> str:
    """The figures for a terminal."""

    def shown(value: float | None) -> str:
        if value is None:
            return "-"
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"

    head = ("figure", "unit", "ours", "peer", "floor", "ratio", "aim", "met")
    rows = [head]
    for one in figures:
        aim = "" if one.aim is None else f"{'≥' if one.more_is_better else '≤'} {one.aim:g}"
        met = {None: "", True: "yes", False: "NO"}[one.met]
        rows.append((
            one.figure, one.unit, shown(one.ours), shown(one.peer), shown(one.floor), shown(one.ratio), aim, met
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) if column < 2 else cell.rjust(width)
                  for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]  # fmt: skip
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def write(path: Path, figures: Sequence[Figure], **about: Any) -> None:
    """Write bench.json, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {
        "schema": SCHEMA, "machine": machine(), "command": sys.argv, **about,
        "figures": [one.as_json() for one in figures],
    }  # fmt: skip
    aside = path.with_suffix(".new")
    aside.write_text(json.dumps(text, indent=1) + "\n")
    aside.rename(path)
