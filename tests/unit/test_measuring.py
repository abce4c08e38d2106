"""What measures: bulk flows over loopback, the kernel's counters, figures on their way into the report."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from types import SimpleNamespace
from typing import Any

import pytest

from testbed.errors import LabError
from testbed.fixtures import FIGURE, Figures
from testbed.labs.base import Result
from testbed.probes.bulk import GIB, Bulk, best_share, linked, quantile
from testbed.probes.counters import fragments

HERE = IPv4Address("127.0.0.1")


@dataclass
class Here:
    """This machine as a place; `answers` are what commands print instead of being run."""

    answers: Mapping[str, str]
    name: str = "here"

    def run(self, argv: Sequence[str], **_: Any) -> Result:
        return Result(self.name, tuple(argv), 0, self.answers.get(argv[-1], ""), "", 0.0)

    def spawn(
        self, argv: Sequence[str], *, pass_fds: Sequence[int] = (), stdin: bool = False
    ) -> subprocess.Popen[bytes]:  # fmt: skip
        pipe = subprocess.PIPE
        return subprocess.Popen(argv, stdin=pipe if stdin else None, stdout=pipe, stderr=pipe, pass_fds=pass_fds)


def free_port() -> int:
    with socket.create_server((str(HERE), 0)) as server:
        return int(server.getsockname()[1])


def test_bulk_flows_say_how_much_arrived() -> None:
    with linked(Here({}), Here({}), HERE, free_port()) as link:
        one, many = link.tcp(streams=1, seconds=0.1), link.tcp(streams=8, seconds=0.1)
        assert link.lost(datagrams=50, size=500, pace=1000) == 0
    for flow in (one, many):
        assert flow.size > 1 << 20
        assert 0.1 <= flow.seconds < 10
        assert flow.cpu > 0
        assert flow.rate == 8 * flow.size / flow.seconds


def test_what_does_not_arrive_is_lost() -> None:
    """More than a datagram can hold is not sent at all."""
    with linked(Here({}), Here({}), HERE, free_port()) as link:
        assert link.lost(datagrams=5, size=70000, pace=1000) == 1


def test_a_flow_that_breaks_is_the_products_failure_and_a_port_in_use_the_labs() -> None:
    port = free_port()
    with linked(Here({}), Here({}), HERE, port) as link:
        link.receiver.kill()
        link.receiver.wait()
        with pytest.raises(AssertionError, match="from here to here broke: ConnectionRefused"):
            link.tcp(streams=1, seconds=0.1)
        link.sender.kill()
        link.sender.wait()
        with pytest.raises((LabError, AssertionError)):
            link.tcp(streams=1, seconds=0.1)
    with linked(Here({}), Here({}), HERE, port), pytest.raises(LabError, match="nothing listens.*in use"):
        linked(Here({}), Here({}), HERE, port).__enter__()


def test_the_best_of_all_turns_counts() -> None:
    ours = [Bulk(GIB, 4.0, 0, 2.0), Bulk(GIB, 2.0, 0, 3.0)]
    others = [Bulk(GIB, 1.0, 0, 1.0), Bulk(GIB, 8.0, 0, 9.0)]
    assert best_share(ours, others) == (0.5, 0.5)
    # A kernel that has counted no tick.
    assert best_share(ours, [Bulk(2 * GIB, 2.0, 0, 0.0)]) == (0.5, 500.0)


@pytest.mark.parametrize(("share", "value"), [(0.0, 1.0), (0.5, 3.0), (0.99, 4.0), (1.0, 4.0)])
def test_quantile(share: float, value: float) -> None:
    assert quantile([4.0, 1.0, 3.0, 2.0], share) == value


def test_fragments_of_both_ip_versions() -> None:
    snmp = "Ip: Forwarding ReasmReqds FragOKs FragCreates\nIp: 1 3 5 7\nIcmp: InMsgs\nIcmp: 9\n"
    snmp6 = "Ip6FragCreates                  \t11\nIp6ReasmReqds                  \t13\nIp6FragOKs 1\n"
    both = {"/proc/net/snmp": snmp, "/proc/net/snmp6": snmp6}
    assert fragments(Here(both)) == 3 + 7 + 11 + 13
    assert fragments(Here({"/proc/net/snmp": snmp})) == 3 + 7
    with pytest.raises(LabError, match="counters cannot be read"):
        fragments(Here({"/proc/net/snmp": "Ip: Forwarding\nIp: 1\n"}))


def test_figures_travel_with_the_report() -> None:
    item: Any = SimpleNamespace(user_properties=[])
    Figures(item).add("SS: TCP", 0.81239, "of the bare underlay", 0.3)
    Figures(item).add("CPU", 1, "times")
    assert item.user_properties == [
        (FIGURE, {"figure": "SS: TCP", "value": 0.8124, "unit": "of the bare underlay", "bound": 0.3}),
        (FIGURE, {"figure": "CPU", "value": 1, "unit": "times", "bound": None}),
    ]
