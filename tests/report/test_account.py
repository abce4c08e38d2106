"""What is told of a check: what it asserted, and where its packets were seen."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest

from testbed import journal
from testbed.deadline import Deadline
from testbed.probes.pcap import Packet
from testbed.report.page.build import page_of
from testbed.report.parts import Part, PartWriter, merged
from testbed.report.record import Outcome, RunRecord, Verdict
from testbed.report.sightings import count, header_of
from tests.report.conftest import CONFIGURATION, Runner
from tests.report.documents import Texts, lab

POD, PEER, NODE, OTHER = (IPv4Address(a) for a in ("10.244.1.3", "10.244.3.2", "10.0.0.12", "10.0.0.14"))
ETHERNET = bytes.fromhex("020000000001 020000000002 0800".replace(" ", ""))
MARK = b"\x8d\x1f\xc3\xf0\x52\x09\x9b\xff"


def ip4(source: IPv4Address, target: IPv4Address, protocol: int, payload: bytes, number: int = 1) -> bytes:
    """An IPv4 packet without checksums."""
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), number, 0, 64, protocol, 0)
    return head + source.packed + target.packed + payload


def echo(source: IPv4Address, target: IPv4Address, kind: int = 8, number: int = 1) -> bytes:
    """A ping."""
    return ip4(source, target, 1, struct.pack("!BBHHH", kind, 0, 0, 7, 1) + MARK * 2, number)


def vxlan(inner: bytes) -> bytes:
    """A frame in vxlan."""
    return ip4(NODE, OTHER, 17, struct.pack("!HHHH", 50000, 8472, 16 + len(inner), 0) + b"\x08" + bytes(7) + inner)


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (ETHERNET + echo(POD, PEER), (14, "there")),
        (ETHERNET + echo(PEER, POD, 0), (14, "back")),
        (echo(POD, PEER), (0, "there")),  # as a tun device shows it
        (ETHERNET + vxlan(ETHERNET + echo(POD, PEER)), (64, "there")),
        (ETHERNET + vxlan(ETHERNET + echo(PEER, POD, 0)), (64, "back")),
        (ETHERNET + echo(NODE, PEER), (14, "there")),  # its source is another one behind a NAT
        (ETHERNET + echo(POD, PEER, number=0x4511), (14, "there")),  # an id that looks like the begin of a header
        (ETHERNET[:10] + b"\x45\x11" + ETHERNET[12:] + echo(PEER, POD, 0), (14, "back")),  # so does this MAC
        (ETHERNET + ip4(NODE, POD, 1, struct.pack("!BBHHH", 3, 4, 0, 0, 1400) + echo(POD, PEER)), (42, "errors")),
        (ETHERNET + echo(POD, NODE), (-1, "there")),
        (ETHERNET + PEER.packed, (-1, "there")),
    ],
)
def test_which_way_a_packet_goes_is_told_without_decoding_it(data: bytes, wanted: tuple[int, str]) -> None:
    assert header_of(data, PEER) == wanted


def test_the_same_for_ipv6() -> None:
    pod, peer = IPv6Address("fd00::1:3"), IPv6Address("fd00::3:2")

    def packet(source: IPv6Address, target: IPv6Address, payload: bytes) -> bytes:
        return struct.pack("!IHBB", 6 << 28, len(payload), 58, 64) + source.packed + target.packed + payload

    sent = packet(pod, peer, b"\x80\x00" + bytes(6) + MARK)
    assert header_of(ETHERNET + sent, peer) == (14, "there")
    assert header_of(packet(peer, pod, b"\x81\x00" + bytes(6) + MARK), peer) == (0, "back")
    assert header_of(ETHERNET + packet(peer, pod, b"\x02\x00" + bytes(6) + sent), peer) == (62, "errors")


def test_packets_are_counted_by_their_way() -> None:
    wire = [ETHERNET + vxlan(ETHERNET + one) for one in (echo(POD, PEER), echo(POD, PEER), echo(PEER, POD, 0))]
    seen = count("worker1:eth0", [Packet(100.0 + n, data, len(data)) for n, data in enumerate(wire)], PEER, 14)
    found = {"at": "worker1:eth0", "there": 2, "back": 1, "errors": 0, "tunnelled": True, "first": 0.5}
    assert seen.to_json(99.5) == found
    assert not count("worker1:cni0", [Packet(1.0, ETHERNET + echo(POD, PEER), 98)], PEER, 14).tunnelled


# --- the journal


def test_nothing_is_noted_where_no_check_is_followed() -> None:
    journal.end()
    assert journal.current() is None
    begun = journal.begin()
    with journal.paused():
        assert journal.current() is None
        assert journal.latest() is begun
    assert journal.current() is begun
    journal.end()
    assert journal.latest() is None


def test_a_journal_is_bounded_and_counts_what_it_leaves_out() -> None:
    notes = journal.Journal()
    for number in range(journal.MOST_COMMANDS + 5):
        notes.command("worker1", ["true", str(number)], number % 2, 0.1, "x" * 10 * journal.OUTPUT)
    assert (len(notes.commands), notes.left_out) == (journal.MOST_COMMANDS, {"commands": 5})
    assert {len(command.output) for command in notes.commands} == {0, journal.OUTPUT}
    for _ in range(3):
        notes.held("a == b", 7)
    assert [(one.text, one.times) for one in notes.assertions] == [("a == b", 3)]


SUITE = """
from ipaddress import IPv4Address
from testbed.checks import check

