"""Where the folders of templates, topologies and suites are: inside the installed package, or in a checkout."""

from __future__ import annotations

from pathlib import Path

from testbed.errors import LabError

FOLDERS = ("topologies", "kind-configs", "manifests", "suites", "flannel")
"""What a wheel carries inside the package `testbed`, and a checkout beside it."""


def folder(name: str) -> Path:
    """Return the folder of that name (one of `FOLDERS`).

    The package's own copy comes first: beside an installed package lie other people's packages.
    Raises LabError where the installation is incomplete.
    """
    if name not in FOLDERS:
        raise ValueError(f"{name} is no data folder; these are: {', '.join(FOLDERS)}")
    package = Path(__file__).resolve().parent
    for candidate in (package / name, package.parent / name):
        if candidate.is_dir():
            return candidate
    raise LabError(
        f"the folder `{name}` of testbed is missing",
        where=str(package),
        hint="the installation is incomplete: install testbed again, or run it from a checkout",
    )
