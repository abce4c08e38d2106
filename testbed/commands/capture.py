"""`testbed capture`: show or save the packets of an interface."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import click

from testbed.commands.labs import find_lab, find_place, name_option
from testbed.errors import InputError, LabError
from testbed.labs import interpreter
from testbed.labs.base import Process
from testbed.labs.netnsnode import NetnsNode
from testbed.model import UNDERLAY
from testbed.probes.capture import MOST_ROOM_KIB

if TYPE_CHECKING:
    from testbed.labs.kinds import AnyLab


def parse_target(lab: AnyLab, text: str) -> tuple[NetnsNode, str]:
    """Read `NODE:IFACE`, `NODE/POD` or `NODE/POD:IFACE`. Raises InputError naming what there is."""
    endpoint, _, iface = text.partition(":")
    place = find_place(lab, endpoint)
    iface = iface or UNDERLAY
    listing = place.run(["ip", "-br", "link"]).stdout
    present = [line.split()[0].partition("@")[0] for line in listing.splitlines()]
    if iface not in present:
        raise InputError(f"{endpoint} has no interface {iface}", hint=f"it has: {', '.join(present)}")
    return place, iface


def start_tcpdump(place: NetnsNode, iface: str, output: int, expression: str) -> tuple[Process, BinaryIO]:
    """Start a tcpdump whose packets go to the descriptor `output`; it ends with the returned process.

    Returns what it says, too.
    """
    program = resources.files("testbed.probes").joinpath("tapper.py").read_text()
    messages, saying = os.pipe()
    argv = [interpreter(), "-I", "-S", "-c", program, expression, str(MOST_ROOM_KIB), f",{iface},{output},{saying}"]
    try:
        process = place.spawn(argv, pass_fds=[output, saying], stdin=True)
    finally:
        os.close(saying)
    return process, os.fdopen(messages, "rb")


def _output(write: Path | None, count: int | None) -> tuple[int, subprocess.Popen[bytes] | None]:
    """Where the packets go: a file, or a tcpdump of the host's that prints them."""
    if write is None:
        limit = ["-c", str(count)] if count else []
        # In a session of its own: at Ctrl-C it ends with its input, and not before.
        argv = ["tcpdump", "-n", "-e", "-l", "-r", "-", *limit]
        reader = subprocess.Popen(argv, stdin=subprocess.PIPE, start_new_session=True)
        assert reader.stdin is not None
        return reader.stdin.fileno(), reader
    if str(write) == "-":
        return sys.stdout.fileno(), None
    try:
        return os.open(write, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), None
    except OSError as error:
        raise LabError(f"cannot write there: {error.strerror}", where=str(write)) from error


@click.command()
@name_option
@click.option("-w", "--write", type=click.Path(path_type=Path), metavar="FILE", help="Save as pcap; - for stdout.")
@click.option("-c", "--count", type=click.IntRange(min=1), help="End after so many packets are shown.")
@click.argument("target", metavar="NODE:IFACE|NODE/POD[:IFACE]")
@click.argument("expression", nargs=-1)
def capture(name: str | None, write: Path | None, count: int | None, target: str, expression: tuple[str, ...]) -> int:
    """Show or save the packets of an interface until Ctrl-C; EXPRESSION is tcpdump's."""
    if count and write:
        raise InputError("--count goes with packets that are shown, not with --write")
    place, iface = parse_target(find_lab(name), target)
    output, reader = _output(write, count)
    process, messages = start_tcpdump(place, iface, output, " ".join(expression))
    if reader:
        assert reader.stdin is not None
        reader.stdin.close()
        threading.Thread(target=_end_with, args=(reader, process), daemon=True).start()
    try:
        return _follow(messages)
    except KeyboardInterrupt:
        return 0  # how a capture is meant to end
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        process.wait()
        if reader:
            reader.wait()


def _end_with(reader: subprocess.Popen[bytes], process: Process) -> None:
    """End the capture once its reader has shown enough."""
    reader.wait()
    process.terminate()


def _follow(messages: BinaryIO) -> int:
    """Pass on what tcpdump says, until it ends. Raises LabError where it could not start."""
    listening = False
    said = b""
    for line in messages:
        said = line
        listening = listening or b"listening on" in line
        sys.stderr.write(line.decode(errors="replace"))
        sys.stderr.flush()
    if not listening:
        raise LabError(f"tcpdump did not start: {said.decode(errors='replace').strip()}")
    return 0
