"""Which of the programs of this package is wanted: flanneld, or mk-docker-opts."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence


def main(argv: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run mk-docker-opts where the program is called by that name, or where its name is the first word; else flanneld.

    Returns the exit status.
    """
    from flannel import mkdockeropts

    if os.path.basename(argv[0] if argv else "") in mkdockeropts.NAMES:
        return mkdockeropts.main(argv[1:], environment)
    if argv[1:2] == ["mk-docker-opts"]:
        return mkdockeropts.main(argv[2:], environment)
    from flannel.daemon import main as daemon

    return daemon(argv[1:], environment)


def script() -> None:
    """The same as a program of an installed package; it ends the process."""
    sys.exit(main(sys.argv, os.environ))
