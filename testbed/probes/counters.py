"""Counters of the kernel's IP layer."""

from __future__ import annotations

from testbed.errors import LabError
from testbed.labs.base import Place

MADE, TAKEN, MADE6, TAKEN6 = "FragCreates", "ReasmReqds", "Ip6FragCreates", "Ip6ReasmReqds"


def fragments(place: Place) -> int:
    """Fragments that a machine has made, and fragments that it was to put together, since it started; IPv4 and IPv6.

    Raises LabError where the kernel tells nothing of them.
    """
    lines = place.run(["cat", "/proc/net/snmp"]).stdout.splitlines()
    rows = [line.split() for line in lines if line.startswith("Ip:")]
    six = [line.split() for line in place.run(["cat", "/proc/net/snmp6"], check=False).stdout.splitlines()]
    try:
        names, values = rows
        counted = dict(zip(names, values, strict=True))
        counted |= {row[0]: row[1] for row in six if len(row) == 2}
        return sum(int(counted.get(name, 0)) for name in (MADE6, TAKEN6)) + sum(int(counted[k]) for k in (MADE, TAKEN))
    except (ValueError, KeyError) as error:
        raise LabError(f"the kernel's IP counters cannot be read: {error!r}", where=place.name) from error
