"""What checks leave behind: the state of every machine and pod, looked at again after each check.

One process stays on each machine and reads its kernel's tables; a look costs about a millisecond of a machine's time
and tells only what has changed.
"""

from __future__ import annotations

import json
import os
import re
import select
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from testbed.deadline import Deadline
from testbed.labs import interpreter
from testbed.labs.inside import program
from testbed.probes.stateof import PROGRAM

if TYPE_CHECKING:
    from testbed.flannelspec import FlannelSpec
    from testbed.labs.base import Process
    from testbed.nodes.deploy import Cluster

LOOK_SECONDS = 5.0
"""How long a machine may take to tell its state; what is stopped or away has none."""

START_SECONDS = 30.0
"""The same for the first look, before which it is entered."""

MOST_LINES = 30
"""How many differences are told; the rest is counted."""

State = Mapping[str, tuple[str, ...]]
"""By place (`worker1`, `worker1/client`) what was found there, line by line."""


def as_it_is(state: State) -> State:
    """How a state is compared where nothing says otherwise."""
    return state


def machine_of(place: str) -> str:
    """The machine that a place is, or is on."""
    return place.partition("/")[0]


def machines_of(state: State) -> set[str]:
    """The machines that have told their state."""
    return {machine_of(place) for place in state}


def _program() -> str:
    return program(*PROGRAM, package="testbed.probes")


def differences(before: State, after: State) -> list[str]:
    """What is there only before (`-`) or only after (`+`), each with its place; places of one alone are named."""
    lines = []
    for place in sorted({*before, *after}):
        old, new = before.get(place), after.get(place)
        if old is None or new is None:
            lines.append(f"{place}: {'+' if old is None else '-'} the network of {place}")
            continue
        gone, come = list(old), list(new)
        for line in old:
            if line in come:
                come.remove(line)
        for line in new:
            if line in gone:
                gone.remove(line)
        lines += [f"{place}: - {line}" for line in gone]
        lines += [f"{place}: + {line}" for line in come]
        if old != new and not gone and not come:
            lines.append(f"{place}: + the order of the rules is another one")
    if len(lines) > MOST_LINES:
        lines[MOST_LINES:] = [f"and {len(lines) - MOST_LINES} more"]
    return lines


def tunnel_devices(flannel: FlannelSpec) -> list[str]:
    """The names of a configuration's tunnel devices."""
    return [name for name in (flannel.tunnel_device, flannel.tunnel_device6) if name]


def with_tunnels_named(state: State, devices: Collection[str]) -> State:
    """The same with the MACs of tunnel devices by whose they are: one that was made anew has another MAC, as it may."""
    names: dict[str, str] = {}
    for place, lines in state.items():
        for line in lines:
            words = line.split()
            if words[:1] == ["link"] and words[1] in devices and "mac" in words:
                names[words[words.index("mac") + 1]] = f"({place}'s {words[1]})"
    mac = re.compile("|".join(names) or "(?!)")
    return {
        place: tuple(_in_order(mac.sub(lambda found: names[found[0]], line) for line in lines))
        for place, lines in state.items()
    }


def _in_order(lines: Iterable[str]) -> list[str]:
    """Lines in the order that they are told in, where some of their words were changed: all but rules are sorted."""
    found = list(lines)
    return sorted(line for line in found if not line.startswith("rules ")) + [
        x for x in found if x.startswith("rules ")
    ]


@dataclass
class _Machine:
    """The process on one machine, and what it told last; None where it cannot tell."""

    name: str
    process: Process
    state: Mapping[str, tuple[str, ...]] | None = None
    rest: bytes = b""
    gone: bool = False  # the process has ended

    def ask(self) -> None:
        """Ask for its state."""
        with suppress(OSError):
            assert self.process.stdin
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()

    def answer(self, deadline: Deadline) -> bool:
        """Take its answer; False where there is none."""
        assert self.process.stdout
        descriptor = self.process.stdout.fileno()
        while b"\n" not in self.rest:
            if not select.select([descriptor], [], [], deadline.left)[0]:
                return False
            data = os.read(descriptor, 1 << 20)
            if not data:
                self.gone = True
                return False
            self.rest += data
        line, _, self.rest = self.rest.partition(b"\n")
        told = json.loads(line)
        if "state" in told:
            self.state = {place: tuple(lines) for place, lines in told["state"].items()}
        return True

    def close(self) -> None:
        """End it."""
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        with suppress(OSError):
            self.process.kill()
        self.process.wait(timeout=LOOK_SECONDS)


@dataclass
class StateWatch:
    """The state of a lab's machines. `seconds` is what looking has cost so far."""

    cluster: Cluster
    readings: int = 0
    seconds: float = 0.0
    _machines: dict[str, _Machine] = field(default_factory=dict)

    def read(self) -> State:
        """The state of every machine and pod now; a machine that does not answer in time is left out."""
        began = time.monotonic()
        if lost := self._ask(list(self.cluster.lab.nodes)):
            self._ask(lost)  # they were started anew since, and their processes ended with what they were before
        names = {f"cni-{pod.container_id[:12]}": pod.name for pod in self.cluster.pods.values()}
        found: dict[str, tuple[str, ...]] = {}
        for machine in self._machines.values():
            for space, lines in (machine.state or {}).items():
                place = names.get(space, f"{machine.name}/{space}") if space else machine.name
                found[place] = lines
        self.readings += 1
        self.seconds += time.monotonic() - began
        return found

    def _ask(self, names: Sequence[str]) -> list[str]:
        """Have these machines tell their state; returns those whose process is gone, which is another one next time."""
        for name in names:
            if name not in self._machines:
                argv = [interpreter(), "-I", "-S", "-c", _program(), self.cluster.flannel.rules]
                self._machines[name] = _Machine(name, self.cluster.lab.node(name).spawn(argv, stdin=True))
        machines = [self._machines[name] for name in names]
        for machine in machines:
            machine.ask()
        deadlines = {True: Deadline(START_SECONDS), False: Deadline(LOOK_SECONDS)}
        gone = []
        for machine in machines:
            if not machine.answer(deadlines[machine.state is None]):
                if machine.gone:
                    gone.append(machine.name)
                machine.close()
                del self._machines[machine.name]
        return gone

    def settled(self, before: State, seconds: float, seen_as: Callable[[State], State] = as_it_is) -> State:
        """The state once it is as it was before, both `seen_as`, or once that takes longer than some seconds."""
        last: list[State] = []

        def same() -> State | None:
            last[:] = [self.read()]
            return last[0] if seen_as(last[0]) == seen_as(before) else None

        return Deadline(seconds).poll(same, every=0.1) or last[0]

    def close(self) -> None:
        """End the processes."""
        for machine in self._machines.values():
            machine.close()
        self._machines.clear()
