"""Looking at every interface of several machines at once, for as long as a packet is under way."""

from __future__ import annotations

import json
import os
import select
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from testbed.deadline import Deadline
from testbed.errors import LabError
from testbed.labs import interpreter
from testbed.labs.base import Process
from testbed.probes.packets import ETHERNET, RAW_IP
from testbed.trace.layout import Layout

LISTEN_SECONDS, END_SECONDS = 10.0, 10.0

_OUTGOING, _OTHER_HOST = 4, 3  # packet types of AF_PACKET
_MACS = (1, 772)  # device types whose packets begin with an Ethernet header; the second one is loopback's
_CHECKSUM_NOT_READY = 1 << 3


@dataclass(frozen=True, slots=True)
class Copy:
    """The packet on one interface of one place. `alien`: its MAC is not the interface's.

    `when` is in nanoseconds since 1970; `unfinished` that the checksum is left to a device.
    """

    machine: str
    place: str
    interface: str
    way: str
    alien: bool
    unfinished: bool
    when: int
    link_type: int
    data: bytes


@cache
def program(name: str) -> str:
    """The text of a program of this package."""
    return resources.files("testbed.trace").joinpath(name).read_text()


class _Watcher:
    """The sniffer of one machine."""

    def __init__(
        self, layout: Layout, machine: str, needles: Sequence[bytes], outer: Sequence[Mapping[str, int]]
    ) -> None:
        self.machine = machine
        order = {
            "spaces": layout.spaces(machine),
            "needles": [needle.hex() for needle in needles],
            "outer": list(outer),
        }
        argv = [interpreter(), "-I", "-S", "-c", program("sniffer.py")]
        self.process: Process = layout.lab.node(machine).spawn(argv, stdin=True)
        self.names: dict[str, dict[str, str]] = {}
        self.rest = b""
        assert self.process.stdin
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()

    def line(self, deadline: Deadline) -> dict[str, Any]:
        """The next line that it prints. Raises LabError where none comes."""
        assert self.process.stdout
        descriptor = self.process.stdout.fileno()
        while b"\n" not in self.rest:
            if not select.select([descriptor], [], [], deadline.left)[0]:
                raise LabError("looking at the interfaces did not begin, or end, in time", where=self.machine)
            data = os.read(descriptor, 1 << 20)
            if not data:
                assert self.process.stderr
                said = self.process.stderr.read().decode(errors="replace").strip()
                raise LabError(f"looking at the interfaces failed: {said[-300:]}", where=self.machine)
            self.rest += data
        line, _, self.rest = self.rest.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End it."""
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        self.process.kill()
        self.process.wait(timeout=END_SECONDS)


class Watch:
    """The sniffers of several machines. Use as a context manager: it looks from its beginning to `packets()`.

    Raises LabError where a machine cannot be looked at.
    """

    def __init__(
        self, layout: Layout, machines: Sequence[str], needles: Sequence[bytes], outer: Sequence[Mapping[str, int]] = ()
    ) -> None:
        self.faults: list[str] = []
        self.watchers: list[_Watcher] = []
        try:
            for machine in machines:
                self.watchers.append(_Watcher(layout, machine, needles, outer))
            deadline = Deadline(LISTEN_SECONDS)
            for watcher in self.watchers:
                told = watcher.line(deadline)
                watcher.names = told["interfaces"]
                self.faults += [f"not looked at: {fault}" for fault in told["faults"]]
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        for watcher in self.watchers:
            watcher.close()

    def packets(self) -> list[Copy]:
        """End looking, and return every copy in the order of time."""
        for watcher in self.watchers:
            assert watcher.process.stdin
            watcher.process.stdin.close()
        deadline, found = Deadline(END_SECONDS), []
        for watcher in self.watchers:
            # One process reads them in order, so a stable sort keeps those right that have the same time.
            found += [_copy(watcher, one) for one in watcher.line(deadline)["packets"]]
        return sorted(found, key=lambda copy: copy.when)


def _copy(watcher: _Watcher, one: Mapping[str, Any]) -> Copy:
    name = watcher.names[one["space"]].get(str(one["interface"])) or one["interface"] or f"#{one['interface']}"
    return Copy(
        machine=watcher.machine,
        place=one["space"],
        interface=str(name),
        way="out" if one["packet_type"] == _OUTGOING else "in",
        alien=one["packet_type"] == _OTHER_HOST,
        unfinished=bool(one["status"] & _CHECKSUM_NOT_READY),
        when=one["when"],
        link_type=ETHERNET if one["device_type"] in _MACS else RAW_IP,
        data=bytes.fromhex(one["data"]),
    )
