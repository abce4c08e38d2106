"""Where a flow was lost, from how often each interface saw it."""

from __future__ import annotations

import pytest

from testbed.report.page import lost
from testbed.report.page.drawing import Drawing
from tests.report.documents import WAY, flow, lab


def found_of(one: dict[str, object]) -> lost.Lost | None:
    return lost.lost(one, lost.stations(one, lab()))


@pytest.mark.parametrize("last", range(len(WAY) - 1))
def test_requests_are_lost_behind_the_last_interface_that_saw_them(last: int) -> None:
    found = found_of(flow(last))
    assert found is not None
    assert (found.direction, found.segment) == ("there", f"{WAY[last]} → {WAY[last + 1]}")
    assert found.sentence.startswith(f"3 requests were last seen on {WAY[last]}")


@pytest.mark.parametrize("back_from", range(1, len(WAY)))
def test_answers_are_lost_on_their_way_back(back_from: int) -> None:
    found = found_of(flow(back_from=back_from))
    assert found is not None
    assert (found.direction, found.segment) == ("back", f"{WAY[back_from]} → {WAY[back_from - 1]}")


def test_what_was_answered_was_not_lost() -> None:
    assert found_of(flow(back_from=0)) is None


def test_some_of_the_packets_are_lost() -> None:
    found = found_of(flow(4, some=1))
    assert found is not None
    assert "only 1 came to worker3:eth0" in found.sentence


def test_nothing_was_ever_seen() -> None:
    found = found_of(flow(-1))
    assert found is not None
    assert (found.segment, found.sentence) == (f"before {WAY[0]}", "No requests were seen on any interface of the way.")


def test_all_came_and_nobody_answered() -> None:
    found = found_of(flow(len(WAY) - 1))
    assert found is not None
    assert found.sentence == f"All requests came through to {WAY[-1]}; none was answered."


def test_a_flow_that_cannot_be_told_is_lost_nowhere() -> None:
    assert found_of(flow(-1) | {"marked": False}) is None
    assert found_of(flow(-1) | {"route": []}) is None


def test_an_interface_that_shows_only_what_is_encrypted_is_passed_over() -> None:
    one = flow(3)
    for stage in one["route"]:
        stage["readable"] = stage["at"] not in ("worker1:eth0", "worker3:eth0")
    one["seen"] = [row | {"tunnelled": False} for row in one["seen"]]
    found = found_of(one)
    assert found is not None
    assert found.segment == "worker1:flannel.1 → worker3:flannel.1"


def test_the_outside_host_is_whichever_of_its_ports_saw_it() -> None:
    one = flow(4)
    one["route"] = [*one["route"][:5], {"at": "outside:*", "machine": "outside", "readable": True}]
    one["seen"].append({"at": "outside:eth1", "there": 3, "back": 0, "errors": 0, "tunnelled": False, "first": 0.1})
    found = found_of(one)
    assert found is not None
    assert found.sentence == "All requests came through to outside:eth1; none was answered."


@pytest.mark.parametrize("last", range(len(WAY) - 1))
def test_every_segment_of_a_node_has_its_suspects_and_what_to_look_at(last: int) -> None:
    one = flow(last)
    found = found_of(one)
    assert found is not None
    text, commands = lost.suspects(found, lab(), one)
    assert text
    assert commands
    assert not [word for _, argv in commands for word in argv if "{" in word or not word]
    wanted = {4: "worker1", 5: "worker3", 3: "worker1"}.get(last)
    assert wanted is None or {machine for machine, _ in commands} == {wanted}


@pytest.mark.parametrize(
    ("rules", "listing"),
    [
        ("nftables", "nft list ruleset"),
        ("iptables-legacy", "iptables-legacy -vnL"),
        ("iptables-nft", "iptables-nft -vnL"),
        (None, "iptables -vnL"),  # of a report that does not say
    ],
)
def test_rules_are_looked_at_by_the_program_of_the_run(rules: str | None, listing: str) -> None:
    there = lab() | ({"rules": rules} if rules else {})
    chains = set()
    for last in range(len(WAY) - 1):
        found = lost.lost(flow(last), lost.stations(flow(last), there))
        assert found is not None
        _, commands = lost.suspects(found, there, flow(last))
        chains |= {" ".join(argv) for _, argv in commands if {"-vnL", "ruleset"} & set(argv)}
    wanted = {listing} if rules == "nftables" else {f"{listing} {chain}" for chain in ("FORWARD", "INPUT")}
    assert chains == wanted


@pytest.mark.parametrize("last", [3, 4, 5, 8])
def test_the_drawing_shows_the_cross_where_it_was_lost(last: int) -> None:
    one = flow(last)
    way = lost.stations(one, lab())
    found = lost.lost(one, way)
    drawn = str(Drawing(lab(), way, found).markup("a title"))
    assert drawn.count('class="cross"') == drawn.count('class="chip last"') == 1
    assert drawn.count('class="chip seen"') == last
    assert 'class="way broken' in drawn
    assert "master1" in drawn
    assert "master1" not in str(Drawing(lab(), way, found, narrow=True).markup("a title"))


def test_a_lab_without_machines_has_no_drawing() -> None:
    assert not Drawing({}).markup("nothing")
