"""What can be wrong with a link: frozen, typed, no I/O.  Says it in the words of people, files and `tc`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

NETEM = "netem"
"""The kernel feature that every fault but `down` takes."""

QUEUE = 10_000
"""Packets that a slow link holds back before it drops: enough for a second of small ones."""

MAX_DELAY = 10_000.0
MAX_RATE = 100_000.0
MIN_RATE = 0.001

PERCENTAGES = ("loss", "reorder", "duplicate", "corrupt")
TIMES = ("delay", "jitter")

_UNITS: dict[str, dict[str, float]] = {
    "time": {"us": 0.001, "ms": 1.0, "s": 1000.0},
    "percentage": {"%": 1.0},
    "rate": {"kbit": 0.001, "mbit": 1.0, "gbit": 1000.0},
}
_EXAMPLES = {"time": "2ms", "percentage": "1%", "rate": "100mbit"}


@dataclass(frozen=True, slots=True)
class LinkFault:
    """What a link does to packets in one direction or in both; what is 0 it does not do.

    `delay` and `jitter` are milliseconds one way, so a round trip takes twice as long where both directions have
    them; `loss`, `reorder`, `duplicate` and `corrupt` are per cent of the packets, `rate` is Mbit/s.  `towards` names
    the end that the packets travel to, "" for both.  A link that is `down` has no carrier at either end.
    """

    delay: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    reorder: float = 0.0
    duplicate: float = 0.0
    corrupt: float = 0.0
    rate: float = 0.0
    down: bool = False
    towards: str = ""

    @property
    def needs_netem(self) -> bool:
        """Whether it takes more of the kernel than a link that can be set down."""
        return any(getattr(self, name) for name in (*TIMES, *PERCENTAGES, "rate"))

    def over(self, other: LinkFault) -> LinkFault:
        """Both faults at once; of what both say this one counts."""
        return LinkFault(**{f.name: getattr(self, f.name) or getattr(other, f.name) for f in fields(self)})

    def netem(self) -> tuple[str, ...]:
        """The words for `tc qdisc add dev … root`; empty where there is nothing for it to do."""
        if not self.needs_netem:
            return ()
        words = [NETEM, "limit", str(QUEUE)]
        if self.delay:
            words += ["delay", f"{_number(self.delay)}ms"]
            words += [f"{_number(self.jitter)}ms"] if self.jitter else []
        for name in PERCENTAGES:
            if getattr(self, name):
                words += [name, f"{_number(getattr(self, name))}%"]
        if self.rate:
            words += ["rate", f"{_number(self.rate * 1000)}kbit"]
        return tuple(words)

    def __str__(self) -> str:
        said = ["down"] if self.down else []
        if self.delay:
            said.append(f"delay {_number(self.delay)} ms" + (f" ± {_number(self.jitter)} ms" if self.jitter else ""))
        said += [f"{name} {_number(getattr(self, name))} %" for name in PERCENTAGES if getattr(self, name)]
        said += [f"rate {_number(self.rate)} Mbit/s"] if self.rate else []
        return ", ".join(said) + (f" towards {self.towards}" if self.towards else "")


def problems(fault: LinkFault, ends: Iterable[str] = ()) -> Iterator[tuple[str, str, str]]:
    """What is wrong with a fault as key, what and hint; `ends` are the machines of its link, where they are known."""
    for name in PERCENTAGES:
        if not 0 <= getattr(fault, name) <= 100:
            yield name, f"{_number(getattr(fault, name))} % is not from 0 to 100", ""
    for name in TIMES:
        if not 0 <= getattr(fault, name) <= MAX_DELAY:
            yield name, f"{_number(getattr(fault, name))} ms is not from 0 to {MAX_DELAY:g}", ""
    if fault.rate and not MIN_RATE <= fault.rate <= MAX_RATE:
        yield "rate", f"{_number(fault.rate)} Mbit/s is not from {MIN_RATE:g} to {MAX_RATE:g}", ""
    for name in ("jitter", "reorder"):
        if getattr(fault, name) and not fault.delay:
            why = "varies a delay" if name == "jitter" else "lets some packets go without the delay of the others"
            yield name, f"{name} {why}, and there is none", "give a delay too"
    ends = tuple(ends)
    if ends and fault.towards and fault.towards not in ends:
        yield "towards", f"{fault.towards} is no end of this link", f"{ends[0]} or {ends[1]}"
    if fault.down and fault.towards:
        yield "towards", "a link is down at both ends", "leave out towards"
    if not fault.down and not fault.needs_netem:
        yield "", "no fault", "give one of delay, loss, duplicate, corrupt, rate"


def quantity(kind: str, value: object) -> float:
    """Read `2ms`, `1%` or `100mbit` (`kind` is time, percentage or rate) as ms, per cent or Mbit/s.

    Raises ValueError that says what is wrong, and behind a semicolon how to mend it.
    """
    text = str(value).strip()
    units = _UNITS[kind]
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?) ?([a-z%]*)", text)
    if found and found[2] in units:
        return float(found[1]) * units[found[2]]
    hint = f"such as {_EXAMPLES[kind]}; units: {', '.join(units)}"
    if found and not found[2]:
        raise ValueError(f"{text} has no unit; {hint}")
    raise ValueError(f"{text[:40]!r} is no {kind}; {hint}")


def _number(value: float) -> str:
    return f"{value:.6f}".rstrip("0").rstrip(".")
