"""The fabric's routing: has every router learned every rack, over every path?"""

from __future__ import annotations

import json
from ipaddress import IPv4Network, IPv6Network

from testbed.deadline import Deadline
from testbed.errors import LabError
from testbed.labs import interpreter
from testbed.labs.base import Lab
from testbed.model import LabSpec, NodeSpec, Role

CONVERGE_SECONDS = 20.0

ADVERTISE_SECONDS = 1
"""How often routers advertise themselves once they have found each other."""

#: Runs on a router: tells zebra a longer interval for each interface that its configuration has a fast one for.
_CALM = r"""
import re, socket, sys
text = open("/etc/frr/frr.conf").read()
ports = re.findall(r"^interface (\S+)\n(?:[ !].*\n)*? ipv6 nd ra-interval msec ", text, re.MULTILINE)
zebra = socket.socket(socket.AF_UNIX)
zebra.settimeout(5)
zebra.connect("/run/frr/zebra.vty")
commands = [words for port in ports for words in (f"interface {port}", f"ipv6 nd ra-interval {sys.argv[1]}", "exit")]
for command in ["enable", "configure terminal", *commands]:
    zebra.sendall(command.encode() + b"\0")
    answer = b""
    while answer[-4:-1] != b"\0\0\0":  # and behind them how it went
        answer += zebra.recv(4096) or sys.exit("zebra ended")
    if answer[-1]:
        sys.exit(f"zebra refused {command!r}: {answer[:-4].decode()}")
"""


def expected_paths(lab: LabSpec, router: NodeSpec) -> dict[IPv4Network | IPv6Network, int]:
    """What a router has to learn: each prefix that is not its own, with the number of equal paths to it.

    IPv6 prefixes are among them where the lab has IPv6.
    """
    spines = len(lab.of_role(Role.SPINE))
    leaves = lab.of_role(Role.LEAF)
    outside = lab.outside
    paths = 1 if router.role is Role.SPINE or not spines else spines
    far = [(leaf.bridge_address, leaf.bridge_address6) for leaf in leaves if leaf.name != router.name]
    if router.name != outside.name:
        far.append((outside.loopback, outside.loopback6))
    return {address.network: paths for pair in far for address in pair if address is not None}


def missing_paths(lab: Lab, router: NodeSpec) -> list[str]:
    """What a router has not learned yet, a line each."""
    have: dict[str, int] = {}
    for family, length in (("-4", 32), ("-6", 128)) if router.loopback6 else (("-4", 32),):
        argv = ["ip", "-j", family, "route", "show", *(("vrf", router.vrf) if router.vrf else ())]
        for route in json.loads(lab.node(router.name).run(argv).stdout):
            prefix = route["dst"] if "/" in route["dst"] else f"{route['dst']}/{length}"
            have[prefix] = len(route.get("nexthops", [0]))
    return [
        f"{router.name} has {have.get(str(prefix), 0)} of {paths} paths to {prefix}"
        for prefix, paths in expected_paths(lab.spec, router).items()
        if have.get(str(prefix), 0) != paths
    ]


def wait_converged(lab: Lab) -> None:
    """Wait until BGP has spread every route over every path. Raises LabError naming what is missing."""
    deadline = Deadline(CONVERGE_SECONDS)
    waiting = [node for node in lab.spec.nodes if node.routes]
    missing: list[str] = []

    def done() -> bool | None:
        missing.clear()
        for router in list(waiting):
            lines = missing_paths(lab, router)
            if lines:
                missing.extend(lines)
                return None  # the others are looked at once this one is there
            waiting.remove(router)
        return True

    if deadline.poll(done) is None:
        logs = ["/var/log/zebra.log", "/var/log/bgpd.log"]
        said = lab.node(waiting[0].name).run(["tail", "-n", "5", *logs], check=False).stdout.strip()
        raise LabError(
            f"BGP did not converge within {CONVERGE_SECONDS:.0f} s:\n  " + "\n  ".join([*missing, *said.splitlines()])
        )


def calm(lab: Lab) -> None:
    """Let the routers of a lab that has converged advertise themselves once a second.

    They find each other by their advertisements, so these come fast at first; but for intervals below a second zebra
    wakes a hundred times a second, which in a guest kernel takes a third of its time.
    """
    for router in (node.name for node in lab.spec.nodes if node.routes):
        argv = [interpreter(), "-I", "-S", "-c", _CALM, str(ADVERTISE_SECONDS)]
        lab.node(router).run(argv)
