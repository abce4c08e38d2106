"""How flanneld starts, and how it ends: flannel-behaviour.md, sections 0, 1.4, 1.6 and 8."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flannel.corelab import OWN, PYTHON, Node, peer, until

ASK = """
import socket, sys
with socket.create_connection((sys.argv[1], 8081)) as sock:
    sock.sendall(f"{sys.argv[2]} {sys.argv[3]} HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 0\\r\\n\\r\\n".encode())
    print(sock.makefile().read())
"""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.close()


def ask(node: Node, path: str, *, method: str = "GET", address: str = "127.0.0.1") -> str:
    return node.run(PYTHON, "-ISc", ASK, address, method, path)


# -- what has to be there ------------------------------------------------------------------------------------------


def test_a_missing_br_netfilter_ends_with_status_one(node: Node) -> None:
    node.run("mount", "-t", "tmpfs", "tmpfs", "/proc/sys/net/bridge")
    daemon = node.start(ready=False)
    assert daemon.process.wait(timeout=10) == 1
    assert "Failed to check br_netfilter: /proc/sys/net/bridge/bridge-nf-call-iptables is missing" in daemon.log


def test_that_of_ipv6_is_asked_for_with_ipv6_alone(node: Node) -> None:
    node.ip("-6 addr add fd50::1/64 dev eth0 nodad")
    node.run("mount", "-t", "tmpfs", "tmpfs", "/proc/sys/net/bridge")
    node.run("touch", "/proc/sys/net/bridge/bridge-nf-call-iptables")
    daemon = node.start(ready=False, dual=True)
    assert daemon.process.wait(timeout=10) == 1
    assert "bridge-nf-call-ip6tables is missing" in daemon.log
    node.start()  # its value does not count, and IPv4 alone does not need the other


def without(node: Node, *names: str) -> None:
    """Let some programs be missing in the node; a copy of their folder, for some are links to a common one."""
    node.run("cp", "-a", "/usr/sbin", "/run/sbin")
    node.run("rm", *(f"/run/sbin/{name}" for name in names))
    node.run("mount", "--bind", "/run/sbin", "/usr/sbin")


def test_without_ip6tables_ipv4_is_served(node: Node) -> None:
    without(node, "ip6tables", "ip6tables-save", "ip6tables-restore")
    daemon = node.start("--ip-masq")
    assert "bootstrap done" in daemon.log
    assert node.run("iptables", "-t", "nat", "-S").count("-A FLANNEL-POSTRTG") == 6


def test_without_iptables_the_rest_is_served(node: Node) -> None:
    without(node, "iptables", "iptables-save", "iptables-restore")
    daemon = node.start("--ip-masq")
    daemon.said("iptables rules: ")
    daemon.list(peer(2))
    until(lambda: node.programmed(2), "a peer")


def test_a_lease_without_an_ipv6_subnet_ends_with_status_one(node: Node) -> None:
    node.ip("-6 addr add fd50::1/64 dev eth0 nodad")
    conf = {"Network": "10.244.0.0/16", "EnableIPv6": True, "IPv6Network": "fd00:10:244::/56",
            "Backend": {"Type": "vxlan"}}  # fmt: skip
    steered = json.dumps({"conf": conf, "subnet": OWN, "subnet6": "", "grace": 1.0})
    daemon = node.start(ready=False, dual=True, environment={"STEERED": steered})
    assert daemon.process.wait(timeout=10) == 1
    assert "without an IPv6 subnet" in daemon.log


def test_tables_of_an_earlier_run_with_nftables_go_and_without_nft_nothing_is_missed(node: Node) -> None:
    node.start("--ip-masq", nftables=True).stop()
    assert "flannel-ipv4" in node.run("nft", "list", "tables")
    node.start("--ip-masq").stop()
    assert "flannel-ipv4" not in node.run("nft", "list", "tables")
    without(node, "nft")
    assert "Running backend." in node.start("--ip-masq").log


# -- health --------------------------------------------------------------------------------------------------------


def test_health_answers_before_there_is_a_configuration(node: Node) -> None:
    daemon = node.start("--healthz-port=8081", backend={"Type": 7}, ready=False)
    daemon.said("Backend.Type is 7")
    assert ask(node, "/healthz").startswith("HTTP/1.1 200 OK")
    answer = ask(node, "/readyz")
    assert answer.startswith("HTTP/1.1 503 ")
    assert answer.endswith("flanneld is not ready yet\n")


def test_any_method_will_do_and_no_other_path(node: Node) -> None:
    node.start("--healthz-port=8081")
    for method in ("POST", "PUT", "DELETE"):
        assert ask(node, "/readyz", method=method).startswith("HTTP/1.1 200 OK")
    assert ask(node, "/healthz?x=1").startswith("HTTP/1.1 200 OK")
    assert ask(node, "/metrics").startswith("HTTP/1.1 404 ")


def test_health_listens_on_an_ipv6_address(node: Node) -> None:
    node.start("--healthz-port=8081", "--healthz-ip=::1")
    assert ask(node, "/healthz", address="::1").startswith("HTTP/1.1 200 OK")


def test_without_a_port_nobody_listens(node: Node) -> None:
    daemon = node.start()
    assert node.run("ss", "-Hltn").strip() == ""
    assert daemon.stop() == 0


# -- the end -------------------------------------------------------------------------------------------------------


def test_a_second_signal_ends_it_at_once(node: Node) -> None:
    """With a store that does not end, so that the first signal cannot be all there is to it."""
    daemon = node.start("--healthz-port=8081", broken=["hang"])
    pid = daemon.pid()
    os.kill(pid, signal.SIGTERM)
    daemon.said("Waiting for all goroutines to exit")
    os.kill(pid, signal.SIGTERM)
    assert daemon.process.wait(timeout=10) in (-signal.SIGTERM, 128 + signal.SIGTERM)
    assert "Exiting cleanly" not in daemon.log


def test_a_signal_counts_while_it_is_about_to_start_anew(node: Node) -> None:
    daemon = node.start(backend={"Type": "alloc"}, broken=["slow"])
    node.ip("addr flush dev eth0")
    node.ip("addr add 192.168.50.99/24 dev eth0")
    node.ip("route replace default via 192.168.50.254")
    daemon.said("Waiting for all goroutines to exit")
    assert "starting anew" in daemon.log
    assert daemon.stop() == 0
    assert daemon.log.count("CLI flags config") == 1


def test_a_signal_while_it_gives_up_costs_no_line(node: Node) -> None:
    daemon = node.start(broken=["start", "slow"], ready=False)
    daemon.said("cannot go on")
    assert daemon.stop() == 1
    assert "Traceback" not in daemon.log


def test_sighup_ends_it_as_it_does_any_program(node: Node) -> None:
    daemon = node.start()
    assert daemon.stop(signal.SIGHUP) in (-signal.SIGHUP, 128 + signal.SIGHUP)
    assert "shutdownHandler" not in daemon.log


def test_what_is_there_outlives_it_and_subnet_env_is_written_once(node: Node) -> None:
    daemon = node.start("--ip-masq")
    before = node.run("stat", "-c", "%i %Y", "/run/flannel/subnet.env")
    daemon.list(peer(2))
    until(lambda: node.programmed(2), "a peer")
    node.ip("link del flannel.1")
    until(lambda: node.programmed(2), "the device again")
    assert daemon.stop() == 0
    assert node.run("stat", "-c", "%i %Y", "/run/flannel/subnet.env") == before
    assert node.programmed(2)
    assert node.run("iptables", "-t", "nat", "-S").count("-A FLANNEL-POSTRTG") == 6


def test_the_file_can_be_read_by_all_whatever_the_umask(node: Node) -> None:
    node.run("rm", "-rf", "/run/flannel")
    before = os.umask(0o077)
    try:
        node.start("--subnet-file=/run/new/folder/subnet.env")
    finally:
        os.umask(before)
    assert node.run("stat", "-c", "%a", "/run/new/folder/subnet.env").strip() == "644"


def test_a_file_that_is_bound_cannot_be_replaced(node: Node) -> None:
    node.run("mkdir", "-p", "/run/flannel")
    node.run("touch", "/run/flannel/subnet.env", "/run/host")
    node.run("mount", "--bind", "/run/host", "/run/flannel/subnet.env")
    daemon = node.start("--healthz-port=8081")
    daemon.said("Failed to write subnet file")
    assert ask(node, "/readyz").startswith("HTTP/1.1 503 ")
