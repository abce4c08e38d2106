"""The daemon as a process: start-up, files, health, rules, signals."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flannel import subnetenv
from flannel.health import HealthError, HealthServer
from tests.flannel.corelab import OWN, Node, peer, until

RULES = ("-t", "nat", "-S")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.close()


def ask(node: Node, path: str) -> str:
    """GET from inside the node, without a client program."""
    script = (
        "import socket,sys; s=socket.create_connection(('127.0.0.1',8081)); "
        "s.sendall(('GET '+sys.argv[1]+' HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n').encode()); print(s.makefile().read())"
    )
    return node.run("/usr/bin/python3", "-ISc", script, path)


# -- files ---------------------------------------------------------------------------------------------------------


def test_subnet_env_holds_upstreams_lines(node: Node) -> None:
    node.start("--ip-masq")
    assert node.run("cat", "/run/flannel/subnet.env") == (
        "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
    )
    assert node.run("stat", "-c", "%a", "/run/flannel/subnet.env").strip() == "644"


def test_subnet_env_is_replaced_in_one_step_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "new" / "subnet.env"
    before = os.umask(0o077)
    try:
        subnetenv.write(str(path), "A=1\n")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    path.chmod(0o600)
    inode = path.stat().st_ino
    subnetenv.write(str(path), "A=2\n")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("A=2\n", 0o600)
    assert path.stat().st_ino != inode
    assert [one.name for one in path.parent.iterdir()] == ["subnet.env"]


@pytest.mark.parametrize(
    ("text", "subnet"),
    [
        ("FLANNEL_SUBNET=10.244.1.1/24\n", "10.244.1.0/24"),
        ('FLANNEL_SUBNET="10.244.1.1/24"\n', "10.244.1.0/24"),
        ("FLANNEL_SUBNET=10.244.1.1/24,10.244.2.1/24\n", "None"),
        ("FLANNEL_SUBNET=x\nnonsense\n", "None"),
        ("", "None"),
    ],
)
def test_subnet_env_is_read_back(tmp_path: Path, text: str, subnet: str) -> None:
    (tmp_path / "subnet.env").write_text(text)
    assert str(subnetenv.read(str(tmp_path / "subnet.env")).subnet) == subnet
    assert subnetenv.read(str(tmp_path / "missing")) == subnetenv.Previous()


def test_a_file_that_cannot_be_written_warns_and_is_never_ready(node: Node) -> None:
    node.run("sh", "-c", "mkdir -p /run/flannel/subnet.env")
    daemon = node.start("--healthz-port=8081")
    daemon.said("Failed to write subnet file")
    assert "503" in ask(node, "/readyz")
    assert "200" in ask(node, "/healthz")


# -- process -------------------------------------------------------------------------------------------------------


def test_it_is_one_process_by_its_name_and_ends_cleanly(node: Node) -> None:
    daemon = node.start()
    assert node.run("pgrep", "-xc", "flanneld").strip() == "1"
    assert daemon.stop() == 0
    assert "Exiting cleanly..." in daemon.log
    order = [
        "CLI flags config:", "Created subnet manager:", "Installing signal handlers",
        "Found network config - Backend type:",
        "Using interface with name", "Defaulting external address", "bootstrap done", "Wrote subnet file to",
        "flannel is ready", "Running backend.", "Waiting for all goroutines to exit", "Exiting cleanly...",
    ]  # fmt: skip
    places = [daemon.log.index(text) for text in order]
    assert places == sorted(places)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_waiting_for_the_configuration_ends_cleanly(node: Node, number: int) -> None:
    daemon = node.start(backend={"Type": 7}, ready=False)
    daemon.said("Backend.Type is 7")
    assert daemon.stop(number) == 0


@pytest.mark.parametrize(
    ("backend", "flags", "said"),
    [
        ({"Type": "vxlam"}, [], "unknown backend type 'vxlam'"),
        ({"Type": "ipsec", "PSK": "short"}, [], "password is too short"),
        ({"Type": "vxlan", "Port": "x"}, [], "Backend.Port is 'x'"),
        ({"Type": "vxlan", "MTU": 100}, [], "50 bytes inside the tunnel"),
        ({"Type": "vxlan"}, ["--iface=nope"], "nope"),
        ({"Type": "vxlan"}, ["--public-ip=203.0.113.8"], "203.0.113.8"),
        ({"Type": "vxlan"}, ["--healthz-port=8081", "--healthz-ip=203.0.113.8"], "203.0.113.8 port 8081"),
    ],
)
def test_what_cannot_work_ends_with_status_one_and_the_reason(
    node: Node, backend: dict[str, object], flags: list[str], said: str
) -> None:
    daemon = node.start(*flags, backend=backend, ready=False)
    assert daemon.process.wait(timeout=10) == 1
    assert said in daemon.log
    assert "Traceback" not in daemon.log


# -- interface -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "used"),
    [
        ([], "eth0 and address 192.168.50.1"),
        (["--iface=nope", "--iface=eth1"], "eth1 and address 10.9.0.1"),
        (["--iface=10.9.0.2"], "eth1 and address 10.9.0.2"),
        (["--iface-regex=^10\\.9"], "eth1 and address 10.9.0.1"),
        (["--iface-regex=th1$"], "eth1 and address 10.9.0.1"),
        (["--iface-regex=[", "--iface-can-reach=10.9.0.77"], "eth1 and address 10.9.0.1"),
        (["--public-ip=10.9.0.2"], "eth1 and address 10.9.0.2"),
    ],
)
def test_the_interface_is_chosen_as_upstream_does(node: Node, flags: list[str], used: str) -> None:
    for words in (
        "link add eth1 type veth peer name far1", "link set far1 up", "link set eth1 up",
        "addr add 169.254.7.7/16 dev eth1",
        "addr add 10.9.0.1/24 dev eth1", "addr add 10.9.0.2/24 dev eth1",
    ):  # fmt: skip
        node.ip(words)
    assert f"Using interface with name {used}" in node.start(*flags).log


def test_a_default_route_of_several_paths_is_an_error(node: Node) -> None:
    node.ip("route replace default nexthop via 192.168.50.253 nexthop via 192.168.50.254")
    daemon = node.start(ready=False)
    assert daemon.process.wait(timeout=10) == 1
    assert "several paths" in daemon.log


def test_a_public_address_is_published_and_local_to_the_tunnel(node: Node) -> None:
    daemon = node.start("--iface=eth0", "--public-ip=203.0.113.8")
    assert daemon.published()["ip"] == "203.0.113.8"
    assert "local 203.0.113.8 dev eth0" in node.ip("-d link show flannel.1")


# -- health --------------------------------------------------------------------------------------------------------


def test_health_follows_the_daemon(node: Node) -> None:
    node.start("--healthz-port=8081")
    assert ask(node, "/healthz").startswith("HTTP/1.1 200 OK")
    assert ask(node, "/healthz").endswith("flanneld is running\n")
    assert ask(node, "/readyz").endswith("flanneld is ready\n")
    assert "404" in ask(node, "/")


def test_a_slow_client_holds_up_nobody() -> None:
    server = HealthServer("127.0.0.1", 0)
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(70)]
    slow[0].sendall(b"GET /healthz HT")
    answers: list[bytes] = []

    def quick() -> None:
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(b"GET /readyz HTTP/1.0\r\n\r\n")
            answers.append(sock.makefile("rb").read())

    thread = threading.Thread(target=quick)
    thread.start()
    thread.join(timeout=2)
    assert answers
    assert answers[0].startswith(b"HTTP/1.1 503")
    for sock in slow:
        sock.close()
    with pytest.raises(HealthError, match=str(server.port)):
        HealthServer("127.0.0.1", server.port)


# -- rules ---------------------------------------------------------------------------------------------------------


def flavoured(node: Node, flavour: str) -> dict[str, str]:
    """Make `iptables` mean one flavour inside the node."""
    node.run("mkdir", "-p", "/run/bin")
    for name in ("iptables", "iptables-save", "iptables-restore"):
        tool = name.replace("iptables", f"iptables-{flavour}")
        node.run("ln", "-s", f"/usr/sbin/{tool}", f"/run/bin/{name}")
    return {"PATH": f"/run/bin:{os.environ['PATH']}"}


@pytest.mark.parametrize(("flavour", "seconds"), [("nft", 2.0), ("legacy", 3.0)])
def test_rules_come_back_and_counters_stay(node: Node, flavour: str, seconds: float) -> None:
    iptables = f"iptables-{flavour}"
    resync = 1 if flavour == "legacy" else 3600
    environment = flavoured(node, flavour)
    daemon = node.start("--ip-masq", f"--iptables-resync={resync}", environment=environment)
    nat, fwd = node.run(iptables, "-t", "nat", "-S"), node.run(iptables, "-S")
    assert nat.count("--random-fully") == 2
    assert '-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD' in fwd
    for damage in (
        "-t nat -F FLANNEL-POSTRTG",
        "-t nat -D FLANNEL-POSTRTG 3",
        "-t nat -F",
        "-F FORWARD",
        "-t nat -A POSTROUTING -m comment --comment flanneld_masq -j FLANNEL-POSTRTG",
        "-D FLANNEL-FWD 1",
    ):
        node.run(iptables, "-w", *damage.split())
        until(
            lambda: (node.run(iptables, "-t", "nat", "-S"), node.run(iptables, "-S")) == (nat, fwd),
            f"rules after {damage}\n{node.run(iptables, '-t', 'nat', '-S')}\n{daemon.log}",
            seconds,
        )
    node.run(iptables, "-t", "nat", "-R", "FLANNEL-POSTRTG", "2", *nat_rule(nat), "-c", "7", "700")
    node.run(iptables, "-t", "nat", "-D", "POSTROUTING", "1")
    until(lambda: node.run(iptables, "-t", "nat", "-S") == nat, "the jump is back", seconds)
    assert "-c 7 700" in node.run(iptables, "-t", "nat", "-S", "FLANNEL-POSTRTG", "-v")


def nat_rule(listing: str) -> list[str]:
    """The words of the second rule of our chain."""
    line = [line for line in listing.splitlines() if line.startswith("-A FLANNEL-POSTRTG ")][1]
    return shlex.split(line)[2:]


def test_without_ip_masq_the_old_rules_go(node: Node) -> None:
    node.start("--ip-masq").stop()
    assert "FLANNEL-POSTRTG" in node.run("iptables", *RULES)
    node.start("--iptables-forward-rules=false")
    assert "FLANNEL" not in node.run("iptables", *RULES)
    assert "FLANNEL" not in node.run("iptables", "-S")


def test_an_earlier_networks_rules_go(node: Node) -> None:
    node.run("iptables", "-t", "nat", "-N", "FLANNEL-POSTRTG")
    node.run("iptables", "-t", "nat", "-A", "FLANNEL-POSTRTG", "-s", "10.9.0.0/16", "-j", "RETURN")
    node.start("--ip-masq")
    assert "10.9.0.0" not in node.run("iptables", *RULES)
    assert node.run("iptables", *RULES).count("-A FLANNEL-POSTRTG") == 6


def test_iptables_that_fails_is_said_and_tried_again(node: Node) -> None:
    environment = flavoured(node, "nft")
    node.run("ln", "-sf", "/bin/false", "/run/bin/iptables-restore")
    daemon = node.start("--ip-masq", environment=environment)
    daemon.said("iptables rules: `iptables-restore")
    node.run("ln", "-sf", "/usr/sbin/iptables-nft-restore", "/run/bin/iptables-restore")
    daemon.said("as they must be again")
    assert node.run("iptables-nft", *RULES).count("-A FLANNEL-POSTRTG") == 6


@pytest.mark.parametrize("flavour", ["nft", "legacy"])
def test_without_a_resync_period_nothing_is_busy(node: Node, flavour: str) -> None:
    """Upstream looks at the rules without a pause then, by 1.3 processors."""
    daemon = node.start("--ip-masq", "--iptables-resync=0", environment=flavoured(node, flavour))
    daemon.list(peer(2))
    until(lambda: node.programmed(2), "a peer")

    def spent() -> float:
        words = Path(f"/proc/{daemon.pid()}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, words[11:15])) / os.sysconf("SC_CLK_TCK")  # its own, and that of its children

    before, deadline = spent(), time.monotonic() + 2.0
    while time.monotonic() < deadline:
        assert spent() - before < 0.2
        time.sleep(0.1)
    if flavour == "legacy":
        assert "--iptables-resync is 0" in daemon.log


def test_two_daemons_of_one_node_keep_each_others_rules_and_come_to_rest(node: Node) -> None:
    environment = flavoured(node, "nft")
    first = node.start("--ip-masq", environment=environment)
    second = node.start(
        "--ip-masq", "--subnet-file=/run/flannel/second.env", environment=environment,
        backend={"Type": "vxlan", "VNI": 2, "Port": 4789}, network="10.12.0.0/16", subnet="10.12.7.0/24",
    )  # fmt: skip
    # The mark's rule serves both; each has five more.
    until(lambda: node.run("iptables-nft", *RULES).count("-A FLANNEL-POSTRTG") == 11, "both networks' rules", 3)
    until(lambda: node.run("iptables-nft", "-S").count("-A FLANNEL-FWD") == 4, "both networks' rules", 3)
    generation = node.run("nft", "-j", "list", "ruleset")
    writes = first.log.count("setting them again") + second.log.count("setting them again")
    with pytest.raises(pytest.fail.Exception):
        until(lambda: node.run("nft", "-j", "list", "ruleset") != generation, "a quarrel", 1.0)
    assert first.log.count("setting them again") + second.log.count("setting them again") == writes


# -- lease ---------------------------------------------------------------------------------------------------------


def test_a_lost_lease_is_taken_again(node: Node) -> None:
    daemon = node.start()
    assert daemon.published()["ip"] == "192.168.50.1"
    daemon.list(peer(2))
    daemon.tell(lost="deleted by hand")
    assert daemon.published()["ip"] == "192.168.50.1"
    daemon.said(f"Lease acquired again: {OWN}")
