"""Which checks of the suites are about a run, along which paths, and why some cannot run."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from testbed import checks
from testbed.doctor import probe_features
from testbed.report.parts import DEFER, DEFERRED, ONLY, SHARE, PartWriter
from testbed.runstate import RUN, Run

NOT_WRITTEN = "is not written yet"
STORE_NEEDED = "kubernetes store"
"""What a row needs that any run can be given, by `--store kubernetes`."""
IPV6_NEEDED = "dual stack"
"""What a row needs that it is about: without IPv6 it is about another run."""


def all_rows(config: pytest.Config) -> bool:
    """Whether a run is about every row, not the smoke part alone: by `--full`, or since checks are chosen by name."""
    chosen = config.getoption("keyword") or config.getoption("markexpr") or os.environ.get(ONLY)
    return bool(config.getoption("full") or chosen or not whole_suites(config))


def is_disruptive(item: pytest.Item) -> bool:
    """Whether a check takes from the lab what others rely on."""
    marker = item.get_closest_marker("check")
    return marker is not None and bool(marker.kwargs.get("disruptive"))


def worker_id(config: pytest.Config) -> str:
    """The id of a worker of xdist (`gw0`); "" for a run in one process and for the controller."""
    return str(getattr(config, "workerinput", {}).get("workerid", ""))


def whole_suites(config: pytest.Config) -> bool:
    """Whether whole folders were asked for, not single files or functions."""
    return all("::" not in argument and Path(argument).is_dir() for argument in config.args)


def row_of(item: pytest.Item) -> checks.Row:
    """The catalogue row of a check. Raises CollectError for an id that is not in the catalogue."""
    marker = item.get_closest_marker("check")
    assert marker is not None  # asked for marked items only
    row = checks.load_catalogue().get(marker.args[0])
    if row is None:
        raise pytest.Collector.CollectError(f"{item.nodeid}: {marker.args[0]} is not in the catalogue")
    return row


def parametrise(metafunc: pytest.Metafunc, run: Run) -> None:
    """Give a check one item a path of its row, those of another sort left out."""
    marker = next(metafunc.definition.iter_markers("check"))
    row = checks.load_catalogue().get(marker.args[0])
    paths = checks.paths_of(run.lab, run.options.backend)
    about = {key: marker.kwargs.get(key, False) for key in ("encapsulated", "direct")}
    kinds = [
        kind
        for kind in (row.paths if row else ())
        if kind in checks.TRAFFIC and checks.applies(kind, run.options.backend, **about)
    ]
    specs = [paths[kind] for kind in kinds]
    metafunc.parametrize("path", specs, indirect=True, ids=[f"{run.options.backend}-{spec}" for spec in specs])


class Unwritten(pytest.Item):
    """A row that the run is for and no function checks, so that it shows as skipped instead of not at all."""

    row: checks.Row

    def runtest(self) -> None:
        """Skip; see `skip_reason`."""
        pytest.skip(skip_reason(self))

    def reportinfo(self) -> tuple[Path, int, str]:
        """Where the row stands."""
        return checks.catalogue_path() / f"{self.row.group}.yaml", 0, self.name


@cache
def kernel_has(feature: str) -> bool:
    """Whether this kernel has a feature, found out by using it. Raises LabError where that cannot be found out."""
    return bool(probe_features().get(feature, {}).get("ok"))


def skip_reason(item: pytest.Item, *, any_kernel: bool = False) -> str:
    """Why a check cannot run here, or with `any_kernel` whatever the kernel is; "" where it can."""
    if item.get_closest_marker("check") is None:
        return ""
    row = row_of(item)
    if isinstance(item, Unwritten):
        return row.reason or NOT_WRITTEN
    run = item.config.stash.get(RUN, None)
    given = run is not None and (
        (row.needs == STORE_NEEDED and run.options.store == "kubernetes")
        or (row.needs == IPV6_NEEDED and run.flannel.network6 is not None)
    )
    given = given or (row.needs in checks.KERNEL_NEEDS and (any_kernel or kernel_has(row.needs)))
    if row.reason and not given:
        return row.reason
    callspec = getattr(item, "callspec", None)
    spec = callspec.params.get("path") if callspec else None
    return spec.reason if isinstance(spec, checks.PathSpec) else ""


def left_to_others(config: pytest.Config, items: list[pytest.Item]) -> list[pytest.Item]:
    """The checks that another pass of the same run is for; see `testbed.report.parts`."""
    others: list[pytest.Item] = []
    if features := set(filter(None, os.environ.get(DEFER, "").split(","))):
        deferred = [
            item for item in items if needed_feature(item) in features and not skip_reason(item, any_kernel=True)
        ]
        part = PartWriter.of_environment()
        if part is not None and worker_id(config) in ("", "gw0"):
            (part.folder / DEFERRED).write_text(json.dumps([item.name for item in deferred]))
        others += deferred
    if only := os.environ.get(ONLY):
        wanted = set(json.loads(Path(only).read_text()))
        others += [item for item in items if item.name not in wanted]
    if share := os.environ.get(SHARE):
        number, _, count = share.partition("/")
        others += [item for position, item in enumerate(items) if position % int(count) != int(number)]
    return others


def needed_feature(item: pytest.Item) -> str:
    """The kernel feature that a check needs of its own; "" for none."""
    needs = row_of(item).needs if item.get_closest_marker("check") else ""
    return needs if needs in checks.KERNEL_NEEDS else ""


def select(session: pytest.Session, config: pytest.Config, items: list[pytest.Item], run: Run) -> None:
    """Name items by their rows, drop those about other backends, and add the rows that nothing checks yet."""
    every = all_rows(config)
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    found: set[str] = set()
    for item in items:
        if item.get_closest_marker("check") is None:
            kept.append(item)
            continue
        row = row_of(item)
        found.add(row.id)
        spec = getattr(item, "callspec", None)
        without_path = (
            spec is not None and "path" in spec.params and not isinstance(spec.params["path"], checks.PathSpec)
        )
        marker = item.get_closest_marker("check")
        rules = marker.kwargs.get("rules") if marker else None
        elsewhere = (
            run.options.backend not in row.backends
            or rules not in (None, "", run.flannel.rules)
            or (row.needs == IPV6_NEEDED and run.flannel.network6 is None)
            or (row.needs != IPV6_NEEDED and not run.flannel.ipv4)
            or not (every or row.smoke)
        )
        (dropped if elsewhere or without_path else kept).append(item)
    if whole_suites(config):
        kept += [
            unwritten(session, row)
            for row in checks.load_catalogue().values()
            if row.smoke or (config.getoption("full") and run.options.lab in row.lab)
            if run.options.backend in row.backends and row.id not in found
            if row.needs != IPV6_NEEDED and run.flannel.ipv4
        ]
    order = {row: position for position, row in enumerate(checks.load_catalogue())}

    def place(item: pytest.Item) -> tuple[bool, int]:
        """The catalogue's order, whatever that of the files is; what disturbs others comes last."""
        known = item.get_closest_marker("check") is not None
        return is_disruptive(item), order[row_of(item).id] if known else -1

    kept.sort(key=place)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
    items[:] = kept


def named_by_row(collector: pytest.Module, function: Any) -> list[pytest.Item] | None:
    """The items of a check, called by their row in the report, in `-k` and in node ids: `VXE-01[vxlan-XS-…]`.

    None for a function that is no check.
    """
    marks = [mark for mark in getattr(function, "pytestmark", ()) if mark.name == "check"]
    if not marks:
        return None
    row = marks[0].args[0]
    setattr(collector.obj, row, function)  # pytest looks functions up by the name of their item
    items: list[pytest.Item] = list(collector._genfunctions(row, function))
    return items


def unwritten(session: pytest.Session, row: checks.Row) -> pytest.Item:
    """An item for a row that no function checks."""
    item: Unwritten = Unwritten.from_parent(session, name=row.id)
    item.row = row
    item.add_marker(pytest.mark.check(row.id, encapsulated=False, direct=False))
    return item
