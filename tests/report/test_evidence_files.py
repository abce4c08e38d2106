"""What a failed check leaves: bounded files, and what can go wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.probes.pcap import Packet, PcapReader, to_pcap
from testbed.report import evidence
from testbed.report.evidence import Evidence, cut_pcap
from testbed.statewatch import MOST_LINES, differences


def test_a_pcap_that_is_too_long_keeps_its_last_packets() -> None:
    packets = [Packet(float(number), bytes([number]) * 100, 100) for number in range(50)]
    whole = to_pcap(packets, 1)
    kept, cut = cut_pcap(whole, 1000)
    assert len(kept) <= 1000
    assert len(kept) + cut == len(whole)
    left = list(PcapReader("x").feed(kept))
    assert [packet.data[0] for packet in left] == list(range(50 - len(left), 50))
    assert len(left) == (1000 - 24) // 116


def test_a_pcap_that_fits_is_left_alone() -> None:
    whole = to_pcap([Packet(1.0, b"x" * 60, 60)], 1)
    assert cut_pcap(whole, len(whole)) == (whole, 0)


def test_a_packet_longer_than_the_limit_leaves_an_empty_pcap() -> None:
    whole = to_pcap([Packet(1.0, b"x" * 600, 600)], 1)
    kept, cut = cut_pcap(whole, 100)
    assert (list(PcapReader("x").feed(kept)), cut) == ([], 616)


class FakeWindow:
    def pcaps(self) -> dict[str, bytes]:
        return {"worker1:eth0": to_pcap([Packet(1.0, b"x" * 60, 60)], 1)}


def test_captures_are_listed_with_their_node(tmp_path: Path) -> None:
    found = Evidence("checks/VXE-01")
    names = {"worker1:eth0": "worker1+eth0.pcap"}
    evidence.keep_captures(tmp_path, "VXE-01", found, FakeWindow(), names)  # type: ignore[arg-type]
    (file,) = found.to_json()["files"]
    assert file == {
        "path": "checks/VXE-01/worker1+eth0.pcap", "node": "worker1", "what": "pcap", "bytes": 100, "cut": 0,
    }  # fmt: skip
    assert (tmp_path / file["path"]).stat().st_size == 100


@pytest.mark.parametrize("rules", ["iptables-nft", "iptables-legacy", "nftables"])
def test_what_is_gathered_is_what_is_promised(rules: str) -> None:
    commands = evidence.commands_of(rules)
    assert tuple(commands) == evidence.WHAT
    assert [what for what, command in commands.items() if command.keep_end] == ["flanneld"]


def test_differences_name_the_place_and_the_line() -> None:
    before = {"worker1": ("a", "b", "b"), "worker2": ("x",), "worker1/client": ("p",)}
    after = {"worker1": ("a", "b", "c"), "worker2": ("x",), "worker3/new": ("q",)}
    assert differences(before, after) == [
        "worker1: - b",
        "worker1: + c",
        "worker1/client: - the network of worker1/client",
        "worker3/new: + the network of worker3/new",
    ]


def test_rules_in_another_order_are_another_state() -> None:
    assert differences({"w": ("rules a", "rules b")}, {"w": ("rules b", "rules a")}) == [
        "w: + the order of the rules is another one"
    ]


def test_many_differences_are_counted() -> None:
    lines = differences({"w": tuple(map(str, range(100)))}, {"w": ()})
    assert (len(lines), lines[-1]) == (MOST_LINES + 1, f"and {100 - MOST_LINES} more")
