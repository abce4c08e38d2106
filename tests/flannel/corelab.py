"""A throw-away node for tests of the daemon: a box of namespaces, with flanneld in it whose store the test steers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.flannel.waiting import PATIENCE as PATIENCE
from tests.flannel.waiting import until as until

HERE = Path(__file__).parent
PYTHON = "/usr/bin/python3"
#: What the issue allows between a fault and its repair, and the machine's share on top.
HEALS_WITHIN = 2.0 * float(os.environ.get("TIME_SCALE", "1"))
OWN = "10.244.1.0/24"


def peer(number: int, *, mac: str = "", ip: str = "", kind: str = "vxlan") -> dict[str, Any]:
    """The lease of another node: 10.244.N.0/24 at 192.168.50.N."""
    data = {"VNI": 1, "VtepMAC": mac or f"02:aa:bb:cc:dd:{number:02x}"} if kind == "vxlan" else None
    return {"subnet": f"10.244.{number}.0/24", "ip": ip or f"192.168.50.{number}", "type": kind, "data": data}


def children(pid: int) -> list[int]:
    """The processes that a process has started; not every kernel lists them in /proc."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]


class Node:
    """A node: eth0 at 192.168.50.1/24 with a default route by .254, and a /run of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        user = [] if os.geteuid() == 0 else ["-Ur"]
        command = "mount -t tmpfs tmpfs /run && echo made && exec sleep 1000000"
        self._holder = subprocess.Popen(
            ["unshare", *user, "-nmpf", "--kill-child", "--mount-proc", "sh", "-c", command],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._holder.stdout is not None
        if not self._holder.stdout.readline():
            self.close()
            pytest.skip(f"no namespaces here: {self._holder.stderr.read() if self._holder.stderr else ''}")
        flags = ["-U", "--preserve-credentials"] if user else []
        self._enter = ["nsenter", "-t", str(children(self._holder.pid)[0]), *flags, "-n", "-m", "-p"]
        self.daemons: list[Flanneld] = []
        self.ip("link add eth0 type veth peer name far")
        for name in ("lo", "far", "eth0"):
            self.ip(f"link set {name} up")
        self.ip("addr add 192.168.50.1/24 dev eth0")
        self.ip("route add default via 192.168.50.254")

    def close(self) -> None:
        """End everything in the box."""
        self._holder.kill()
        self._holder.wait()
        for stream in (self._holder.stdout, self._holder.stderr):
            if stream is not None:
                stream.close()
        for daemon in self.daemons:
            daemon.forget()

    def run(self, *argv: str, check: bool = True) -> str:
        """Run a command in the node and return its output."""
        ended = subprocess.run([*self._enter, *argv], capture_output=True, text=True, check=False)
        if check and ended.returncode:
            pytest.fail(f"{argv}: {ended.stderr}")
        return ended.stdout

    def spawn(self, *argv: str, output: Path) -> subprocess.Popen[bytes]:
        """Start a command in the node, its output in a file; it ends with the node."""
        with output.open("wb") as file:
            return subprocess.Popen([*self._enter, *argv], stdin=subprocess.DEVNULL, stdout=file, stderr=file)

    def ip(self, words: str, check: bool = True) -> str:
        """Run `ip`."""
        return self.run("ip", *words.split(), check=check)

    def routes(self) -> list[str]:
        """The main table's routes into the Network."""
        return [line.strip() for line in self.ip("route show").splitlines() if " 10.244." in f" {line}"]

    def neighbours(self, device: str = "flannel.1") -> list[str]:
        """Permanent neighbours of a device, as `ADDRESS MAC`."""
        shown = self.ip(f"neigh show dev {device} nud permanent", check=False).splitlines()
        return sorted(re.sub(r" lladdr | PERMANENT", " ", line).strip() for line in shown)

    def fdb(self, device: str = "flannel.1") -> list[str]:
        """FDB entries of a device, as `MAC dst ADDRESS`."""
        shown = self.run("bridge", "fdb", "show", "dev", device, check=False).splitlines()
        return sorted(line.replace(" self permanent", "").strip() for line in shown)

    def link(self, device: str = "flannel.1") -> dict[str, Any]:
        """What `ip -d -j link` says; empty where there is no such device."""
        shown = self.ip(f"-d -j link show {device}", check=False)
        return dict(json.loads(shown)[0]) if shown.strip() else {}

    def programmed(self, *numbers: int) -> bool:
        """Whether exactly these peers have a route, a neighbour and an FDB entry by the tunnel."""
        return (
            self.routes() == [f"10.244.{n}.0/24 via 10.244.{n}.0 dev flannel.1 onlink" for n in numbers]
            and self.neighbours() == [f"10.244.{n}.0 02:aa:bb:cc:dd:{n:02x}" for n in numbers]
            and self.fdb() == [f"02:aa:bb:cc:dd:{n:02x} dst 192.168.50.{n}" for n in numbers]
        )

    def start(
        self, *flags: str, backend: dict[str, Any] | None = None, grace: float = 300.0, ready: bool = True,
        environment: dict[str, str] | None = None, network: str = "10.244.0.0/16", subnet: str = OWN,
        nftables: bool = False, dual: bool = False, alone6: bool = False, broken: Sequence[str] = (),
    ) -> Flanneld:  # fmt: skip
        """Start flanneld; wait until it runs its backend."""
        conf = {"Network": network, "EnableNFTables": nftables, "Backend": backend or {"Type": "vxlan"}}
        if dual:
            conf |= {"EnableIPv6": True, "IPv6Network": "fd00:10:244::/56"}
        if alone6:
            conf |= {"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": "fd00:10:244::/56"}
            del conf["Network"]
            subnet = "fd00:10:244:1::/64"
        own6 = "fd00:10:244:1::/64" if dual else ""
        steered = json.dumps({"conf": conf, "subnet": subnet, "subnet6": own6, "grace": grace, "broken": [*broken]})
        daemon = Flanneld(
            [*self._enter, PYTHON, "-IS", str(HERE / "steered_flanneld.py"), *flags],
            {**os.environ, "STEERED": steered, **(environment or {})}, self.folder / f"flanneld{len(self.daemons)}.log",
        )  # fmt: skip
        self.daemons.append(daemon)
        if ready:
            daemon.said("Running backend.")
        return daemon