@check("LSE-01")
def test_holds():
    for number in range(4):
        assert number + 1 == number - -1
    assert IPv4Address("10.0.0.1") in {IPv4Address("10.0.0.1")}, "100% sure"

@check("LSE-02")
def test_fails():
    assert [IPv4Address("10.0.0.1")] == [IPv4Address("10.0.0.2")], f"1 of 1 lost: 100% of {'%s'}"

class Odd:
    def __bool__(self): return False
    def __repr__(self): raise RuntimeError("odd")

@check("LSE-03")
def test_fails_on_something_odd():
    assert Odd() == 3
"""


def test_both_sides_of_what_was_asserted_are_told(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(SUITE)
    argv = [sys.executable, "-m", "pytest", "-c", str(CONFIGURATION), "--rootdir", str(tmp_path), "--backend=vxlan"]
    argv += [f"--reports={tmp_path / 'report'}", "--name=account", str(tmp_path / "test_some.py")]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    written = json.loads((tmp_path / "report" / "checks.json").read_text())
    holds, fails, odd = written["checks"]
    told = [(a["text"], a["seen"], a["sign"], a["wanted"], a["held"], a["times"]) for a in holds["account"]["asserted"]]
    assert told == [
        ("number + 1 == number - -1", "1", "==", "1", True, 4),
        ('IPv4Address("10.0.0.1") in {IPv4Address("10.0.0.1")}', "10.0.0.1", "in", "{10.0.0.1}", True, 1),
    ], done.stdout
    (one,) = fails["account"]["asserted"]
    assert (one["seen"], one["sign"], one["wanted"], one["held"]) == ("[10.0.0.1]", "==", "[10.0.0.2]", False)
    assert fails["reason"].startswith("1 of 1 lost: 100% of %s\n"), "the message as its author wrote it"
    assert odd["verdict"] == "failed"
    assert "Odd" in odd["account"]["asserted"][0]["seen"]


INSIDE_A_PROBE = """
from types import SimpleNamespace
from testbed.checks import check
from testbed.errors import LabError
from testbed.probes.flows import pinged

SAID = "1 packets transmitted, 0 received, 100% packet loss"
nobody = SimpleNamespace(name="worker1", run=lambda *_, **__: SimpleNamespace(stdout=SAID, stderr="", seconds=1.0))

@check("LSE-01")
def test_asks_a_probe():
    assert 1 == 1
    pinged(nobody, "10.244.3.2")

