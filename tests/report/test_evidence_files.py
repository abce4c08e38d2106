"""What a failed check leaves: bounded files, and what can go wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.probes.pcap import Packet, PcapReader, to_pcap
from testbed.probes.rulelines import by_chain, saved_by_chain
from testbed.report import evidence
from testbed.report.evidence import Evidence, cut_pcap
from testbed.statewatch import MOST_LINES, differences, with_tunnels_named


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


def test_all_captures_together_are_bounded_and_short_ones_left_alone() -> None:
    def pcap(count: int) -> bytes:
        return to_pcap([Packet(float(number), bytes(84), 84) for number in range(count)], 1)

    found = evidence.cut_pcaps({"long": pcap(100), "short": pcap(3), "longer": pcap(200)}, 5000)
    assert found["short"] == (pcap(3), 0)
    assert sum(len(data) for data, _ in found.values()) <= 5000
    assert {name for name, (_, cut) in found.items() if cut} == {"long", "longer"}
    assert all(len(data) > 2000 for name, (data, _) in found.items() if name != "short")


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


def test_a_tunnel_s_device_made_anew_is_the_same_state() -> None:
    def state(mac: str, rules: str = "rules a") -> dict[str, tuple[str, ...]]:
        own = ("fdb 02:00:00:00:00:09 dev flannel.1", f"link flannel.1 vxlan UP mac {mac} 00", rules, "sysctl x 1")
        return {"worker1": own, "worker2": (f"fdb {mac} dev flannel.1", "link eth0 mac 02:00:00:00:00:08")}

    one, other = state("02:00:00:00:00:01"), state("aa:00:00:00:00:01")
    assert with_tunnels_named(one, ["flannel.1"]) == with_tunnels_named(other, ["flannel.1"])
    assert with_tunnels_named(one, ["flannel.2"]) != with_tunnels_named(other, ["flannel.2"])
    changed = state("aa:00:00:00:00:01", "rules b")
    assert with_tunnels_named(one, ["flannel.1"]) != with_tunnels_named(changed, ["flannel.1"])


NFT = """table ip nat {
chain POSTROUTING {
type nat hook postrouting priority srcnat; policy accept;
ip saddr { 192.0.2.1, 192.0.2.2 } accept
}
chain INPUT {
type nat hook input priority 100; policy accept;
}
chain OUTPUT {
type nat hook output priority -100; policy drop;
}
chain EMPTY {
}
}
table ip nothing {
}"""
SAVED = """*nat
:POSTROUTING ACCEPT
:INPUT DROP
-A POSTROUTING -j ACCEPT
COMMIT
*filter
:FORWARD ACCEPT
COMMIT"""


def test_chains_without_any_effect_are_no_state() -> None:
    assert by_chain(NFT.splitlines()) == [
        "table ip nat chain EMPTY",
        "table ip nat chain OUTPUT",
        "table ip nat chain OUTPUT | type nat hook output priority -100; policy drop;",
        "table ip nat chain POSTROUTING",
        "table ip nat chain POSTROUTING | type nat hook postrouting priority srcnat; policy accept;",
        "table ip nat chain POSTROUTING | ip saddr { 192.0.2.1, 192.0.2.2 } accept",
    ]
    assert saved_by_chain(SAVED.splitlines()) == [
        "legacy nat INPUT | policy DROP",
        "legacy nat POSTROUTING | -A POSTROUTING -j ACCEPT",
    ]


def test_many_differences_are_counted() -> None:
    lines = differences({"w": tuple(map(str, range(100)))}, {"w": ()})
    assert (len(lines), lines[-1]) == (MOST_LINES + 1, f"and {100 - MOST_LINES} more")
