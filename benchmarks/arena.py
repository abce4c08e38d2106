"""Where flannelds are measured: nodes on one bridge, and an etcd, in namespaces that end with the program.

Unlike a lab there is no fabric, and offloads are as the kernel has them: this is for speed, not for what is right.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

from flannel.launcher import launchers

NETWORK = IPv4Network("10.64.0.0/10")
PREFIX = "/coreos.com/network"
UNDERLAY = IPv4Network("192.168.48.0/20")
_PATIENCE = 120.0
_BATCH = 100
_LEGACY = ("iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore")


def enter(module: str, more: Mapping[str, str]) -> None:
    """Run this program, `module`, again in a box of namespaces, with `more` in its environment."""
    user = [] if os.geteuid() == 0 else ["-Ur"]
    argv = ["unshare", *user, "-nmpf", "--kill-child", "--mount-proc", sys.executable, "-m", module, *sys.argv[1:]]
    ended = subprocess.run(argv, env={**os.environ, **more}, check=False)
    if ended.returncode:
        sys.exit(ended.returncode)


def settle() -> None:
    """Make the box that `enter` gave usable."""
    for command in ("mount -t tmpfs tmpfs /run", "ip link set lo up"):
        subprocess.run(command.split(), check=True)


def until(holds: Callable[[], Any], what: str, seconds: float = _PATIENCE, pause: float = 0.005) -> Any:
    """The first true value of `holds`. Raises TimeoutError, which says `what` did not come."""
    deadline = time.monotonic() + seconds
    while True:
        asked = time.monotonic()
        if value := holds():
            return value
        now = time.monotonic()
        if now > deadline:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(max(pause, 4 * (now - asked)))  # so that asking takes a fifth of one processor at most


class Program:
    """A flanneld to be measured: `argv` before its flags."""

    def __init__(self, name: str, argv: Sequence[str]) -> None:
        self.name = name
        self.argv = list(argv)


def bundled(folder: Path, python: str) -> tuple[Program, Path, Path]:
    """This project's flanneld and CNI plugin, compiled, as an installation has them; the plugin, and their library."""
    lib = folder / "lib"
    shutil.copytree(Path(__file__).parent.parent / "flannel", lib / "flannel", ignore=lambda *_: ["__pycache__"])
    # The interpreter that runs them compiles: another one would not read the result.
    subprocess.run([python, "-IS", "-m", "compileall", "-q", str(lib)], check=True)
    for name, text in launchers(python, str(lib)).items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return Program("ours", [str(folder / "flanneld")]), folder / "flannel", lib


