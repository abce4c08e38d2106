"""Packets of one size that nobody may fragment, in many flows, so that each of several ways is tried."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from testbed.errors import LabError
from testbed.labs import interpreter
from testbed.labs.base import Place
from testbed.model import Role
from testbed.probes.flows import ECHO_PORT, ICMP_HEADERS, Target
from testbed.probes.iproute import read_state

if TYPE_CHECKING:
    from testbed.nodes.deploy import Cluster

# A datagram from each of several ports, with DF and whatever the kernel has learnt of the path, and who was answered.
# Few at a time, and up to three times: an echo has room for no more of such a size.
_SENDER = r"""
import json, select, socket, sys, time
target, port, count, size, wait = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
IP_MTU_DISCOVER, PROBE, ATTEMPTS, FEW = 10, 3, 3, 4
silent = []
for number in range(count):
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PROBE)
    sock.bind(("", 0))
    silent.append(sock)
for attempt in range(ATTEMPTS):
    for few in [silent[at : at + FEW] for at in range(0, len(silent), FEW)]:
        waiting = set(few)
        for sock in few:
            try:
                sock.sendto(bytes(size), (target, port))
            except OSError:
                pass
        end = time.monotonic() + wait
        while waiting and (left := end - time.monotonic()) > 0:
            for sock in select.select(list(waiting), [], [], left)[0]:
                try:
                    sock.recv(65535)
                    silent.remove(sock)
                    waiting.discard(sock)
                except OSError:
                    pass
print(json.dumps(sorted(sock.getsockname()[1] for sock in silent)))
"""


def unanswered(source: Place, target: Target, *, packet: int, flows: int, wait: float = 0.5) -> tuple[int, ...]:
    """The source ports of those flows to which no answer came, to an IPv4 packet of so many bytes in each.

    An echo has to listen there. `wait` is in seconds, for a few of them. Raises LabError where the sender cannot run.
    """
    words = [str(target), str(ECHO_PORT), str(flows), str(packet - ICMP_HEADERS), f"{wait:g}"]
    result = source.run([interpreter(), "-I", "-S", "-c", _SENDER, *words], timeout=wait * flows + 20)
    try:
        return tuple(int(port) for port in json.loads(result.stdout))
    except (ValueError, TypeError) as error:
        raise LabError(f"the sender printed no JSON: {result.stdout[:300]!r}", where=source.name) from error


def small_hops(cluster: Cluster, mtu: int) -> list[str]:
    """The ports of the lab's switches whose MTU is smaller, each as `leaf1:eth3 has 1500`."""
    spec, found = cluster.lab.spec, []
    for machine in spec.of_role(Role.LEAF, Role.SPINE):
        state = read_state(cluster.lab.node(machine.name), fdb=False)
        cabled = {end.iface for link in spec.links for end in (link.a, link.b) if end.node == machine.name}
        found += [
            f"{machine.name}:{one.name} has {one.mtu}" for one in state.links if one.name in cabled and one.mtu < mtu
        ]
    return found
