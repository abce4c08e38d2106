"""extension and alloc: flannel-behaviour.md, sections 3.7 and 3.8; and the backends that are refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flannel.backends import extension
from flannel.backends.base import BackendError
from flannel.backends.extension import ExtensionBackend, expand
from flannel.daemon import make_backend
from flannel.netconf import NetConfError
from flannel.state import Recorded
from tests.flannel.backendlab import EXTERNAL, conf
from tests.flannel.corelab import Node, peer, until

RECORDING = """#!/bin/sh
read -r data
echo "$1 $SUBNET $PUBLIC_IP $NETWORK [$data] $2" >> /run/record
echo "said by $1"
"""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    script = tmp_path / "recording"
    script.write_text(RECORDING)
    script.chmod(0o755)
    made.run("cp", str(script), "/run/recording")
    yield made
    made.close()


@pytest.mark.parametrize(
    ("command", "argv"),
    [
        ("ip route add $SUBNET via ${PUBLIC_IP}", ["ip", "route", "add", "10.244.2.0/24", "via", "192.168.50.2"]),
        ("echo 'a b' | cat; x&&y", ["echo", "'a", "b'", "|", "cat;", "x&&y"]),
        ("a $NOBODY b", ["a", "", "b"]),
        ("", []),
    ],
)
def test_a_command_is_words_and_variables_and_no_shell(command: str, argv: list[str]) -> None:
    assert expand(command, {"SUBNET": "10.244.2.0/24", "PUBLIC_IP": "192.168.50.2"}) == argv


def test_a_command_that_is_no_text_is_refused() -> None:
    with pytest.raises(NetConfError, match="SubnetAddCommand"):
        ExtensionBackend(conf(Type="extension", SubnetAddCommand=["ip"]), EXTERNAL)


def test_commands_run_at_start_and_for_each_peer(node: Node) -> None:
    keys = ("PreStartupCommand", "PostStartupCommand", "SubnetAddCommand", "SubnetRemoveCommand")
    backend = {"Type": "extension", **{key: f"/run/recording {key} $SUBNET" for key in keys}}
    daemon = node.start(backend=backend)
    assert daemon.published() == {"ip": "192.168.50.1", "type": "extension", "data": "said by PreStartupCommand"}
    two = {**peer(2, kind="extension"), "data": "theirs"}
    daemon.list(two, peer(3, kind="vxlan"))

    def record() -> list[str]:
        return node.run("cat", "/run/record").splitlines()

    started = [
        "PreStartupCommand    [] ",
        "PostStartupCommand 10.244.1.0/24 192.168.50.1 10.244.0.0/16 [] 10.244.1.0/24",
    ]
    added = "SubnetAddCommand 10.244.2.0/24 192.168.50.2  [theirs] 10.244.2.0/24"
    until(lambda: record() == [*started, added], f"what was run: {record()}")
    daemon.tell(removed=two)
    removed = "SubnetRemoveCommand 10.244.2.0/24 192.168.50.2  [theirs] 10.244.2.0/24"
    until(lambda: record() == [*started, added, removed], f"what was run: {record()}")


SIX = """#!/bin/sh
read -r data
echo "$1 [$SUBNET] [$PUBLIC_IP] [$IPV6SUBNET] [$PUBLIC_IPV6] [$data]" >> /run/record
echo words
"""


@pytest.fixture
def node6(node: Node, tmp_path: Path) -> Node:
    script = tmp_path / "six"
    script.write_text(SIX)
    script.chmod(0o755)
    node.run("cp", str(script), "/run/six")
    for switch in ("all", "default", "eth0", "far", "lo"):
        node.run("sh", "-c", f"echo 0 > /proc/sys/net/ipv6/conf/{switch}/disable_ipv6", check=False)
    node.ip("addr add fd50::1/64 dev eth0 nodad")
    node.ip("-6 route add default via fd50::fe dev eth0")
    return node


COMMANDS6 = {
    "Type": "extension", "PreStartupCommand": "echo words", "PostStartupCommand": "/run/six post",
    "SubnetAddCommand": "/run/six add", "SubnetRemoveCommand": "/run/six remove",
}  # fmt: skip


def test_commands_have_both_families_in_dual_stack(node6: Node) -> None:
    daemon = node6.start("--public-ipv6=2001:db8::1", backend=COMMANDS6, dual=True)
    own = {"ip": "192.168.50.1", "type": "extension", "data": "words"}
    assert daemon.published() == {**own, "ip6": "fd50::1", "data6": None}
    two = {**peer(2, kind="extension"), "subnet6": "fd00:10:244:2::/64", "ip6": "fd50::2", "data": "theirs"}
    daemon.list(two, peer(3, kind="extension"))
    post = "post [10.244.1.0/24] [192.168.50.1] [fd00:10:244:1::/64] [fd50::1] []"
    lease = "[10.244.2.0/24] [192.168.50.2] [fd00:10:244:2::/64] [fd50::2] [theirs]"
    wanted = [post, f"add {lease}", "add [10.244.3.0/24] [192.168.50.3] [] [] []"]

    def record() -> list[str]:
        return node6.run("cat", "/run/record").splitlines()

    until(lambda: record() == wanted, f"what was run: {record()}\n{daemon.log}")
    lease = lease.replace("fd00:10:244:2::", "fd00:10:244:22::")
    steps = [
        ({"added": {**two, "subnet6": "fd00:10:244:22::/64"}}, f"add {lease}"),
        ({"removed": peer(3, kind="extension")}, "remove [10.244.3.0/24] [192.168.50.3] [] [] []"),
    ]
    for message, line in steps:
        daemon.tell(**message)
        wanted.append(line)
        until(lambda: record() == wanted, f"{line} after {record()}\n{daemon.log}")


def test_commands_have_ipv6_alone(node6: Node) -> None:
    daemon = node6.start(backend=COMMANDS6, alone6=True)
    assert daemon.published() == {"ip": "fd50::1", "type": "extension", "data": "words"}
    daemon.list({"subnet": "fd00:10:244:2::/64", "ip": "fd50::2", "type": "extension", "data": "theirs"})
    wanted = ["post [] [] [fd00:10:244:1::/64] [fd50::1] []", "add [] [] [fd00:10:244:2::/64] [fd50::2] [theirs]"]

    def record() -> list[str]:
        return node6.run("cat", "/run/record").splitlines()

    until(lambda: record() == wanted, f"what was run: {record()}\n{daemon.log}")


def test_a_command_that_fails_is_told_of(node: Node) -> None:
    refused = node.start(backend={"Type": "extension", "PreStartupCommand": "sh -c"}, ready=False)
    refused.said("PreStartupCommand ended with 2")
    assert refused.process.wait(10) == 1
    daemon = node.start(backend={"Type": "extension", "SubnetAddCommand": "/nowhere/it $SUBNET"})
    daemon.list(peer(2, kind="extension"))
    daemon.said("10.244.2.0/24 by 192.168.50.2: SubnetAddCommand ended with 127")


def test_half_a_character_in_a_peers_data_costs_no_other_peer(node: Node) -> None:
    """JSON can hold what no text can: its command gets something else, and the next one is run all the same."""
    daemon = node.start(backend={"Type": "extension", "SubnetAddCommand": "/run/recording add"})
    daemon.list({**peer(2, kind="extension"), "data": "\ud800"}, {**peer(3, kind="extension"), "data": "theirs"})
    both = ["add 10.244.2.0/24 192.168.50.2  [?] ", "add 10.244.3.0/24 192.168.50.3  [theirs] "]
    until(lambda: node.run("cat", "/run/record", check=False).splitlines() == both, f"both commands\n{daemon.log}")


def test_how_a_command_failed_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(extension, "_SECONDS", 0.2)
    killed = tmp_path / "killed"
    killed.write_text("#!/bin/sh\nkill -SEGV $$\n")
    killed.chmod(0o755)
    for command, said in (
        (str(killed), "PreStartupCommand was ended by signal 11"),
        ("sleep 60", "PreStartupCommand took more than"),
        ("echo \0", "PreStartupCommand ended with 127: echo: embedded null byte"),
        ("\0", "PreStartupCommand ended with 127: .*embedded null byte"),
    ):
        backend = ExtensionBackend(conf(Type="extension", PreStartupCommand=command), EXTERNAL)
        with pytest.raises(BackendError, match=said):
            backend.prepare(None, Recorded())  # type: ignore[arg-type]


def test_alloc_programs_nothing(node: Node) -> None:
    before = node.ip("route show"), node.ip("-o link show")
    daemon = node.start(backend={"Type": "alloc"})
    assert daemon.published() == {"ip": "192.168.50.1", "type": "", "data": None}
    daemon.list(peer(2, kind=""))
    daemon.tell(added=peer(3, kind="vxlan"))
    assert "FLANNEL_MTU=1500" in node.run("cat", "/run/flannel/subnet.env")
    assert daemon.stop() == 0
    assert (node.ip("route show"), node.ip("-o link show")) == before
    assert "ignoring" not in daemon.log


@pytest.mark.parametrize("kind", ["tencent-vpc", "aws-vpc", "gce", "ali-vpc"])
def test_a_cloud_s_backend_is_refused_with_what_to_use_instead(kind: str) -> None:
    with pytest.raises(BackendError, match=f"{kind}.*use vxlan"):
        make_backend(conf(Type=kind), EXTERNAL)
