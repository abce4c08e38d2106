"""Running a short program without `subprocess`, whose import alone costs a third of the daemon's start."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Mapping
from typing import NamedTuple

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Outcome(NamedTuple):
    """How a program ended. `code` is negative where a signal ended it, 127 where it is not there.

    `late`: it took too long, and was stopped.
    """

    code: int
    output: str
    errors: str
    late: bool = False


def find(name: str) -> str:
    """The program's path: by PATH, then in the usual places; empty where it is nowhere."""
    for folder in (os.environ.get("PATH", "") + ":" + _PATH).split(":"):
        path = os.path.join(folder, name)
        if folder and os.access(path, os.X_OK):
            return path
    return ""


def run(
    argv: list[str], text: str = "", timeout: float = 30.0, environment: Mapping[str, str] | None = None
) -> Outcome:  # fmt: skip
    """Run a program with `text` on its standard input and return what it said. Seconds of `timeout`; never raises."""
    files: list[int] = []
    try:
        path = find(argv[0])
        if not path:
            return Outcome(127, "", f"{argv[0]} is not installed")
        files += [os.memfd_create(name, os.MFD_CLOEXEC) for name in ("in", "out", "err")]
        os.write(files[0], text.encode("utf-8", "replace"))  # JSON may hold halves of characters
        os.lseek(files[0], 0, os.SEEK_SET)
        actions = [(os.POSIX_SPAWN_DUP2, file, number) for number, file in enumerate(files)]
        # A handler of ours must not run in the child, and a signal meant for the daemon must still reach it.
        default = [signal.SIGINT, signal.SIGTERM]
        process = os.posix_spawn(path, argv, environment or os.environ, file_actions=actions, setsigdef=default)
        code, late = _wait(process, timeout)
        return Outcome(code, _content(files[1]), _content(files[2]), late)
    except OSError as error:
        return Outcome(127, "", f"{argv[0]}: {error.strerror}")
    except ValueError as error:  # a zero byte, or half a character, where the kernel takes none
        return Outcome(127, "", f"{argv[0]}: {error}")
    finally:
        for file in files:
            os.close(file)


def _wait(process: int, timeout: float) -> tuple[int, bool]:
    handle = os.pidfd_open(process)
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        in_time = bool(poll.poll(timeout * 1000))
        if not in_time:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        return os.waitstatus_to_exitcode(status), not in_time
    finally:
        os.close(handle)


def _content(file: int) -> str:
    return os.pread(file, os.fstat(file).st_size, 0).decode("utf-8", "replace")
