"""Faults of a lab's links while it runs: made by `tc` and `ip` at the links' ends, and undone again."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from testbed.deadline import Deadline
from testbed.doctor import probe_features
from testbed.errors import CommandError, Fault, InputError, LabError
from testbed.labs.base import Lab
from testbed.labs.fabric import wait_converged
from testbed.linkfault import NETEM, LinkFault, problems
from testbed.model import VRF, LabSpec, LinkEnd, LinkSpec

UNKNOWN_QDISC = "qdisc kind is unknown"


class FaultyLab(Lab, Protocol):
    """A lab that keeps which faults its links have."""

    @property
    def link_faults(self) -> LinkFaults:
        """The faults that were made since this process has known the lab."""
        ...

    def remember(self, **facts: Any) -> None:
        """Keep facts about the lab for later commands."""
        ...


NOTICED_SECONDS = 10.0
"""How long routing may take to see that a link is down: BGP's hold time, if nothing else tells it."""

WHAT_FOR = {NETEM: "which faults of links are made with", VRF: "which leaves are to have"}


def lacks(where: str, features: Iterable[str]) -> LabError:
    """The error of a kernel that has not all that a lab, or a fault of a link, takes."""
    what = " and ".join(f"no {feature}, {WHAT_FOR[feature]}" for feature in features)
    return LabError(
        f"this machine's kernel has {what}",
        where=where,
        hint="`testbed run … --kernel guest` takes a kernel that has it; `testbed doctor` says what this one lacks",
    )


def require_features(spec: LabSpec) -> None:
    """Raise LabError where this kernel lacks what the lab's topology takes beside what every lab does."""
    if spec.kernel_features:
        found = probe_features()
        missing = [name for name in spec.kernel_features if not found.get(name, {}).get("ok")]
        if missing:
            raise lacks(spec.topology, missing)


@dataclass(frozen=True, slots=True, eq=False)
class _Made:
    """A fault that was made; two equal ones are still two."""

    link: LinkSpec
    fault: LinkFault


class LinkFaults:
    """The faults that were made in a lab, beside those that its topology declares."""

    def __init__(self) -> None:
        self.made: list[_Made] = []

    def at(self, link: LinkSpec, end: LinkEnd) -> LinkFault:
        """All that happens to what this end of the link sends: what its topology declares, and the latest first."""
        faults = [link.fault] if link.fault else []
        faults += [made.fault for made in self.made if made.link == link]
        here = LinkFault()
        for fault in faults:
            if end in link.senders(fault):
                here = replace(fault, towards="").over(here)
        return here

    def down(self, link: LinkSpec) -> bool:
        """Whether a link has no carrier."""
        return any(made.fault.down for made in self.made if made.link == link)

    def texts(self, spec: LabSpec) -> dict[str, str]:
        """Every link's faults in words, by its name."""
        return {link.name: text for link in spec.links if (text := self.text(link))}

    def text(self, link: LinkSpec) -> str:
        """A link's faults in words, "" where it has none; each direction by itself where they differ."""
        there, back = self.at(link, link.a), self.at(link, link.b)
        if there == back:
            return str(there)
        ways = (replace(there, towards=link.b.node), replace(back, towards=link.a.node))
        return "; ".join(str(way) for way in ways if way.needs_netem)


def declared(spec: LabSpec) -> dict[str, str]:
    """The faults that a topology declares in words, by the links' names."""
    return LinkFaults().texts(spec)


def present(spec: LabSpec, facts: Mapping[str, Any]) -> Mapping[str, str]:
    """The faults that a lab's links have, in words by the links' names, from what is remembered of the lab."""
    found: Mapping[str, str] = facts.get("faults", declared(spec))
    return found


@contextlib.contextmanager
def fault(lab: FaultyLab, name: str, wanted: LinkFault) -> Iterator[LinkSpec]:
    """Give a link a fault for as long as the block lasts; see `NetnsLab.fault`."""
    link = _checked(lab.spec, name, wanted)
    made, faults = _Made(link, wanted), lab.link_faults
    before = {end: faults.at(link, end) for end in (link.a, link.b)}
    faults.made.append(made)
    try:
        _apply(lab, link, before)
    except BaseException:
        with contextlib.suppress(LabError):
            _undo(lab, made)
        raise
    try:
        yield link
    except Exception:
        with contextlib.suppress(LabError):  # what went wrong inside is what has to be told
            _undo(lab, made)
            _settle(lab, made)
        raise
    except BaseException:
        with contextlib.suppress(LabError):
            _undo(lab, made)
        raise
    else:
        _undo(lab, made)
        _settle(lab, made)