class Flanneld:
    """A running flanneld, whose store the test is."""

    def __init__(self, argv: Sequence[str], environment: dict[str, str], log: Path) -> None:
        self._log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True, env=environment
            )

    @property
    def log(self) -> str:
        """What it has logged."""
        return self._log.read_text()

    def said(self, text: str, seconds: float = PATIENCE) -> None:
        """Wait until it has logged something."""
        until(lambda: text in self.log or self.process.poll() is not None, f"{text!r} in\n{self.log}", seconds)
        if text not in self.log:
            pytest.fail(f"flanneld ended with {self.process.poll()}:\n{self.log}")

    def published(self) -> dict[str, Any]:
        """What it publishes next."""
        assert self.process.stdout is not None
        return dict(json.loads(self.process.stdout.readline()))

    def tell(self, **message: Any) -> None:
        """Be the store."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def list(self, *leases: dict[str, Any], own: bool = True, complete: bool = True) -> None:
        """Post a list of leases, the own one among them."""
        mine = {"subnet": OWN, "ip": "192.168.50.1", "type": "vxlan", "data": None}
        self.tell(snapshot=[*([mine] if own else []), *leases], complete=complete)

    def pid(self) -> int:
        """The daemon's own process id, outside of the box."""
        return next(iter(children(self.process.pid)), self.process.pid)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        os.kill(self.pid(), number)
        code = self.process.wait(timeout=PATIENCE)
        self.forget()
        return code

    def forget(self) -> None:
        """Close what the test holds of it."""
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
