"""A stranger's flanneld runs as root of its node, and must not be able to change the host."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from testbed.labs import netns
from testbed.labs.netns import NetnsLab
from testbed.model import LabSpec
from testbed.nodes import deploy
from testbed.nodes.nodefiles import node_files
from testbed.options import RunOptions
from tests.labs.helpers import unique

#: Every line tries something that would hurt if it were done to the host; none may end the script.
HOSTILE = r"""#!/bin/sh
note() { echo "$1: $2" >>/var/log/attempts; }
try() { name=$1; shift; if "$@" 2>>/var/log/errors; then note "$name" done; else note "$name" refused; fi; }
into() { echo "$2" >"$1"; }

try etc-file into /etc/hostile x
try root-file into /hostile x
try usr-file into /usr/hostile x
try usr-bin into /usr/bin/hostile x
try usr-lib rm -f /usr/lib/os-release
try hostname hostname owned
try panic into /proc/sys/kernel/panic 77
try swappiness into /proc/sys/vm/swappiness 77
try core-pattern into /proc/sys/kernel/core_pattern '|/hostile'
try file-max into /proc/sys/fs/file-max 1000
try sysrq sh -c 'exec 3>/proc/sysrq-trigger'
try sys-file into /sys/kernel/mm/transparent_hugepage/enabled never
try uevent into /sys/kernel/uevent_helper /hostile
try remount mount -o remount,rw /usr
try remount-bind mount -o remount,bind,rw /usr
try unmount-usr umount -l /usr
try unmount-root umount -l /
try proc-again sh -c 'mkdir -p /tmp/p && mount -t proc proc /tmp/p && echo 77 >/tmp/p/sys/kernel/panic'
thp=kernel/mm/transparent_hugepage/enabled
try sysfs-again sh -c "mkdir -p /tmp/s && mount -t sysfs sysfs /tmp/s && echo never >/tmp/s/$thp"
try nested unshare -Urm sh -c 'mount -o remount,bind,rw /usr && echo x >/usr/hostile'
try device mknod /tmp/disk b 253 0
try kmsg sh -c 'echo hostile >/dev/kmsg'
try module modprobe dummy
try reboot unshare -pf --kill-child reboot -f
try clock date -s 2001-01-01
try signal-all kill -TERM 4194303
try host-init kill -0 2
try old-root ls /.old/etc
try host-files ls /home/hostile-marker /root/.bashrc

try network ip link add hostile0 type veth peer name hostile1
try firewall iptables -A INPUT -s 192.0.2.1 -j DROP
try mine into /proc/sys/net/ipv4/ip_forward 1

mkdir -p /run/flannel
for word in FLANNEL_NETWORK=10.244.0.0/16 FLANNEL_SUBNET=10.244.7.1/24 FLANNEL_MTU=1450 FLANNEL_IPMASQ=true; do
    echo "$word" >>/run/flannel/subnet.env
done
for word in "$@"; do
    case $word in --subnet-file=*) cp /run/flannel/subnet.env "${word#*=}" ;; esac
done
exec sleep 600
"""

#: What is allowed, since it only concerns the node itself.
HARMLESS = {
    *("etc-file", "hostname", "nested", "network", "firewall", "mine", "proc-again", "sysfs-again", "unmount-root"),
    "reboot",  # of a PID namespace of its own
}


def host_state() -> dict[str, object]:
    """Everything of the host that the script tries to change, and more."""

    def words(*argv: str) -> str:
        return subprocess.run(argv, capture_output=True, text=True, check=False).stdout

    def listing(folder: str) -> list[tuple[str, int, int]]:
        found = []
        for entry in os.scandir(folder):
            stat = entry.stat(follow_symlinks=False)
            found.append((entry.name, stat.st_mode, stat.st_ino))
        return sorted(found)

    sysctls = {}
    for key in (
        "kernel/panic",
        "vm/swappiness",
        "kernel/core_pattern",
        "fs/file-max",
        "net/ipv4/ip_forward",
        "kernel/hostname",
    ):
        sysctls[key] = Path("/proc/sys", key).read_text()
    rules = words("iptables-save") if os.getuid() == 0 else ""
    return {
        "sysctls": sysctls,
        "hostname": socket.gethostname(),
        "links": sorted(line.split()[1] for line in words("ip", "-o", "link").splitlines()),
        "addresses": words("ip", "-br", "addr"),
        "rules": [line for line in rules.splitlines() if not line.startswith("#")],
        "folders": {path: listing(path) for path in ("/", "/etc", "/usr", "/usr/bin", "/usr/lib", "/dev")},
        "mounts": sorted(Path("/proc/self/mounts").read_text().splitlines()),
        "thp": Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        if Path("/sys/kernel/mm/transparent_hugepage/enabled").exists()
        else "",
    }


def attempts(lab: NetnsLab, node: str) -> dict[str, str]:
    text = lab.node(node).read("/var/log/attempts").decode()
    return dict(line.split(": ", 1) for line in text.splitlines())


MANIFEST = Path(__file__).parent.parent / "data" / "s0-vxlan-direct.yml"


@pytest.fixture
def hostile_manifest(tmp_path: Path) -> Path:
    """The first seed's manifest, which tells flanneld to write where it hurts."""
    text = MANIFEST.read_text()
    changed = text.replace(
        "- --kube-subnet-mgr", "- --kube-subnet-mgr\n        - --subnet-file=/etc/hostile-subnet.env", 1
    )
    assert changed != text
    path = tmp_path / "kube-flannel.yml"
    path.write_text(changed)
    return path


@pytest.mark.skipif(os.getuid() != 0, reason="as root there is the most to lose; an ordinary user cannot do any of it")
def test_a_hostile_flanneld_changes_nothing_of_the_host(tmp_path: Path, hostile_manifest: Path) -> None:
    program = tmp_path / "hostile"
    program.write_text(HOSTILE)
    program.chmod(0o755)
    before = host_state()
    options = RunOptions(
        backend="vxlan_direct",
        name=unique("hostile"),
        topology="racks",
        manifest=hostile_manifest,
        flanneld={"": program},
    )
    spec, flannel = deploy.describe_lab(options)
    assert flannel.subnet_file == "/etc/hostile-subnet.env"
    lab = netns.bring_up(spec)
    try:
        cluster = deploy.Cluster(lab, flannel, options)
        lab.node("worker1").run(["tar", "-x", "-C", "/"], stdin=node_files(flannel, program, None))
        cluster.start_flanneld("worker1")
        cluster.wait_ready(["worker1"])
        said = attempts(lab, "worker1")
        assert len(said) > 30, "the script did not get to its end"
        assert {name for name, how in said.items() if how == "done"} <= HARMLESS, said
        assert said["etc-file"] == "done", "nothing was attempted for real"
        assert lab.node("worker1").read("/etc/hostile-subnet.env")
        assert lab.node("worker2").run(["true"]).ok, "it took another node down"
        assert host_state() == before
    finally:
        lab.down()
    assert host_state() == before
    assert not Path("/etc/hostile").exists()


def test_the_box_shows_nothing_of_the_hosts_files(flat: LabSpec, make_lab: object, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    lab = make_lab(flat)  # type: ignore[operator]
    assert not lab.node("worker1").run(["test", "-e", str(secret)], check=False).ok
    seen = lab.node("worker1").run(["ls", "/home", "/root", "/var/lib", "/opt"]).stdout
    assert {line for line in seen.split() if not line.endswith(":")} == set()
