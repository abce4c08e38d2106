"""What labs of containers need of this machine, for `testbed doctor`: a Docker engine, and containerlab."""

from __future__ import annotations

import os
import shutil

from testbed.doctor import Finding, search_path
from testbed.errors import LabError
from testbed.tools import ToolUnavailable, built_tool

KIND = "containers"
BUILD_COST = "2 minutes of a processor, once; its Go modules have to be downloaded"


def findings() -> tuple[Finding, Finding]:
    """Both of them; nothing is started or built."""
    return _engine(), _containerlab()


def _engine() -> Finding:
    from testbed.engine.find import find_engine  # the SDK takes longer to import than everything else here

    try:
        engine = find_engine()
    except LabError as error:
        cure = error.hint
        if shutil.which("dockerd", path=search_path()) is None and "usermod" not in cure:
            cure = "as root: apt-get install --no-install-recommends docker.io, then testbed engine up"
        elif os.geteuid() == 0:
            cure = "testbed engine up"
        cost = "110 MB, and images on disk; testbed engine down removes it"
        return Finding(KIND, "Docker engine", False, (), error.what, cure, cost)
    whose = "private" if engine.private else "this machine's" if engine.local else "another"
    return Finding(KIND, "Docker engine", True, (), f"{whose}: {engine.address}")


def _containerlab() -> Finding:
    found = shutil.which("containerlab", path=search_path())
    if found:
        return Finding(KIND, "containerlab", True, (), found)
    try:
        built = built_tool("containerlab")
    except ToolUnavailable as error:
        return Finding(KIND, "containerlab", False, (), error.what, error.hint, BUILD_COST)
    if built:
        return Finding(KIND, "containerlab", True, (), str(built))
    cure = "none is needed: the first run with --lab clab builds it"
    return Finding(KIND, "containerlab", False, (), "not built yet", cure, BUILD_COST)