def _checked(spec: LabSpec, name: str, wanted: LinkFault) -> LinkSpec:
    try:
        link = spec.link(name)
    except KeyError:
        known = ", ".join(link.name for link in spec.links[:20])
        raise InputError(f"{spec.topology} has no link {name!r}", where="fault", hint=f"links: {known}") from None
    wrong = [
        Fault("fault", 0, key or name, what, hint) for key, what, hint in problems(wanted, (link.a.node, link.b.node))
    ]
    if wrong:
        raise InputError(faults=wrong)
    return link


def _undo(lab: FaultyLab, made: _Made) -> None:
    faults, link = lab.link_faults, made.link
    before = {end: faults.at(link, end) for end in (link.a, link.b)}
    faults.made = [other for other in faults.made if other is not made]
    _apply(lab, link, before)


def _apply(lab: FaultyLab, link: LinkSpec, before: dict[LinkEnd, LinkFault]) -> None:
    """Bring the link's ends from what they did before to what they have to do now."""
    faults = lab.link_faults
    # Kept first, so that a command that fails leaves no fault that nobody is told of.
    lab.remember(faults=faults.texts(lab.spec))
    for end, was in before.items():
        now = faults.at(link, end)
        if now.netem() == was.netem():
            continue
        # Never changed in place: what is not given again would stay.
        if was.netem():
            lab.node(end.node).run(["tc", "qdisc", "del", "dev", end.iface, "root"], check=not now.netem())
        if now.netem():
            add_netem(lab, end, now)
    # This end has no address of its own, so that nothing but the carrier is lost with it.
    if faults.down(link) and not before[link.b].down:
        lab.node(link.b.node).run(["ip", "link", "set", link.b.iface, "down"])
    elif before[link.b].down and not faults.down(link):
        _wait_noticed(lab, link)
        lab.node(link.b.node).run(["ip", "link", "set", link.b.iface, "up"])
        _wait_carrier(lab, link)


def _wait_carrier(lab: Lab, link: LinkSpec) -> None:
    """Let both ends have their carrier, which the kernel gives them up to a second later."""

    def up(end: LinkEnd) -> bool:
        done = lab.node(end.node).run(["ip", "-j", "link", "show", "dev", end.iface])
        return bool(json.loads(done.stdout)[0]["operstate"] == "UP")

    if not Deadline(NOTICED_SECONDS).poll(lambda: (up(link.a) and up(link.b)) or None):
        raise LabError(f"{link.name} has no carrier {NOTICED_SECONDS:.0f} s after it was set up again")


def _wait_noticed(lab: Lab, link: LinkSpec) -> None:
    """Let routing follow a link that is down: of one that is up again at once it would fall over only later."""
    routers = [end for end in (link.a, link.b) if lab.node(end.node).spec.routes]
    if len(routers) == 2:
        Deadline(NOTICED_SECONDS).poll(lambda: not any(_routes_by(lab, end) for end in routers) or None)


def _routes_by(lab: Lab, end: LinkEnd) -> list[str]:
    """The prefixes that a router still reaches by an interface, by what BGP has told it."""
    node = lab.node(end.node)
    where = ("vrf", node.spec.vrf) if node.spec.vrf else ()
    routes = json.loads(node.run(["ip", "-j", "-4", "route", "show", "proto", "bgp", *where]).stdout)
    return [route["dst"] for route in routes if end.iface in [hop.get("dev") for hop in route.get("nexthops", [route])]]


def add_netem(lab: Lab, end: LinkEnd, fault: LinkFault) -> None:
    """Do to what an interface sends what a fault says. Raises LabError where the kernel cannot."""
    done = lab.node(end.node).run(["tc", "qdisc", "add", "dev", end.iface, "root", *fault.netem()], check=False)
    if UNKNOWN_QDISC in done.stderr:
        raise lacks(str(end), [NETEM])
    if not done.ok:
        raise CommandError(done.where, done.argv, done.rc, done.stderr)


def _settle(lab: FaultyLab, made: _Made) -> None:
    """Wait until routing has followed a link that is up again, so that what comes next meets a whole fabric."""
    if made.fault.down and not any(other.fault.down for other in lab.link_faults.made):
        wait_converged(lab)
