"""What the reference plugins make of flannel's configuration: flannel-behaviour.md, section 7.4."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flannel.test_cni_bridge import PLUGINS, Node


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Node]:
    if not PLUGINS:
        pytest.skip("bridge and host-local are missing (Debian and Ubuntu: containernetworking-plugins)")
    node = Node(tmp_path)
    yield node
    node.close()


def added(node: Node, container: str, **conf: Any) -> tuple[str, Any]:
    """Make a pod; return its namespace and what the plugin said."""
    pod = node.make_pod()
    result, status = node.cni("ADD", container, pod, node.conf(**conf))
    assert status == 0, result
    return pod, result


def test_the_bridge_has_the_first_address_and_forwarding_is_the_bridges_doing(made: Node) -> None:
    forwards = ("cat", "/proc/sys/net/ipv4/ip_forward")
    assert made.run(*forwards).stdout == "0\n"
    added(made, "one")
    [bridge] = json.loads(made.run("ip", "-j", "-d", "addr", "show", "cni0").stdout)
    assert (bridge["mtu"], bridge["linkinfo"]["info_kind"]) == (1450, "bridge")
    assert [(one["local"], one["prefixlen"]) for one in bridge["addr_info"] if one["family"] == "inet"] == [
        ("10.244.1.1", 24)
    ]
    assert made.run(*forwards).stdout == "1\n"


def test_a_bridge_with_another_address_is_refused(made: Node) -> None:
    """What follows a node's change of podCIDR."""
    made.run("ip", "link", "add", "cni0", "type", "bridge")
    made.run("ip", "addr", "add", "10.9.0.1/24", "dev", "cni0")
    error, status = made.cni("ADD", "one", made.make_pod(), made.conf())
    assert status == 1
    assert "already has an IP address different from" in error["msg"]


def test_interfaces_are_told_in_order_and_veths_have_names_of_their_own(made: Node) -> None:
    _, result = added(made, "one")
    names = [one["name"] for one in result["interfaces"]]
    assert names[::2] == ["cni0", "eth0"]
    assert re.fullmatch("veth[0-9a-f]{8}", names[1])
    assert "master cni0" in made.run("ip", "link", "show", names[1]).stdout


def test_hairpin_and_the_default_route_are_what_the_configuration_says(made: Node) -> None:
    _, result = added(made, "one")
    veth = result["interfaces"][1]["name"]
    assert "hairpin on" in made.run("bridge", "-d", "link", "show", "dev", veth).stdout
    pod, _ = added(made, "two", delegate={})
    assert "default" not in made.in_pod(pod, "ip", "route")


def test_the_bridge_stays_without_pods(made: Node) -> None:
    added(made, "one")
    assert made.cni("DEL", "one", "", made.conf()) == ({}, 0)
    assert "cni0" in made.run("ip", "link", "show", "cni0").stdout


def test_the_bridge_masquerades_where_flanneld_does_not(made: Node) -> None:
    env = made.folder / "subnet.env"
    env.write_text(env.read_text().replace("IPMASQ=true", "IPMASQ=false"))
    added(made, "one")
    rules = made.run("iptables", "-t", "nat", "-S").stdout
    chain = re.search(r"-A POSTROUTING -s 10\.244\.1\.2/32 .* -j (CNI-[0-9a-f]+)", rules)
    assert chain, rules
    assert re.search(rf"-A {chain[1]} -d 10\.244\.1\.0/24 .* -j ACCEPT", rules)
    assert re.search(rf"-A {chain[1]} ! -d 224\.0\.0\.0/4 .* -j MASQUERADE", rules)
    assert made.cni("DEL", "one", "", made.conf())[1] == 0


def test_addresses_go_round_and_are_kept_in_files(made: Node) -> None:
    _, first = added(made, "one")
    assert [one["address"] for one in first["ips"]] == ["10.244.1.2/24"]
    folder = "/var/lib/cni/networks/cbr0"
    assert made.run("od", "-An", "-c", f"{folder}/10.244.1.2").stdout.split() == [*"one", "\\r", "\\n", *"eth0"]
    assert made.run("cat", f"{folder}/last_reserved_ip.0").stdout == "10.244.1.2"
    assert made.run("ls", f"{folder}/lock").returncode == 0
    assert made.cni("DEL", "one", "", made.conf())[1] == 0
    _, second = added(made, "two")
    assert [one["address"] for one in second["ips"]] == ["10.244.1.3/24"]
    error, status = made.cni("ADD", "two", made.make_pod(), made.conf())
    assert status == 1, error


def host_local(node: Node, **conf: Any) -> Any:
    whole = {"name": "x", "cniVersion": "0.3.1", **conf}
    return node.cni("ADD", "one", "/none", whole, plugin="host-local")


def test_host_local_wants_networks_and_a_version_that_knows_two_of_them(made: Node) -> None:
    """Why flannel masks what it reads in subnet.env, and hands `ranges` on."""
    good = {"type": "host-local", "ranges": [[{"subnet": "10.1.0.0/24"}]]}
    assert host_local(made, ipam=good)[1] == 0
    error, status = host_local(made, ipam={"type": "host-local", "ranges": [[{"subnet": "10.1.0.1/24"}]]})
    assert status == 1
    assert "host bits" in error["msg"]
    two = {"type": "host-local", "ranges": [[{"subnet": "10.2.0.0/24"}], [{"subnet": "10.3.0.0/24"}]]}
    error, status = host_local(made, ipam=two, cniVersion="0.2.0")
    assert status == 1, error


# -- what the plugin makes of odd keys ---------------------------------------------------------------------------------


def test_empty_paths_are_taken_as_they_are(made: Node) -> None:
    error, status = made.cni("ADD", "one", made.make_pod(), made.conf(subnetFile=""))
    assert status == 1
    assert "failed to load flannel 'subnet.env' file" in error["msg"]


def test_what_the_delegate_is_not_told(made: Node) -> None:
    """prevResult, dns and capabilities stay behind."""
    added(made, "one", dns={"nameservers": ["192.0.2.1"]}, capabilities={"portMappings": True})
    saved = json.loads(made.run("cat", "/var/lib/cni/flannel/one").stdout)
    assert not {"dns", "capabilities", "prevResult", "subnetFile", "dataDir"} & saved.keys()
