"""The whole flanneld with a real etcd: flannel-behaviour.md, sections 2.5, 2.6, 4.2 and 8."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flannel import cli
from tests.flannel.conftest import free_ports
from tests.flannel.corelab import PYTHON, Node, until

PACKAGE = Path(cli.__file__).parent
CONF = {"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}


class Site:
    """A node with an etcd of its own."""

    def __init__(self, node: Node, folder: Path) -> None:
        self.node, self.folder = node, folder
        client, peers = free_ports(2)
        self.url = f"http://127.0.0.1:{client}"
        self._started: list[subprocess.Popen[bytes]] = []
        self.spawn(
            "etcd", "--data-dir", "/run/etcd", "--listen-client-urls", self.url, "--advertise-client-urls", self.url,
            "--listen-peer-urls", f"http://127.0.0.1:{peers}", output="etcd.log",
        )  # fmt: skip
        until(lambda: "OK" in self.etcdctl("put", "probe", "1"), f"etcd serves: see {folder}/etcd.log", 30)

    def spawn(self, *argv: str, output: str) -> subprocess.Popen[bytes]:
        self._started.append(self.node.spawn(*argv, output=self.folder / output))
        return self._started[-1]

    def etcdctl(self, *words: str) -> str:
        return self.node.run("env", "ETCDCTL_API=3", "etcdctl", "--endpoints", self.url, *words, check=False)

    def put(self, name: str, value: Any, prefix: str = "/coreos.com/network") -> None:
        assert "OK" in self.etcdctl("put", f"{prefix}/{name}", json.dumps(value))

    def keys(self, prefix: str = "/coreos.com/network") -> list[str]:
        found = self.etcdctl("get", "--prefix", "--keys-only", f"{prefix}/subnets/").split()
        return [key.removeprefix(f"{prefix}/subnets/") for key in found]

    def value(self, name: str) -> dict[str, Any]:
        return dict(json.loads(self.etcdctl("get", "--print-value-only", f"/coreos.com/network/subnets/{name}")))

    def flanneld(self, *flags: str, name: str = "flanneld.log") -> Flanneld:
        argv = [PYTHON, "-IS", str(PACKAGE), f"--etcd-endpoints={self.url}", *flags]
        return Flanneld(self.node, self.spawn(*argv, output=name), self.folder / name)

    def close(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()


class Flanneld:
    """One flanneld of the site."""

    def __init__(self, node: Node, process: subprocess.Popen[bytes], log: Path) -> None:
        self.node, self.process, self._log = node, process, log

    @property
    def log(self) -> str:
        return self._log.read_text()

    def said(self, text: str) -> None:
        until(lambda: text in self.log, f"{text!r} in {self._log}", 20)

    def stop(self, number: int = signal.SIGTERM) -> int:
        pid = self.node.run("pgrep", "-xo", "flanneld").strip()
        self.node.run("kill", f"-{number}", pid)
        return self.process.wait(timeout=20)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    if subprocess.run(["which", "etcd", "etcdctl"], capture_output=True, check=False).returncode:
        pytest.skip("etcd is missing (Debian and Ubuntu: etcd-server, etcd-client)")
    node = Node(tmp_path)
    made = Site(node, tmp_path)
    yield made
    made.close()
    node.close()


def test_a_configuration_is_waited_for_and_read_once(site: Site) -> None:
    daemon = site.flanneld()
    daemon.said("etcd has no key /coreos.com/network/config")
    site.put("config", {"Network": "10.244.0.0/29"})
    daemon.said("too small to hold at least four subnets")
    site.put("config", CONF)
    daemon.said("Running backend.")
    assert site.node.link("flannel.1")
    site.put("config", {**CONF, "Backend": {"Type": "vxlan", "VNI": 7}})
    site.put("subnets/10.244.2.0-24", {"PublicIP": "192.168.50.2", "BackendType": "vxlan",
                                       "BackendData": {"VtepMAC": "02:aa:bb:cc:dd:02"}})  # fmt: skip
    until(lambda: site.node.programmed(2), "a peer, with the old configuration")
    assert not site.node.link("flannel.7")
    assert daemon.stop() == 0


def test_the_key_and_all_else_outlive_the_daemon_and_are_found_again(site: Site) -> None:
    site.put("config", CONF)
    daemon = site.flanneld("--ip-masq")
    daemon.said("Running backend.")
    [key] = site.keys()
    before, mac = site.value(key), site.node.link("flannel.1")["address"]
    assert before == {
        "PublicIP": "192.168.50.1", "PublicIPv6": None, "BackendType": "vxlan",
        "BackendData": {"VNI": 1, "VtepMAC": mac},
    }  # fmt: skip
    assert daemon.stop() == 0
    assert (site.keys(), site.value(key)) == ([key], before)
    again = site.flanneld("--ip-masq", name="again.log")
    again.said("Running backend.")
    assert (site.keys(), site.value(key)) == ([key], before)
    assert "reusing it" in again.log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_etcd_is_away_ends_it_cleanly(site: Site, number: int) -> None:
    daemon = site.flanneld("--etcd-endpoints=http://127.0.0.1:1")
    daemon.said("Couldn't fetch network config")
    assert daemon.stop(number) == 0


def test_a_full_network_ends_with_status_one(site: Site) -> None:
    site.put("config", {**CONF, "Network": "10.244.0.0/22"})  # 1 to 3: the first one is never given
    for number in (1, 2, 3):
        site.put(f"subnets/10.244.{number}.0-24", {"PublicIP": f"192.168.50.{number + 10}"})
    daemon = site.flanneld()
    assert daemon.process.wait(timeout=20) == 1
    assert "out of subnets" in daemon.log


def test_two_networks_live_on_one_host(site: Site) -> None:
    site.put("config", CONF)
    site.put("config", {"Network": "10.12.0.0/16", "Backend": {"Type": "vxlan", "VNI": 2, "Port": 4789}}, "/second")
    first = site.flanneld()
    second = site.flanneld("--etcd-prefix=/second", "--subnet-file=/run/flannel/second.env", name="second.log")
    for daemon in (first, second):
        daemon.said("Running backend.")
    assert len(site.keys()) == len(site.keys("/second")) == 1
    assert "FLANNEL_NETWORK=10.12.0.0/16" in site.node.run("cat", "/run/flannel/second.env")
    assert "FLANNEL_NETWORK=10.244.0.0/16" in site.node.run("cat", "/run/flannel/subnet.env")
    assert site.node.link("flannel.1")
    assert site.node.link("flannel.2")


def test_a_changed_address_keeps_subnet_key_and_device(site: Site) -> None:
    """The fault of upstream's: another subnet, and the old lease left behind."""
    site.put("config", {**CONF, "Backend": {"Type": "host-gw"}})
    site.flanneld().said("Running backend.")
    [key] = site.keys()
    env = site.node.run("cat", "/run/flannel/subnet.env")
    pid = site.node.run("pgrep", "-xo", "flanneld").strip()
    site.node.run("kill", "-9", pid)
    until(lambda: not site.node.run("pgrep", "-xo", "flanneld", check=False), "it is gone")
    site.node.ip("addr flush dev eth0")
    site.node.ip("addr add 192.168.50.99/24 dev eth0")
    site.node.ip("route replace default via 192.168.50.254")
    again = site.flanneld(name="again.log")
    again.said("Running backend.")
    assert site.keys() == [key]
    assert site.value(key)["PublicIP"] == "192.168.50.99"
    assert site.node.run("cat", "/run/flannel/subnet.env") == env