class Node:
    """A machine of the arena: eth0 on the bridge, /run and /var/lib/cni of its own."""

    def __init__(self, arena: Arena, number: int) -> None:
        self.arena = arena
        self.ip = UNDERLAY[10 + number]
        script = "for one in /run/flannel /run/netns /var/lib; do mkdir -p $one && mount -t tmpfs tmpfs $one; done"
        self._holder = subprocess.Popen(
            ["unshare", "-nm", "sh", "-c", f"{script}; mkdir /var/lib/cni && echo up && exec sleep 1000000"],
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        if not self._holder.stdout.readline():
            raise RuntimeError("cannot make the namespaces of a node")
        self.pid = self._holder.pid
        self.enter = ["nsenter", "-t", str(self.pid), "-n", "-m"]
        arena.ip(f"link add n{number} type veth peer name eth0 netns {self.pid}")
        arena.ip(f"link set n{number} master underlay up")
        for command in (
            "link set lo up", "link set eth0 up", f"addr add {self.ip}/{UNDERLAY.prefixlen} dev eth0",
            f"route add default via {UNDERLAY[1]}",
        ):  # fmt: skip
            self.run("ip", *command.split())
        self.run("sysctl", "-qw", "net.ipv4.ip_forward=1")

    def run(self, *argv: str, check: bool = True, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run a command in the node."""
        ended = subprocess.run([*self.enter, *argv], capture_output=True, text=True, check=False, **more)
        if check and ended.returncode:
            raise RuntimeError(f"{' '.join(argv)}: {ended.stderr.strip()}")
        return ended

    def routes(self, device: str = "") -> int:
        """How many routes lead into the Network (by a device)."""
        shown = self.run("ip", "-4", "route", "show", *(["dev", device] if device else [])).stdout
        return sum(line.startswith("10.") for line in shown.splitlines())

    def clean(self, legacy: bool = False) -> None:
        """Take away what a flanneld left; to look for legacy rules would make the tables for them."""
        self.run(
            "sh", "-c", "ip link delete flannel.1; ip route flush root 10.64.0.0/10; rm -f /run/flannel/*", check=False
        )
        for table in ("nat", "filter"):
            for program in ("iptables-nft", *(["iptables-legacy"] if legacy else [])):
                self.run("sh", "-c", f"{program} -w -t {table} -F; {program} -w -t {table} -X", check=False)

    @contextlib.contextmanager
    def flanneld(
        self, program: Program, *flags: str, path: str = "", masquerade: bool = True
    ) -> Iterator[Running]:  # fmt: skip
        """A running flanneld; killed at the end, and what it left taken away. `path`: folder that comes before PATH."""
        log = self.arena.folder / f"{program.name}-{self.ip}.log"
        argv = [
            *self.enter, *program.argv, f"--etcd-endpoints=http://{UNDERLAY[1]}:2379", f"--etcd-prefix={PREFIX}",
            "--iface=eth0", *(["--ip-masq"] if masquerade else []), *flags,
        ]  # fmt: skip
        environment = {"PATH": (f"{path}:" if path else "") + "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        with log.open("wb") as output:
            began = time.monotonic()
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
        running = Running(self, process, began, log)
        try:
            yield running
        finally:
            running.kill()
            self.clean(legacy=bool(path))


class Running:
    """A flanneld on a node."""

    def __init__(self, node: Node, process: subprocess.Popen[bytes], began: float, log: Path) -> None:
        self.node = node
        self.pid = process.pid
        self._process = process
        self.began = began
        self._log = log
        self._ended = False

    def wait(self, holds: Callable[[], Any], what: str, seconds: float = _PATIENCE) -> float:
        """Wait until something holds; seconds since its start."""
        try:
            until(lambda: self._process.poll() is not None or holds(), what, seconds)
        except TimeoutError as error:
            raise RuntimeError(f"{error}\n{self._tail()}") from None
        if self._process.poll() is not None:
            raise RuntimeError(f"flanneld ended with {self._process.returncode}\n{self._tail()}")
        return time.monotonic() - self.began

    def _tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])

    def ready(self) -> float:
        """Wait for subnet.env; seconds since its start."""
        path = Path(f"/proc/{self.node.pid}/root/run/flannel/subnet.env")
        return self.wait(path.exists, "subnet.env")

    def resident(self) -> float:
        """MB of memory of all its processes, once that stays the same."""

        def now() -> int:
            return sum(_resident(pid) for pid in [self.pid, *_descendants(self.pid)])

        seen = [now()]
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline and (len(seen) < 8 or max(seen[-8:]) - min(seen[-8:]) > 100):
            time.sleep(0.25)
            seen.append(now())
        return seen[-1] / 1024

    def cpu(self) -> float:
        """Seconds of processor so far: its own exactly, those of children that ended to 10 ms."""
        own = sum(
            int(path.read_text().split()[0]) / 1e9
            for pid in [self.pid, *_descendants(self.pid)]
            for path in Path(f"/proc/{pid}/task").glob("*/schedstat")
        )
        ticks = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[13:15]
        return own + sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> float:
        """Kill it; the processor's seconds that it and its ended children took, exactly."""
        if self._ended:
            return 0.0
        self._ended = True
        children = _descendants(self.pid)
        if self._process.returncode is not None:
            return 0.0
        self._process.send_signal(signal.SIGKILL)
        _, status, usage = os.wait4(self.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        return usage.ru_utime + usage.ru_stime


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
    return 0


def _descendants(pid: int) -> list[int]:
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found, new = [], [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found


class Arena:
    """The bridge with the etcd, and its nodes."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="flannel-bench-", dir="/run"))
        self.ip("link add underlay type bridge")
        self.ip("link set underlay up")
        self.ip(f"addr add {UNDERLAY[1]}/{UNDERLAY.prefixlen} dev underlay")
        url = f"http://{UNDERLAY[1]}:2379"
        self._etcd = subprocess.Popen(
            ["etcd", f"--data-dir={self.folder}/etcd", f"--listen-client-urls={url}", f"--advertise-client-urls={url}",
             "--unsafe-no-fsync", f"--listen-peer-urls=http://{UNDERLAY[1]}:2380",
             f"--initial-advertise-peer-urls=http://{UNDERLAY[1]}:2380",
             f"--initial-cluster=default=http://{UNDERLAY[1]}:2380", "--logger=zap", "--log-level=error"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._client = http.client.HTTPConnection(str(UNDERLAY[1]), 2379, timeout=30)
        until(self._answers, "an answer of etcd", 30)
        self.nodes: list[Node] = []

    def ip(self, words: str) -> None:
        """Run `ip` beside the nodes."""
        subprocess.run(["ip", *words.split()], check=True)

    def node(self, number: int) -> Node:
        """A node; made when first asked for."""
        while len(self.nodes) <= number:
            self.nodes.append(Node(self, len(self.nodes)))
        return self.nodes[number]

    def _answers(self) -> bool:
        try:
            self._ask("kv/range", {"key": _b64("x")})
        except (OSError, http.client.HTTPException):
            self._client.close()
            return False
        return True

    def _ask(self, path: str, body: Mapping[str, Any]) -> Any:
        self._client.request("POST", f"/v3/{path}", json.dumps(body))
        answer = self._client.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"etcd answered {answer.status}: {text[:200]!r}")
        return json.loads(text)

    def put(self, pairs: Mapping[str, str]) -> None:
        """Write keys, many to a transaction."""
        rows = [{"requestPut": {"key": _b64(key), "value": _b64(value)}} for key, value in pairs.items()]
        for start in range(0, len(rows), _BATCH):
            self._ask("kv/txn", {"success": rows[start : start + _BATCH]})

    def configure(self, **backend: Any) -> None:
        """Empty the store and write a network configuration."""
        self._ask("kv/deleterange", {"key": _b64("/"), "range_end": _b64("0")})
        conf = {"Network": str(NETWORK), "SubnetLen": 24, "Backend": backend}
        self.put({f"{PREFIX}/config": json.dumps(conf)})

    def lease(self, number: int, kind: str) -> dict[str, str]:
        """The key and value of a remote node's lease."""
        subnet = int(NETWORK.network_address) + ((number + 1024) << 8)
        mac = f"0a:00:00:{number >> 16:02x}:{number >> 8 & 255:02x}:{number & 255:02x}"
        # Behind a gateway that is there, so that host-gw can be programmed.
        value: dict[str, Any] = {"PublicIP": str(UNDERLAY[100 + number % 3900]), "BackendType": kind}
        value["BackendData"] = {"VNI": 1, "VtepMAC": mac} if kind == "vxlan" else None
        return {f"{PREFIX}/subnets/{IPv4Address(subnet)}-24": json.dumps(value)}

    def leases(self, count: int, kind: str, first: int = 0) -> None:
        """Write remote nodes' leases."""
        self.put({key: value for one in range(first, first + count) for key, value in self.lease(one, kind).items()})

    def legacy(self) -> str:
        """A folder in which iptables is the legacy one."""
        folder = self.folder / "legacy"
        if not folder.exists():
            folder.mkdir()
            for name in _LEGACY:
                (folder / name).symlink_to("/usr/sbin/xtables-legacy-multi")
        return str(folder)


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
