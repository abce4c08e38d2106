"""Programs that were built elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from testbed.guest import runs
from testbed.guest.build import Kernel
from testbed.tools import ToolUnavailable, build_tool, built_tool


def test_a_program_built_elsewhere_needs_no_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("TESTBED_KUBERNETES", "/bin/true")
    assert (build_tool("kubernetes"), built_tool("kubernetes")) == (Path("/bin/true"), Path("/bin/true"))
    monkeypatch.setenv("TESTBED_KUBERNETES", str(tmp_path / "none"))
    with pytest.raises(ToolUnavailable, match="TESTBED_KUBERNETES"):
        build_tool("kubernetes")


def test_a_guest_is_handed_the_program_of_its_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Root's cache is closed to root's guest, and what is built in a guest is gone with it."""
    monkeypatch.setenv("TESTBED_KUBERNETES", "/bin/true")
    given: list[dict[str, Any]] = []

    def run_in_guest(argv: list[str], **options: Any) -> int:
        given.append(options)
        return 0

    monkeypatch.setattr(runs, "run_in_guest", run_in_guest)
    for words in (["--store", "kubernetes"], ["--store=etcd"], []):
        runs.in_guest("vxlan", words, Kernel(tmp_path, "6.12", "built"), tmp_path)
    assert [Path("/bin/true") in one["readable"] for one in given] == [True, False, False]
    assert given[0]["env"]["TESTBED_KUBERNETES"] == "/bin/true"
