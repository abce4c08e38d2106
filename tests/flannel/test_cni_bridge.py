"""The CNI plugin with the real bridge, host-local and portmap, in namespaces that go away with the test."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PLUGIN = Path(__file__).parents[2] / "flannel" / "cni" / "plugin.py"
PLUGINS = next((folder for folder in ("/opt/cni/bin", "/usr/lib/cni") if Path(folder, "bridge").exists()), "")
STOCK = {"hairpinMode": True, "isDefaultGateway": True}


class Node:
    """A process that holds a user, network and mount namespace."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # A tmpfs over /var/lib/cni keeps host-local's files off the machine; -m and -n keep the rest.
        script = "mount -t tmpfs t /var/lib && mount -t sysfs s /sys && ip link set lo up && echo up && exec sleep 600"
        self._holder = subprocess.Popen(
            ["unshare", "-Urnm", "sh", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "up\n":
            self.close()
            assert self._holder.stderr is not None
            pytest.skip(f"no namespaces for a test here: {self._holder.stderr.read().strip()}")
        (folder / "subnet.env").write_text(
            "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
        )
        self._pods: list[subprocess.Popen[str]] = []

    def run(self, *argv: str, data: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        """Run something on the node."""
        enter = ["nsenter", "--preserve-credentials", "-U", "-n", "-m", "-t", str(self._holder.pid)]
        whole = {**os.environ, **env}
        return subprocess.run(
            [*enter, *argv], input=data, env=whole, capture_output=True, text=True, timeout=60, check=False
        )

    def make_pod(self) -> str:
        """Return the path of a new network namespace."""
        enter = ["nsenter", "--preserve-credentials", "-U", "-n", "-m", "-t", str(self._holder.pid)]
        argv = [*enter, "unshare", "-n", "sh", "-c", "echo up && exec sleep 600"]
        pod = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        self._pods.append(pod)
        assert pod.stdout is not None
        assert pod.stdout.readline() == "up\n"
        return f"/proc/{pod.pid}/ns/net"

    def conf(self, **keys: Any) -> dict[str, Any]:
        """Return the stock configuration of this node."""
        return {
            "name": "cbr0",
            "cniVersion": "1.0.0",
            "type": "flannel",
            "subnetFile": str(self.folder / "subnet.env"),
            "delegate": STOCK,
            **keys,
        }

    def cni(self, command: str, container: str, netns: str, conf: dict[str, Any], plugin: str = "") -> Any:
        """Call a plugin; return what it said, decoded, {} for nothing, and its exit status."""
        env = {"CNI_COMMAND": command, "CNI_CONTAINERID": container, "CNI_NETNS": netns, "CNI_IFNAME": "eth0"}
        argv = [f"{PLUGINS}/{plugin}"] if plugin else [os.path.realpath(sys.executable), "-IS", str(PLUGIN)]
        result = self.run(*argv, data=json.dumps(conf), CNI_PATH=PLUGINS, **env)
        return (json.loads(result.stdout) if result.stdout.strip() else {}), result.returncode

    def in_pod(self, netns: str, *argv: str) -> str:
        """Run something in a pod."""
        result = self.run("nsenter", f"--net={netns}", *argv)
        assert result.returncode == 0, result
        return result.stdout

    def addresses(self) -> list[str]:
        """Return what host-local has given out."""
        listed = self.run("ls", "/var/lib/cni/networks/cbr0").stdout.split()
        return sorted(name for name in listed if name[0].isdigit())

    def close(self) -> None:
        """End every process that holds a namespace."""
        for process in (*getattr(self, "_pods", ()), self._holder):
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


@pytest.fixture
def node(tmp_path: Path) -> Any:
    if not PLUGINS:
        pytest.skip("bridge and host-local are missing (Debian and Ubuntu: containernetworking-plugins)")
    for tool in ("unshare", "nsenter", "ip"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is missing")
    made = Node(tmp_path)
    yield made
    made.close()


def test_two_pods_of_a_node_reach_each_other(node: Node) -> None:
    first, second = node.make_pod(), node.make_pod()
    result, status = node.cni("ADD", "one", first, node.conf())
    assert status == 0, result
    assert result["cniVersion"] == "1.0.0"
    assert [ip["address"] for ip in result["ips"]] == ["10.244.1.2/24"]
    assert node.cni("ADD", "two", second, node.conf())[1] == 0
    node.in_pod(first, "ping", "-c", "1", "-W", "5", "10.244.1.3")
    routes = {route["dst"]: route for route in json.loads(node.in_pod(first, "ip", "-j", "route"))}
    assert set(routes) == {"default", "10.244.0.0/16", "10.244.1.0/24"}
    assert routes["10.244.0.0/16"]["gateway"] == "10.244.1.1"
    assert json.loads(node.in_pod(first, "ip", "-j", "link", "show", "eth0"))[0]["mtu"] == 1450
    assert node.addresses() == ["10.244.1.2", "10.244.1.3"]

    assert node.cni("CHECK", "one", first, node.conf(prevResult=result)) == ({}, 0)
    node.in_pod(first, "ip", "addr", "flush", "dev", "eth0")
    error, status = node.cni("CHECK", "one", first, node.conf(prevResult=result))
    assert status == 1, error

    assert node.cni("DEL", "one", first, node.conf()) == ({}, 0)
    assert node.addresses() == ["10.244.1.3"]
    assert node.cni("DEL", "one", first, node.conf()) == ({}, 0)
    assert node.cni("DEL", "two", "", node.conf()) == ({}, 0), "the pod's namespace may be gone"
    assert node.addresses() == []
    assert node.run("ls", "-A", "/var/lib/cni/flannel").stdout == ""


def test_portmap_follows_in_the_chain(node: Node) -> None:
    pod = node.make_pod()
    result, status = node.cni("ADD", "one", pod, node.conf())
    assert status == 0, result
    ports = [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]
    conf = {"name": "cbr0", "cniVersion": "1.0.0", "type": "portmap", "runtimeConfig": {"portMappings": ports}}
    mapped, status = node.cni("ADD", "one", pod, {**conf, "prevResult": result}, plugin="portmap")
    assert status == 0, mapped
    assert mapped["ips"] == result["ips"]
    assert "10.244.1.2:80" in node.run("iptables-save", "-t", "nat").stdout


def test_the_bridges_own_error_comes_through(node: Node) -> None:
    error, status = node.cni("ADD", "one", "/none", node.conf())
    assert status == 1
    assert "/none" in error["msg"]
    assert node.cni("DEL", "one", "", node.conf()) == ({}, 0)


def test_what_a_crash_left_is_collected(node: Node) -> None:
    """Debian's bridge does not know GC: its DEL gives the address back."""
    conf = node.conf(cniVersion="1.0.0")
    for name in ("one", "two"):
        assert node.cni("ADD", name, node.make_pod(), conf)[1] == 0
    young = node.conf(cniVersion="1.1.0", **{"cni.dev/valid-attachments": [{"containerID": "two", "ifname": "eth0"}]})
    assert node.cni("GC", "", "", young) == ({}, 0)
    assert node.addresses() == ["10.244.1.3"]
    assert node.run("ls", "-A", "/var/lib/cni/flannel").stdout == "two\n"
    assert node.cni("STATUS", "", "", young) == ({}, 0)
