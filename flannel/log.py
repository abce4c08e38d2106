"""Log lines in klog's form on stderr: `I0629 14:28:35.866793    5522 daemon.py:386] text`."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

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


def unexpected(doing: str, error: BaseException | None) -> None:
    """Log an exception that nobody foresaw: its class and place, in one line; `-v 4` and more shows the way there.

    What it says is left out: it may hold what must not be in a log.
    """
    if error is None:
        return
    _write("E", f"{doing}: {place_of(error)}", 2)
    if verbosity >= 4:
        import traceback

        for frame in traceback.extract_tb(error.__traceback__):
            _write("I", f"  {os.path.basename(frame.filename)}:{frame.lineno} in {frame.name}: {frame.line}", 2)


def place_of(error: BaseException) -> str:
    """The class of an exception and where it was raised."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    where = f" at {os.path.basename(at.tb_frame.f_code.co_filename)}:{at.tb_lineno}" if at else ""
    return f"unexpected {type(error).__name__}{where}"


def by_level(level: str, text: str) -> None:
    """Log by the name of a level (`info`, `warning`, `error`, `debug`): what stores are given."""
    if level == "debug" and verbosity < 1:
        return
    _write({"info": "I", "debug": "I", "warning": "W"}.get(level, "E"), text, 2)


def without_userinfo(urls: str) -> str:
    """URLs, comma separated, without the names and passwords that may stand in them."""
    shown = []
    for url in urls.split(","):
        scheme, slashes, rest = url.partition("://") if "://" in url else ("", "", url)
        host, slash, path = rest.partition("/")
        user, _, host = host.rpartition("@")
        # Without a scheme it may be no URL at all: an interface can have a name such as eth0@if3.
        hide = user and (slashes or ":" in user)
        shown.append(f"{scheme}{slashes}***@{host}{slash}{path}" if hide else url)
    return ",".join(shown)


def quoted(value: Any) -> str:
    """Return a stranger's value for a log line: on one line, printable, and short."""
    text = ascii(value)
    return text if len(text) <= 100 else text[:97] + "..."
