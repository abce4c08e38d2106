"""charon as flanneld's child, played by a program of the tests: any kernel with IPsec's policies will do."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from flannel import charon
from flannel.charon import _Child, _children, connection
from flannel.kernel.xfrm import Association
from tests.flannel.corelab import HEALS_WITHIN, HERE, Flanneld, Node, peer, until
from tests.flannel.ipseclab import HERE as ADDRESS
from tests.flannel.ipseclab import IPSEC, OWN, PSK, pairs, shown


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    try:
        made.ip("xfrm policy add src 192.0.2.1/32 dst 192.0.2.2/32 dir out", check=False)
        if "192.0.2.1" not in made.ip("xfrm policy", check=False):
            pytest.skip("this kernel has no IPsec policies")
        made.ip("xfrm policy flush")
        yield made
    finally:
        made.close()


def start(node: Node) -> Flanneld:
    folder = node.folder / "bin"
    folder.mkdir(exist_ok=True)
    shutil.copy(HERE / "fake_charon.py", folder / "charon")
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "CHARON_LIBRARY": str(HERE.parents[1])}
    daemon = node.start(backend=IPSEC, environment=environment)
    daemon.list(peer(2, kind="ipsec"), peer(3, kind="ipsec"))
    return daemon


def heard(node: Node) -> list[Any]:
    """What the last charon was told, its pid first."""
    lines = [json.loads(line) for line in node.run("cat", "/run/flannel/heard", check=False).splitlines()]
    begun = [number for number, (what, _) in enumerate(lines) if what == "started"]
    return lines[begun[-1] :] if begun else []


def connections(node: Node) -> set[str]:
    """The connections that it has."""
    loaded: set[str] = set()
    for what, said in heard(node):
        if what == "load-conn":
            loaded |= set(said)
        elif what == "unload-conn":
            loaded.discard(said["name"])
    return loaded


def wanted(*numbers: int) -> set[str]:
    return {f"192.168.50.1-10.244.1.0/24-10.244.{n}.0/24-192.168.50.{n}" for n in numbers}


def test_keys_and_connections_follow_the_leases_and_a_charon_that_ends_is_replaced(node: Node) -> None:
    daemon = start(node)
    until(lambda: connections(node) == wanted(2, 3), f"connections\n{daemon.log}")
    owners = {said["owners"][0] for what, said in heard(node) if what == "load-shared"}
    assert owners == {"192.168.50.1", "192.168.50.2", "192.168.50.3"}
    assert {said["data"] for what, said in heard(node) if what == "load-shared"} == {PSK}
    daemon.tell(removed=peer(2, kind="ipsec"))
    until(lambda: connections(node) == wanted(3), f"one connection\n{daemon.log}", HEALS_WITHIN)
    until(lambda: "terminate" in [what for what, _ in heard(node)], "the end of its associations", HEALS_WITHIN)
    first = heard(node)[0][1]
    node.run("kill", "-9", str(first))
    until(lambda: heard(node)[0][1] != first and connections(node) == wanted(3), f"a new one\n{daemon.log}")
    daemon.said("charon has ended; starting it again")
    assert PSK not in daemon.log


def test_a_connection_that_is_refused_costs_no_other(node: Node) -> None:
    daemon = start(node)
    daemon.list(*(peer(number, kind="ipsec") for number in (2, 9, 3)))
    daemon.said("charon refused load-conn: it is nine")
    until(lambda: connections(node) >= wanted(2, 3), f"connections\n{daemon.log}")
    daemon.tell(added=peer(4, kind="ipsec"))
    until(lambda: connections(node) >= wanted(2, 3, 4), f"connections\n{daemon.log}", HEALS_WITHIN)
    names = [name for what, said in heard(node) if what == "load-conn" for name in said]
    assert sorted(names) == sorted(wanted(2, 3, 4, 9))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_charon_ends_with_flanneld_and_policies_stay(node: Node, number: signal.Signals) -> None:
    daemon = start(node)
    until(lambda: connections(node) == wanted(2, 3), f"connections\n{daemon.log}")
    charon_pid = str(heard(node)[0][1])
    daemon.stop(number)
    state = ["sh", "-c", f"grep -s State: /proc/{charon_pid}/status || echo gone"]
    until(lambda: any(word in node.run(*state) for word in ("zombie", "gone")), "the end of charon", HEALS_WITHIN)
    assert shown(node) == pairs(2, 3)


@pytest.mark.parametrize(
    "damage",
    [
        "xfrm policy flush",
        "xfrm policy delete src 10.244.1.0/24 dst 10.244.2.0/24 dir out",
        "xfrm policy update src 10.244.2.0/24 dst 10.244.1.0/24 dir in",
    ],
)
def test_policies_heal_without_esp_too(node: Node, damage: str) -> None:
    daemon = start(node)

    def whole() -> bool:
        return shown(node) == pairs(2, 3) and node.ip("xfrm policy list").count("reqid 11 mode tunnel") == 6

    until(whole, f"policies {shown(node)}\n{daemon.log}", HEALS_WITHIN)
    node.ip(damage)
    until(whole, f"policies after `ip {damage}`\n{daemon.log}", HEALS_WITHIN)


@pytest.mark.parametrize(
    ("content", "stays"), [("1", False), (str(2**22 + 1), False), ("no number", False), ("", False), ("own", True)]
)
def test_only_a_living_charon_s_pid_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, stays: bool
) -> None:
    file = tmp_path / "charon.pid"
    name = Path("/proc/self/comm").read_text()
    monkeypatch.setattr(charon, "_PID_FILE", str(file))
    charon._remove_stale_pid()  # there is none
    file.write_text(str(os.getpid()) if content == "own" else content)
    try:
        if stays:
            Path("/proc/self/comm").write_text("charon")
        charon._remove_stale_pid()
    finally:
        Path("/proc/self/comm").write_text(name)
    assert file.exists() == stays


def test_what_charon_takes_for_installed() -> None:
    child = {"name": "k", "uniqueid": "7", "state": "INSTALLED", "spi-in": "c7a1b2c3", "spi-out": "102"}
    ike = {"version": "2", "child-sas": {"k-7": child, "k-6": {**child, "state": "DELETED"}}}
    assert _children({"c": ike, "d": {}, "e": "text"}) == [_Child("c", "k", "7", 0xC7A1B2C3, 0x102)]


def test_what_nobody_foresaw_is_no_reason_to_give_charon_up(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(charon, "_RETRY", 0.0)
    made = charon.Charon("/bin/true", str(ADDRESS), PSK)
    steps = []

    def step() -> None:
        steps.append(1)
        made._stopping = len(steps) == 3
        _children({"c": {"child-sas": {"k": {"state": "INSTALLED", "spi-in": PSK}}}})

    monkeypatch.setattr(made, "_step", step)
    made._work()
    said = capfd.readouterr().err
    assert len(steps) == 3
    assert said.count("ipsec: unexpected ValueError at charon.py:") == 1
    assert PSK not in said


def test_what_an_earlier_charon_left_goes_once_there_is_a_new_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    there, other = ADDRESS + 1, ADDRESS + 2
    left = {Association(ADDRESS, there, 1), Association(there, ADDRESS, 2), Association(ADDRESS, other, 3)}
    made = charon.Charon("/bin/true", str(ADDRESS), PSK)
    gone: list[Any] = []

    class Kernel:
        def __init__(self, protocol: int) -> None: ...

        def batch(self, messages: list[Any]) -> list[Any]:
            gone.extend(messages)
            return []

        def close(self) -> None: ...

    monkeypatch.setattr(charon, "Netlink", Kernel)
    made._left = set(left)
    pair = {"local-host": str(ADDRESS), "remote-host": str(there)}
    made._replace_left({"c": pair})
    assert made._left == left
    made._replace_left({"up": "yes", "c": pair})
    assert made._left == {Association(ADDRESS, other, 3)}
    assert len(gone) == 2


def starts(here: IPv4Address, there: IPv4Address) -> str:
    proposals = ("aes256-sha256-modp4096", "aes128gcm16-sha256-prfsha256-ecp256")
    _, made = connection(here, "10.244.1.0/24", there, "10.244.2.0/24", proposals=proposals, encap=False)
    ((_, settings),) = made["children"].items()
    return str(settings["start_action"])


def test_one_of_two_nodes_begins() -> None:
    assert {starts(ADDRESS, ADDRESS + 1), starts(ADDRESS + 1, ADDRESS)} == {"start", "none"}


class Asked:
    """charon, with these associations."""

    def __init__(self, *connections: str) -> None:
        child = {"state": "INSTALLED", "name": "x", "uniqueid": "1", "spi-in": "1", "spi-out": "2"}
        self.sections = [{name: {"child-sas": {"x-1": child}}} for name in connections]
        self.begun: list[str] = []

    def stream(self, command: str, event: str, message: dict[str, Any]) -> list[dict[str, Any]]:
        return [section for section in self.sections if message["ike"] in section]

    def ask(self, command: str, message: dict[str, Any]) -> dict[str, Any]:
        if command == "initiate":
            self.begun.append(f"{message['ike']} {message['child']}")
        return {}


def test_what_the_peer_has_not_begun_in_time_is_begun_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = charon.Charon("/nowhere", str(ADDRESS + 9), PSK, str(tmp_path))
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    children = {"children": {"x": {"start_action": "none"}}, "remote_addrs": ["192.168.50.2"]}
    own = {"children": {"x": {"start_action": "start"}}, "remote_addrs": ["192.168.50.99"]}
    vici = Asked("there")
    made._tell(vici, {"there": children, "not-there": children, "own": own})  # type: ignore[arg-type]
    made._begin_due(vici)  # type: ignore[arg-type]
    assert vici.begun == [], "the peer has time left"
    now += charon._PEER_BEGINS_WITHIN
    made._begin_due(vici)  # type: ignore[arg-type]
    assert vici.begun == ["not-there x"]
    made._begin_due(vici)  # type: ignore[arg-type]
    assert len(vici.begun) == 1, "once"


def test_a_connection_has_upstream_s_settings() -> None:
    proposals = ("aes256-sha256-modp4096", "aes128gcm16-sha256-prfsha256-ecp256")
    name, made = connection(
        ADDRESS, str(OWN), ADDRESS + 1, "10.244.2.0/24", proposals=proposals, encap=False
    )  # fmt: skip
    assert name in wanted(2)
    assert (made["version"], made["keyingtries"], made["encap"]) == ("2", "0", "no")
    assert made["local"] == {"auth": "psk", "id": str(ADDRESS)}
    ((child, settings),) = made["children"].items()
    assert child == "10.244.1.0/24-10.244.2.0/24"
    assert (settings["close_action"], settings["dpd_action"], settings["rekey_time"]) == ("trap", "restart", "1h")
