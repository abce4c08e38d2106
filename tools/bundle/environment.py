"""Run first in each bundled program: what flannel starts must find its own libraries, and not the bundle's."""

import os
import sys

for name in list(os.environ):
    if name.startswith(("_PYI_", "_MEIPASS", "LD_LIBRARY_PATH")):
        del os.environ[name]
before = os.environ.pop("FLANNEL_LD_LIBRARY_PATH", None)
if before is not None:
    os.environ["LD_LIBRARY_PATH"] = before
# What starts itself anew must start the launcher.
sys.executable = os.environ.pop("FLANNEL_PROGRAM", sys.executable)
sys.orig_argv = [sys.executable, *sys.argv[1:]]
