"""One machine of a lab from inside: its own files, settings, devices and daemons."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from typing import Any

from testbed.labs.inside.root import MS_NODEV, MS_NOEXEC, MS_NOSUID, NEWNET, copy, detach, mount, tmpfs, unshare, write


def make_node_root(node: dict[str, Any]) -> None:
    """Give this mount namespace its own /proc, /sys, and tmpfs wherever a node writes."""
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    for path in ("/etc", "/var", "/root", "/opt"):
        tmpfs(path)
    make_volatile()
    mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620")
    for path in ("/var/lib", "/var/log", "/var/tmp", "/var/cache", "/var/spool"):
        os.makedirs(path)
    os.symlink("/run", "/var/run")
    os.symlink("/run/lock", "/var/lock")
    for name in os.listdir("/.base"):
        if name != "alternatives":
            os.symlink(f"/.base/{name}", f"/etc/{name}")
    # A node's own: which iptables it has is chosen by node.
    os.makedirs("/etc/alternatives")
    for name in os.listdir("/.base/alternatives"):
        copy(f"/.base/alternatives/{name}", f"/etc/alternatives/{name}")
    for path, text in node["files"].items():
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write(path, text)


REBOOTED = "/run/rebooted"
"""Where a machine says that it has started anew, and waits to be wired."""


def make_volatile() -> None:
    """What is empty after each start."""
    tmpfs("/run")
    tmpfs("/tmp", mode="1777")
    tmpfs("/dev/shm", mode="1777")
    for path in ("/run/lock", "/run/netns", "/run/frr"):
        os.makedirs(path)


def set_sysctls(values: dict[str, str]) -> None:
    for key, value in values.items():
        path = "/proc/sys/" + key.lstrip("?")
        if key.startswith("?") and not os.path.exists(path):
            continue  # only there with a kernel module that not every machine has
        try:
            write(path, value)
        except OSError as error:
            raise OSError(error.errno, f"sysctl {key}={value}: {error.strerror}") from error


SIOCETHTOOL = 0x8946
#: set/get commands of the old ethtool interface, which every kernel still has
OFFLOADS = {"tx": (0x17, 0x16), "tso": (0x1F, 0x1E), "gso": (0x24, 0x23), "gro": (0x2C, 0x2B)}


def set_offloads(iface: str, on: bool) -> dict[str, bool]:
    """Switch offloads of an interface, and return what they are afterwards."""
    state = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for name, (setter, getter) in OFFLOADS.items():
            value = ctypes.create_string_buffer(struct.pack("II", setter, int(on)))
            request = struct.pack("16sP", iface.encode(), ctypes.addressof(value))
            fcntl.ioctl(sock, SIOCETHTOOL, request)
            value = ctypes.create_string_buffer(struct.pack("II", getter, 0))
            fcntl.ioctl(sock, SIOCETHTOOL, struct.pack("16sP", iface.encode(), ctypes.addressof(value)))
            state[name] = bool(struct.unpack("II", value.raw[:8])[1])
    return state


def tool(argv: list[str], text: str = "") -> str:
    done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(0, f"{' '.join(argv)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def node_facts(node: dict[str, Any]) -> dict[str, Any]:
    """Wire this node from inside, then read everything back."""
    addresses = tool(["ip", "-j", "-d", "-batch", "-"], node["batch"] + "addr show\n")
    offloads = {iface: set_offloads(iface, on) for iface, on in node["offloads"].items()}
    if node["faults"]:
        tool(["tc", "-batch", "-"], node["faults"])
    return {"addresses": json.loads(addresses), "offloads": offloads}


def start_daemons(node: dict[str, Any], folder: str) -> None:
    """Start this node's routing daemons, each as soon as the one before answers."""
    for daemon in node["daemons"]:
        name = daemon["name"]
        with open(f"/var/log/{name}.log", "ab") as log:
            argv = [f"{folder}/{name}", "-f", "/etc/frr/frr.conf", "--log", "stdout"]
            try:
                process = subprocess.Popen(
                    argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            except OSError as error:
                log.write(f"{argv[0]}: {error.strerror}\n".encode())
                continue
        write(f"/run/{name}.pid", str(process.pid))
        deadline = time.monotonic() + 10
        while not os.path.exists(daemon["ready"]) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)


class Reboot(Exception):
    """Somebody wants this machine to start anew."""


def wanted_reboot(*_: object) -> None:
    raise Reboot


def reap_for_ever() -> None:
    """The first process of a PID namespace inherits every orphan of it."""
    signal.signal(signal.SIGCHLD, lambda *_: None)  # wakes pause()
    signal.signal(signal.SIGUSR1, wanted_reboot)
    while True:
        try:
            try:
                os.wait()
            except ChildProcessError:
                signal.pause()
        except Reboot:
            reboot()


def reboot() -> None:
    """Lose what a machine loses that starts anew: its processes, its network, and what it kept in memory."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)  # never this one
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, 0)[0]:
            pass
    unshare(NEWNET)
    for path in ("/run", "/tmp", "/dev/shm"):  # with the networks of pods, which are mounted there
        detach(path)
    make_volatile()
    mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC)  # this network's
    write(REBOOTED, "")


def run_node(node: dict[str, Any], folder: str, start: int, answer: int) -> None:
    """Be the first process of a node: set up, wait for the links, wire, report, reap."""
    try:
        make_node_root(node)
        socket.sethostname(node["name"])
        set_sysctls(node["sysctls"])
        os.write(answer, b"\n")
        if os.read(start, 1) != b"w":
            os._exit(0)
        send(answer, node_facts(node))
    except BaseException as error:  # reported to the holder, which passes it on
        with contextlib.suppress(OSError):
            send(answer, {"error": describe(error)})
        os._exit(1)
    close_all_but_standard()
    start_daemons(node, folder)
    reap_for_ever()


def close_all_but_standard() -> None:
    os.closerange(3, 4096)
    quiet = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(quiet, number)


def describe(error: BaseException) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return "".join(traceback.format_exception_only(type(error), error)).strip()


def send(number: int, answer: dict[str, Any]) -> None:
    data = json.dumps(answer).encode() + b"\n"
    while data:
        data = data[os.write(number, data) :]


def main() -> None:
    """Wire one machine that somebody else made, a container, from inside; its plan is on standard input."""
    try:
        send(1, wire(json.load(sys.stdin)))
    except OSError as error:
        send(1, {"error": describe(error)})


def wire(node: dict[str, Any]) -> dict[str, Any]:
    """Give this machine what its plan says; returns what came out."""
    for path, text in node["files"].items():
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write(path, text)
    set_sysctls(node["sysctls"])
    facts = node_facts(node)
    write("/run/wired", "")  # for a first process that waits for it
    if node["daemons"]:
        start_daemons(node, node["frr_folder"])
    return facts
