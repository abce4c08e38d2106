"""flanneld, started as a file from wherever the package lies."""

from __future__ import annotations

import os
import sys


def main() -> int:
    """Run flanneld, or mk-docker-opts, with the process's own arguments."""
    here = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    if here not in sys.path:
        sys.path.insert(0, here)
    sys.dont_write_bytecode = True  # the folder may be read-only, or shared by many nodes
    from flannel.entry import main as entry

    return entry(sys.argv, os.environ)


if __name__ == "__main__":
    sys.exit(main())
