"""What tcpdump selects of packets that were captured, by a filter as people write it into tutorials."""

from __future__ import annotations

import re
from importlib import resources

from testbed.labs import interpreter
from testbed.labs.base import Place

_STAMP = re.compile(r"^(\d+\.\d{6}) ", re.MULTILINE)
_START = "answer_setgroups()\nos.execvp('tcpdump', sys.argv[1:])\n"


def selected(place: Place, pcap: bytes, expression: str) -> list[float]:
    """When the packets of a pcap file were captured that a filter selects, as Unix times. Raises CommandError."""
    # tcpdump gives up its privileges even to read a file, which a lab refuses: see `tapper`.
    program = resources.files("testbed.probes").joinpath("tapper.py").read_text().removesuffix("main()\n") + _START
    tcpdump = ["tcpdump", "-n", "-q", "-tt", "-Z", "root", "-r", "-", expression]
    argv = [interpreter(), "-I", "-S", "-c", program, *tcpdump]
    return [float(stamp) for stamp in _STAMP.findall(place.run(argv, stdin=pcap).stdout)]
