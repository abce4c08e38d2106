"""`--pause-on-fail`: stop where a check fails, with the lab up, and tell how to get in."""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from testbed.errors import Fault
from testbed.interrupts import has_terminal
from testbed.options import IN_GUEST

if TYPE_CHECKING:
    from testbed.options import RunOptions
    from testbed.report.record import Outcome

Say = Callable[[str], None]


def faults(options: RunOptions, *, several: bool) -> list[Fault]:
    """What is wrong with the options about pauses. `several`: there are several labs side by side."""
    found = []
    if options.pause_seconds is not None and not options.pause_on_fail:
        found.append(Fault("command line", 0, "--pause-timeout", "nothing pauses", "--pause-on-fail"))
    if options.pause_seconds is not None and options.pause_seconds <= 0:
        found.append(Fault("command line", 0, "--pause-timeout", "that is no time", "--pause-timeout 600"))
    if not options.pause_on_fail:
        return found
    if several:
        what = "several labs side by side cannot pause"
        found.append(Fault("command line", 0, "--pause-on-fail", what, "without -n"))
    elif os.environ.get(IN_GUEST):
        what = "a lab in a guest cannot be entered while a run pauses"
        found.append(Fault("command line", 0, "--pause-on-fail", what, "--kernel host"))
    elif options.pause_seconds is None and not has_terminal():
        what = "there is no terminal at which somebody could end a pause"
        found.append(Fault("command line", 0, "--pause-on-fail", what, "--pause-timeout SECONDS"))
    return found


def commands(options: RunOptions, outcome: Outcome) -> list[str]:
    """How to get in: a shell at either end and on their nodes, a capture, and a trace."""
    name = f"--name {options.name}"
    ends = outcome.path
    nodes = outcome.nodes or []
    lines = [f"testbed status {name}"]
    lines += [f"testbed shell {name} {place}" for place in dict.fromkeys([*ends, *nodes]) if place]
    lines += [f"testbed capture {name} {node}:eth0" for node in nodes[-1:]]
    if len(ends) == 2:
        traced = _trace(outcome)
        source, target = traced.get("source", ends[0]), traced.get("target", ends[1])
        lines.append(f"testbed trace {name}{_like_the_lost(outcome)} {source} {target}")
    return lines


def _like_the_lost(outcome: Outcome) -> str:
    """Options for a trace by such a packet as was traced behind the check: a small one may come through."""
    packet = _trace(outcome).get("packet")
    if not packet:
        return ""
    size = f" --size {packet['size']}" if packet["protocol"] != "tcp" else ""
    return f" --proto {packet['protocol']}{size}{' --df' * packet['dont_fragment']}"


def _trace(outcome: Outcome) -> dict[str, Any]:
    """The trace behind a check; {} where there is none."""
    return dict((outcome.evidence or {}).get("trace") or {})


def pause(options: RunOptions, outcome: Outcome, folder: str, say: Say) -> None:
    """Stop until Enter is pressed, or the time is over."""
    say(f"paused: {outcome.item} {outcome.verdict}; lab {options.name} is up")
    for line in commands(options, outcome):
        say(f"  {line}")
    if folder:
        say(f"captures and state: {folder}")
    limit = options.pause_seconds
    after = f"; it goes on by itself after {limit:g} s" if limit is not None else ""
    say(f"Enter goes on, Ctrl-C ends the run{after}" if has_terminal() else f"it goes on after {limit:g} s")
    _wait(limit)
    say("going on")


def _wait(limit: float | None) -> None:
    """Until a line comes from the terminal; pytest has standard input."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        select.select([], [], [], limit)
        return
    try:
        if select.select([terminal], [], [], limit)[0]:
            os.read(terminal, 4096)
    finally:
        os.close(terminal)
