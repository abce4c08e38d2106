"""The same work on many machines side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def each(function: Callable[[Any], T], items: Iterable[Any]) -> list[T]:
    """Do something for every item side by side; the first error is raised once all have ended."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        return list(pool.map(function, items))