@check("LSE-02")
def test_is_masked():
    try:
        pinged(nobody, "10.244.3.3")
    finally:
        raise LabError("the node is gone")
"""


def test_what_failed_inside_a_probe_is_told_as_the_check_asked_for_it(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(INSIDE_A_PROBE)
    argv = [sys.executable, "-m", "pytest", "-c", str(CONFIGURATION), "--rootdir", str(tmp_path), "--backend=vxlan"]
    argv += [f"--reports={tmp_path / 'report'}", "--name=account", str(tmp_path / "test_some.py")]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    asks, masked = json.loads((tmp_path / "report" / "checks.json").read_text())["checks"]
    failed = asks["account"]["asserted"][-1]
    assert (failed["text"], failed["held"], failed["sign"]) == ('pinged(nobody, "10.244.3.2")', False, ""), done.stdout
    assert "0 received" in failed["seen"]
    assert masked["verdict"] == "failed", "that the clean-up found the lab broken does not undo it"
    assert "the node is gone" in masked["reason"]
    assert masked["account"]["asserted"][-1]["text"] == 'pinged(nobody, "10.244.3.3")'


HALF = """
import json
import pytest
from testbed.checks import check
from testbed.errors import LabError

SAID = json.loads('"the plugin said \\\\ud800"')

@check("LSE-01")
def test_fails():
    assert SAID == "OK", SAID

@check("LSE-02")
def test_breaks():
    raise LabError(SAID)

@check("LSE-03")
def test_is_skipped():
    pytest.skip(SAID)
"""


def test_half_of_a_surrogate_pair_comes_through_from_a_worker(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(HALF)
    argv = [sys.executable, "-m", "pytest", "-c", str(CONFIGURATION), "--rootdir", str(tmp_path), "--backend=vxlan"]
    argv += [f"--reports={tmp_path / 'report'}", "--name=account", "-n", "1", str(tmp_path / "test_some.py")]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    checks = json.loads((tmp_path / "report" / "checks.json").read_text())["checks"]
    assert sorted(check["verdict"] for check in checks) == ["failed", "lab_error", "skipped"]
    assert all(check["reason"].startswith("the plugin said \\ud800") for check in checks)


# --- what came late


@pytest.mark.parametrize(("seen_at", "late"), [(0.0, False), (0.2, False), (0.7, True), (1.2, True)])
def test_what_came_close_to_its_deadline_came_late(seen_at: float, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.delenv("TESTBED_TIME_SCALE", raising=False)
    monkeypatch.setattr("testbed.deadline.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("testbed.deadline.time.sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    notes = journal.begin()
    try:
        assert Deadline(1.0, 100.0).poll(lambda: clock[0] >= 100.0 + seen_at, every=0.1) is (seen_at <= 1.05 or None)
    finally:
        journal.end()
    assert bool(notes.late) is (late and seen_at < 1)


def test_what_is_there_at_the_first_look_is_never_late(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("testbed.deadline.time.monotonic", lambda: clock[0])
    notes = journal.begin()
    try:
        shared = Deadline(1.0, 100.0)
        clock[0] += 0.9  # what others waited for
        assert shared.poll(lambda: True)
    finally:
        journal.end()
    assert notes.late == []


SLOW = """
from testbed.checks import check
from testbed.deadline import Deadline

@check("LSE-01")
def test_late():
    deadline = Deadline(1.0)
    assert deadline.poll(lambda: deadline.elapsed > 0.7)

@check("LSE-02")
def test_in_time():
    deadline = Deadline(20.0)
    assert deadline.poll(lambda: deadline.elapsed > 0.1)

@check("LSE-03")
def test_late_and_wrong():
    deadline = Deadline(1.0)
    assert not deadline.poll(lambda: deadline.elapsed > 0.7)
