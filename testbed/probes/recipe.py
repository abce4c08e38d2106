"""What tcpdump selects of packets that were captured, by a filter as people write it into tutorials."""

from __future__ import annotations

import re

from testbed.labs.base import Place

_STAMP = re.compile(r"^(\d+\.\d{6}) ", re.MULTILINE)


def selected(place: Place, pcap: bytes, expression: str) -> list[float]:
    """When the packets of a pcap file were captured that a filter selects, as Unix times. Raises CommandError."""
    # The user that tcpdump changes to where it is not told one is not there in a lab of an ordinary user.
    argv = ["tcpdump", "-n", "-q", "-tt", "-Z", "root", "-r", "-", expression]
    return [float(stamp) for stamp in _STAMP.findall(place.run(argv, stdin=pcap).stdout)]
