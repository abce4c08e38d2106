"""What a check does while it runs: the commands it runs on nodes and the flows it sends, kept for its report.

Whoever runs a command or sends a packet notes it here; where no check is being followed that costs nothing.  It is
bounded, and it only remembers: what a check looks at stays where it is, in its window of the captures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

MOST_COMMANDS, MOST_FLOWS, MOST_ASSERTIONS = 80, 24, 60
"""How many of each are kept of one check; the rest is counted."""

OUTPUT = 2000
"""Characters that are kept of what a command printed: the end of it, where the errors are."""


@dataclass(slots=True)
class Command:
    """A command that ended, on a node or in a pod. `rc` is that of `Result`."""

    where: str
    argv: tuple[str, ...]
    rc: int
    seconds: float
    output: str = ""
    fed: bool = False  # it was given an input or variables, without which it does something else


@dataclass(slots=True)
class Flow:
    """Packets that a check sent: by which bytes captures know them, and how it ended."""

    what: str  # 3 pings of 56 bytes
    source: str  # worker1/client
    target: str  # an address
    marks: tuple[bytes, ...]
    answered: str = ""  # 2 of 3
    size: int = 0  # of a ping's or datagram's payload, in bytes; 0 for other flows
    dont_fragment: bool = False
    lost: int = 0  # packets, or requests, without an answer
    protocol: str = "icmp"  # icmp, udp or tcp
    port: int = 0  # the target's; 0 for ICMP


@dataclass(slots=True)
class Assertion:
    """Something a check asserted: in its own words, with the values that it saw and wanted."""

    text: str
    seen: str
    wanted: str = ""
    sign: str = ""
    held: bool = True
    times: int = 1
    line: int = 0


@dataclass
class Journal:
    """What one check has done so far."""

    commands: list[Command] = field(default_factory=list)
    flows: list[Flow] = field(default_factory=list)
    assertions: list[Assertion] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    late: list[str] = field(default_factory=list)  # what came only after several looks, and close to its deadline

    def _room(self, what: str, kept: Sequence[object], most: int) -> bool:
        if len(kept) < most:
            return True
        self.left_out[what] = self.left_out.get(what, 0) + 1
        return False

    def command(
        self, where: str, argv: Sequence[str], rc: int, seconds: float, output: str, *, fed: bool = False
    ) -> None:
        """Note a command. The output is kept of one that failed; of the others everybody can see it again."""
        if self._room("commands", self.commands, MOST_COMMANDS):
            self.commands.append(Command(where, tuple(argv), rc, seconds, output[-OUTPUT:] if rc else "", fed))

    def flow(self, flow: Flow) -> None:
        """Note packets that are about to be sent."""
        if self._room("flows", self.flows, MOST_FLOWS):
            self.flows.append(flow)

    def held(self, text: str, line: int) -> Assertion | None:
        """Note an assertion that held; the caller puts its values in.

        One that is made again, as in a loop, is one with the values of the first time: None is returned then, and
        where there are too many.
        """
        for known in reversed(self.assertions):
            if known.line == line and known.text == text:
                known.times += 1
                return None
        if not self._room("assertions", self.assertions, MOST_ASSERTIONS):
            return None
        self.assertions.append(Assertion(text, "", line=line))
        return self.assertions[-1]


_following: list[Journal] = []
_latest: list[Journal] = []


def current() -> Journal | None:
    """The journal of the check that runs; None where none is followed."""
    return _following[-1] if _following else None


def begin() -> Journal:
    """Follow a new check; whatever was followed before is over."""
    _following[:] = _latest[:] = [Journal()]
    return _following[0]


def latest() -> Journal | None:
    """The journal of the check that runs, also while nothing more is noted in it."""
    return _latest[-1] if _latest else None


def end() -> None:
    """Follow nothing any more."""
    _following.clear()
    _latest.clear()


@contextmanager
def paused() -> Iterator[None]:
    """What is done in here is no check's: bringing up the lab, say."""
    before = _following[:]
    _following.clear()
    try:
        yield
    finally:
        _following[:] = before