"""


def test_a_check_that_held_late_is_slow_in_terminal_page_and_json(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(SLOW)
    argv = [sys.executable, "-m", "pytest", "-c", str(CONFIGURATION), "--rootdir", str(tmp_path), "--backend=vxlan"]
    argv += [f"--reports={tmp_path / 'report'}", "--name=account", str(tmp_path / "test_some.py")]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    checks = json.loads((tmp_path / "report" / "checks.json").read_text())["checks"]
    assert [(check["verdict"], check["slow"]) for check in checks] == [
        ("held", True),
        ("held", False),
        ("failed", False),
    ], done.stdout
    assert "s of at most 1.0 s" in checks[0]["account"]["late"][0]
    assert "slow: 1 checks held only late: LSE-01" in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if line.split()[:2] == ["held", "LSE-01"]]
    assert "slow: it came after" in line
    page = Texts((tmp_path / "report" / "index.html").read_text()).text
    assert "1 slow" in page
    assert "only after more than half of the time" in page


# --- from several processes


def test_what_passes_and_workers_tell_becomes_one_page(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        writer = PartWriter(tmp_path / str(number))
        told = {"lab": f"lab-{number}", "began": 1.0}
        made = lab() | {"subnets": {"worker1": f"10.{number}.0.0/24"}}
        writer.add(Outcome(f"X-{number}", f"X-{number}", "vxlan", Verdict.HELD, account=told, sketch=made))
        writer.end(RunRecord({"backend": "vxlan"}))
    record = merged([Part(tmp_path / "1"), Part(tmp_path / "2")], [], {})
    record.finish(strict=False)
    text = Texts(page_of(json.loads(json.dumps(record.to_json())))).text
    assert "10.1.0.0/24" in text
    assert "10.2.0.0/24" in text
    assert "all 2 held" in text


def test_a_worse_end_keeps_what_was_told() -> None:
    record = RunRecord({})
    record.add(Outcome("X-1", "X-1", "vxlan", Verdict.HELD, account={"lab": "a", "flows": [1]}))
    record.add(Outcome("X-1", "X-1", "vxlan", Verdict.INCONCLUSIVE, reason="packets dropped"))
    assert [(o.verdict, o.account) for o in record.outcomes] == [("inconclusive", {"lab": "a", "flows": [1]})]


IN_A_LAB = """
from testbed.probes.flows import http_get, ping

@check("VXE-01", encapsulated=True)
def test_blocked(cluster, path):  # captures go on whether a check asks for them or not
    path.target_node.run(["iptables", "-I", "INPUT", "-p", "udp", "--dport", "8472", "-j", "DROP"])
    try:
        assert ping(path.source, path.address, wait=1).lost == 0
    finally:
        path.target_node.run(["iptables", "-D", "INPUT", "1"])

@check("NAT-03")
def test_http(cluster, path):
    for _ in range(2):  # captures are a moment behind: of the first there is all
        assert http_get(path.source, path.address).status == 200
"""


def test_a_real_lab_s_page_says_where_packets_were_lost(run_in_a_lab: Runner) -> None:
    ended = run_in_a_lab(IN_A_LAB, "-k", "XS or SS", "-n", "2")
    assert ended.code == 1, ended.output
    text = Texts((ended.report / "index.html").read_text()).text
    assert "worker3:eth0 → worker3:flannel.1" in text, text[:3000]
    assert "worker2:eth0 → worker2:flannel.1" in text
    assert len(ended.whole["labs"]) == 2
    http = [check for check in ended.whole["checks"] if check["id"] == "NAT-03"]
    assert len(http) == 2
    for check in http:
        flow = check["account"]["flows"][0]
        stages = {stage["at"] for stage in flow["route"]}
        seen = {row["at"]: row for row in flow["seen"]}
        assert stages <= set(seen), "every interface of the way saw the connection"
        assert all(row["there"] and row["back"] for row in seen.values())
    for name, made in ended.whole["labs"].items():
        assert [row["wanted"] for row in made["mtus"]] == [9100] * 4, name
        assert {"kernel", "iproute2", "flanneld"} <= set(made["versions"])
