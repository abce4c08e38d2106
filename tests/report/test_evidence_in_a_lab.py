"""What a run on a real lab says of checks that leave something behind, and keeps of those that fail."""

from __future__ import annotations

import json

from testbed.report.evidence import WHAT
from tests.report.conftest import Runner

LEAKING = """
@check("LSE-01")
def test_harmless(cluster):
    node = cluster.members[0]
    node.run(["ip", "route", "add", "10.9.0.0/24", "dev", "eth0"])
    node.run(["ping", "-c", "1", "-W", "1", str(cluster.members[1].spec.ip)])
    node.run(["ip", "route", "del", "10.9.0.0/24"])

@check("LSE-02")
def test_leaves_a_route(cluster):
    cluster.members[0].run(["ip", "route", "add", "10.9.0.0/24", "dev", "eth0"])

@check("LSE-03")
def test_is_not_held_for_what_was_there(cluster):
    pass

@check("LSE-05")
def test_leaves_a_rule_and_a_setting(cluster):
    cluster.members[1].run(["iptables-nft", "-A", "INPUT", "-s", "192.0.2.1", "-j", "DROP"])
    cluster.pods["worker1/client"].run(["sysctl", "-w", "net.ipv4.conf.eth0.rp_filter=1"])

@check("POD-01")
def test_leaves_a_pod(cluster):
    cluster.add_pod("worker2", "left")

@check("POD-05")
def test_what_flanneld_mends_is_no_leak(cluster):
    route = cluster.members[0].run(["ip", "route", "show", str(cluster.pod_cidr("worker3"))]).stdout.split()
    cluster.members[0].run(["ip", "route", "del", route[0]])

@check("POD-06", disruptive=True)
def test_disruptive(cluster):
    name = cluster.members[2].name
    cluster.stop_flanneld(name)
    cluster.start_flanneld(name)
"""

FAILING = """
from testbed.checks import PathSpec
from testbed.probes.flows import Nonce, ping

@check("VXE-01", encapsulated=True)
def test_blocked(cluster, window, path):
    path.target_node.run(["iptables-nft", "-I", "INPUT", "-p", "udp", "--dport", "8472", "-j", "DROP"])
    answer = ping(path.source, path.address, nonce=Nonce.new(), wait=1)
    assert answer.received == 1, "no answer"
"""


def test_a_check_is_held_for_what_it_leaves_behind(run_in_a_lab: Runner) -> None:
    ended = run_in_a_lab(LEAKING)
    leaked = {check["id"]: check["leaked"] for check in ended.whole["checks"]}
    assert {row: bool(lines) for row, lines in leaked.items()} == {
        "LSE-01": False, "LSE-02": True, "LSE-03": False, "LSE-05": True, "POD-01": True, "POD-05": False,
        "POD-06": False,
    }, leaked  # fmt: skip
    assert leaked["LSE-02"] == ["master1: + route 10.9.0.0/24 dev eth0 proto 3"]
    rule = "worker1: + rules table ip filter chain INPUT | ip saddr 192.0.2.1 counter drop"
    assert rule in leaked["LSE-05"], leaked
    assert any(line.startswith("worker1/client: + sysctl eth0 ") and "rp_filter 1" in line for line in leaked["LSE-05"])
    assert "worker2/left: + the network of worker2/left" in leaked["POD-01"]
    assert {check["verdict"] for check in ended.whole["checks"]} == {"held"}
    assert ended.code == ended.whole["run"]["exit"] == 1
    assert ended.whole["run"]["leaks"] == 3
    assert "leaked: 3 checks left the nodes changed" in ended.output
    assert "POD-06" not in ended.output.partition("leaked: 3")[2]


def test_everything_about_a_failure_is_kept(run_in_a_lab: Runner) -> None:
    ended = run_in_a_lab(FAILING, "--path-trace", "worker1/client", "worker3/testapp", "-k", "XS",
                         "--pause-on-fail", "--pause-timeout", "0.5")  # fmt: skip
    check = ended.check("VXE-01")
    evidence = check["evidence"]
    assert check["verdict"] == "failed"
    files = {(file["node"], file["what"]): file for file in evidence["files"]}
    for node in ("master1", "worker1", "worker2", "worker3"):
        for what in WHAT:
            file = files[node, what]
            text = (ended.report / file["path"]).read_text()
            assert file["bytes"] == len(text.encode()), file
            assert text.strip() or what == "conntrack", file
    assert "--dport 8472 -j DROP" in (ended.report / files["worker3", "rules"]["path"]).read_text()
    assert ("leaf1", "routes") in files
    pcaps = [file for file in evidence["files"] if file["what"] == "pcap"]
    assert {"worker3"} <= {file["node"] for file in pcaps}
    assert all((ended.report / file["path"]).stat().st_size == file["bytes"] for file in pcaps)
    assert evidence["missing"] == []
    assert any("udp dport 8472" in line for line in evidence["changes"]), evidence["changes"]
    assert evidence["trace"]["missing"]["cause"]["code"] == "port_blocked"
    assert evidence["trace"]["missing"]["place"] == "worker3"
    assert check["leaked"] == evidence["changes"]
    (before,) = ended.whole["run"]["traces"]
    assert (before["source"], before["target"], before["delivered"]) == ("worker1/client", "worker3/testapp", True)
    told = ["it goes on after 0.5 s", "going on", "delivered, and answered"]
    told.append(f"testbed shell --name {ended.name} worker3/testapp")
    told.append(f"testbed trace --name {ended.name} --proto icmp --size 56 worker1/client worker3/testapp")
    for said in told:
        assert said in ended.output, ended.output
    assert json.dumps(check)


def test_wrong_words_are_refused_before_there_is_a_lab(tmp_path: object) -> None:
    import subprocess
    import sys

    for words, said in (
        (["--path-trace", "worker1/client", "worker9/x"], "has no worker9/x"),
        (["--path-trace", "worker1", "worker1"], "both ends are worker1"),
        (["--pause-on-fail"], "there is no terminal"),
        (["--pause-timeout", "5"], "nothing pauses"),
        (["--pause-on-fail", "--pause-timeout", "0"], "that is no time"),
        (["--pause-on-fail", "--pause-timeout", "5", "-n", "2"], "several labs side by side cannot pause"),
    ):
        argv = [sys.executable, "-m", "testbed", "run", "vxlan", "--", "--reports", f"{tmp_path}/reports", *words]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, start_new_session=True)
        assert done.returncode == 3, (words, done.stdout + done.stderr)
        assert said in done.stdout + done.stderr, (words, done.stdout + done.stderr)
