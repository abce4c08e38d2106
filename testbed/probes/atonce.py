"""Runs several commands side by side. A program, not a module: `python -I -S -c SOURCE`, its order on standard input.

The order is {"commands": [{"argv": […], "stdin": TEXT, "netns": PATH or "", "keep": "start" or "end"}, …],
"seconds": …, "limit": …}: what takes longer than `seconds` is killed, and of an output no more than `limit` bytes are
kept.  It prints a JSON list with {"rc": … (null: killed), "out": …, "err": …, "cut": bytes} of each.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from typing import Any

ERRORS = 2000
"""Bytes of a command's standard error that are kept."""


class Running:
    """One command, and what it has printed so far."""

    def __init__(self, order: dict[str, Any], limit: int) -> None:
        self.keep_end = order.get("keep") == "end"
        self.limit = limit
        self.out, self.err, self.seen = b"", b"", 0
        self.process: subprocess.Popen[bytes] | None = None
        inside = ["nsenter", f"--net={order['netns']}", "--"] if order.get("netns") else []
        try:
            self.process = subprocess.Popen(
                [*inside, *order["argv"]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            assert self.process.stdin
            with contextlib.suppress(BrokenPipeError):  # a pipe has room for as much as these are
                self.process.stdin.write(order.get("stdin", "").encode())
                self.process.stdin.close()
        except OSError as error:
            self.err = f"{order['argv'][0]}: {error.strerror}".encode()

    def take(self, data: bytes) -> None:
        self.seen += len(data)
        joined = self.out + data
        self.out = joined[-self.limit :] if self.keep_end else joined[: self.limit]

    def complain(self, data: bytes) -> None:
        self.err = (self.err + data)[:ERRORS]

    def answer(self) -> dict[str, Any]:
        code = 127
        if self.process is not None:
            ended = self.process.poll()
            if ended is None:
                self.process.kill()
                self.process.wait()
            code = -255 if ended is None else ended
        out, err = self.out.decode(errors="replace"), self.err.decode(errors="replace")
        return {"rc": None if code == -255 else code, "out": out, "err": err, "cut": self.seen - len(self.out)}


def main() -> None:
    """Start all, read until all have ended or the time is over, answer."""
    order = json.loads(sys.stdin.buffer.read())
    end = time.monotonic() + order["seconds"]
    running = [Running(one, order["limit"]) for one in order["commands"]]
    selector = selectors.DefaultSelector()
    for one in running:
        if one.process is not None:
            selector.register(one.process.stdout, selectors.EVENT_READ, one.take)  # type: ignore[arg-type]
            selector.register(one.process.stderr, selectors.EVENT_READ, one.complain)  # type: ignore[arg-type]
    while selector.get_map() and (left := end - time.monotonic()) > 0:
        for key, _ in selector.select(left):
            data = os.read(key.fd, 1 << 16)
            if data:
                key.data(data)
            else:
                selector.unregister(key.fileobj)
    for one in running:
        if one.process is not None and not selector.get_map():
            one.process.wait()
    json.dump([one.answer() for one in running], sys.stdout)


main()
