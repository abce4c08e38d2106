"""Log lines in klog's form on stderr: `I0629 14:28:35.866793    5522 daemon.py:386] text`."""

from __future__ import annotations

import os
import sys
import time

#: Lines more talkative than this are dropped; set from `-v`.
verbosity = 0


def _write(severity: str, text: str, depth: int) -> None:
    frame = sys._getframe(depth)
    now = time.time()
    stamp = time.strftime("%m%d %H:%M:%S", time.localtime(now))
    file = os.path.basename(frame.f_code.co_filename)
    head = f"{severity}{stamp}.{int(now * 1e6) % 1000000:06d} {os.getpid():7d} {file}:{frame.f_lineno}] "
    # One write a line, so that lines of several threads never mix; a line break in a peer's data cannot forge a line.
    body = text.replace("\n", "\\n").replace("\r", "\\r")
    try:
        os.write(2, (head + body + "\n").encode("utf-8", "backslashreplace"))
    except OSError:
        pass  # nobody reads stderr any more; that is no reason to stop serving the node


def info(text: str) -> None:
    """Log what was done."""
    _write("I", text, 2)


def debug(text: str) -> None:
    """Log a detail that only `-v 1` and more shows."""
    if verbosity >= 1:
        _write("I", text, 2)


def warning(text: str) -> None:
    """Log what is odd but handled."""
    _write("W", text, 2)


def error(text: str) -> None:
    """Log what failed."""
    _write("E", text, 2)


def by_level(level: str, text: str) -> None:
    """Log by the name of a level (`info`, `warning`, `error`, `debug`): what stores are given."""
    if level == "debug" and verbosity < 1:
        return
    _write({"info": "I", "debug": "I", "warning": "W"}.get(level, "E"), text, 2)
