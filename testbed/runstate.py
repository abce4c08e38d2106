"""What the pytest plugin and its fixtures know of the run, kept in pytest's own stash."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from testbed.flannelspec import FlannelSpec
from testbed.model import LabSpec
from testbed.options import RunOptions
from testbed.report.expectations import Expectation, Implementation
from testbed.report.parts import PartWriter
from testbed.report.record import RunRecord
from testbed.report.terminal import Screen
from testbed.report.write import ReportFolder

if TYPE_CHECKING:
    from testbed.aftermath import Aftermath
    from testbed.nodes.deploy import Cluster
    from testbed.report.following import Following


@dataclass
class Run:
    """One run of the suites in this process. A worker has no screen, record or report: its controller has."""

    options: RunOptions
    lab: LabSpec
    flannel: FlannelSpec
    staging: Path | None = None
    report: ReportFolder | None = None
    record: RunRecord | None = None
    screen: Screen | None = None
    total: int = 0
    whole: bool = False  # the selection is the one that expected counts are committed for
    cluster: Cluster | None = None
    part: PartWriter | None = None  # where the outcomes go of a run that is a part of another
    expectations: tuple[Expectation, ...] = ()  # what is known to fail with some implementations
    implementations: dict[str, Implementation] = field(default_factory=dict)  # by node, once one of those was asked for
    aftermath: Aftermath | None = None  # looks at what checks leave behind
    following: Following | None = None  # keeps what checks do, for the report
    refused: bool = False  # the lab's name was in use; the report that is there belongs to whoever uses it


RUN: pytest.StashKey[Run] = pytest.StashKey()
