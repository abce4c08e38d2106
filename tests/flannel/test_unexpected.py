"""What nobody foresaw: one line in the log, never a raw traceback, and as little lost as can be."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from flannel import log
from tests.flannel.corelab import Flanneld, Node, peer, until

KLOG = re.compile(r"[IWE]\d{4} \d\d:\d\d:\d\d\.\d{6} +\d+ [a-z0-9_]+\.py:\d+\] .+")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.close()


def all_klog(daemon: Flanneld) -> bool:
    """Whether every line is one of klog's form, without what the exception said."""
    return all(KLOG.fullmatch(line) for line in daemon.log.splitlines()) and "geheim" not in daemon.log


def test_of_one_lease_costs_that_lease_only(node: Node) -> None:
    daemon = node.start(broken=["wants"])
    daemon.list(peer(66), peer(2))
    until(lambda: node.programmed(2), "the other peer")
    daemon.said("ignoring the lease of 10.244.66.0/24 from 192.168.50.66: unexpected ZeroDivisionError at steered")
    assert all_klog(daemon), daemon.log


def test_of_a_message_is_told_once_and_the_next_one_counts(node: Node) -> None:
    daemon = node.start(broken=["take"])
    daemon.list(peer(2))
    until(lambda: node.programmed(2), "the first peer")
    for _ in range(3):
        daemon.tell(added=peer(66))
    daemon.tell(added=peer(3))
    until(lambda: node.programmed(2, 3), "the next peer")
    daemon.said("comparing everything again: unexpected ZeroDivisionError at steered_flanneld.py:")
    node.ip("route del 10.244.2.0/24")
    until(lambda: node.programmed(2, 3), "a repair")
    assert all_klog(daemon), daemon.log


def test_at_the_start_ends_with_status_one(node: Node) -> None:
    daemon = node.start(broken=["start"], ready=False)
    daemon.said("cannot go on: unexpected ZeroDivisionError at steered_flanneld.py:")
    assert daemon.process.wait(timeout=10) == 1
    assert all_klog(daemon), daemon.log


def test_at_the_end_keeps_nothing_from_ending(node: Node) -> None:
    daemon = node.start(broken=["close"])
    assert daemon.stop() == 0
    assert "ending: unexpected ZeroDivisionError" in daemon.log
    assert "Exiting cleanly..." in daemon.log
    assert all_klog(daemon), daemon.log


def test_of_a_lost_lease_is_tried_again(node: Node) -> None:
    daemon = node.start(broken=["acquire"])
    daemon.tell(lost="deleted by hand")
    daemon.said("cannot take the lease of 10.244.1.0/24 again: unexpected ZeroDivisionError")
    daemon.said("Lease acquired again: 10.244.1.0/24")
    assert all_klog(daemon), daemon.log


def test_in_a_thread_is_told_by_the_threads_name(node: Node) -> None:
    daemon = node.start(broken=["thread"])
    daemon.said("thread doomed has ended: unexpected ZeroDivisionError at steered_flanneld.py:")
    assert all_klog(daemon), daemon.log


def test_the_way_there_is_shown_where_it_is_asked_for(node: Node) -> None:
    daemon = node.start("-v=4", broken=["start"], ready=False)
    daemon.said("unexpected ZeroDivisionError")
    assert daemon.process.wait(timeout=10) == 1
    assert re.search(r"daemon\.py:\d+ in _start_and_serve", daemon.log)
    assert all_klog(daemon), daemon.log


def test_no_line_can_be_forged(capfd: pytest.CaptureFixture[str]) -> None:
    log.warning("a peer's words\nE0101 00:00:00.000000       1 daemon.py:1] forged\r")
    [line] = capfd.readouterr().err.splitlines()
    assert KLOG.fullmatch(line)
