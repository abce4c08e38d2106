"""A flanneld that a check has for itself: in a network namespace of its own, with leases of its own in the lab's etcd.

Whatever it does there, the lab does not notice it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import TYPE_CHECKING, Any

from testbed.deadline import Deadline
from testbed.errors import LabError, ProductError
from testbed.labs.base import Node, Place, Result
from testbed.nodes.etcd import Etcd
from testbed.nodes.madeup import etcd_of, key_of
from testbed.nodes.nodefiles import FLANNELD
from testbed.probes.health import http_status

if TYPE_CHECKING:
    from testbed.nodes.deploy import Cluster

NAME = "alone"
PREFIX = f"/{NAME}/network"
SUBNET_FILE = f"/run/{NAME}/subnet.env"
NETWORK = IPv4Network("10.99.0.0/16")
UPLINK = IPv4Network("198.18.0.0/24")
"""Between the namespace's eth0 and its node."""
SECOND = IPv4Address("203.0.113.1")
"""The address of the namespace's eth1, which leads nowhere."""
HEALTH_PORT = 8099
READY_SECONDS = 15.0
END_SECONDS = 10.0


@dataclass(frozen=True)
class Alone:
    """What a check does with its own flanneld. `place` is the namespace, with eth0 (the default route's) and eth1."""

    node: Node
    place: Place
    etcd: Etcd

    @property
    def address(self) -> IPv4Address:
        """The namespace's own address, of eth0."""
        return UPLINK[2]

    def configure(self, backend: Mapping[str, Any], **keys: Any) -> None:
        """Write net-conf.json to etcd: a Network of its own and this Backend."""
        self.etcd.put(f"{PREFIX}/config", json.dumps({"Network": str(NETWORK), **keys, "Backend": dict(backend)}))

    def lease(self, subnet: IPv4Network, value: Mapping[str, Any]) -> None:
        """Put a peer's lease into its network."""
        self.etcd.put(key_of(PREFIX, subnet), json.dumps(value))

    def leases(self) -> dict[str, dict[str, Any]]:
        """The leases of its network by key."""
        return {key: json.loads(text) for key, text in self.etcd.under(f"{PREFIX}/subnets/").items()}

    def _argv(self, args: tuple[str, ...]) -> list[str]:
        store = [f"--etcd-endpoints={self.etcd.endpoint}", f"--etcd-prefix={PREFIX}"]
        more = [f"--subnet-file={SUBNET_FILE}", "--healthz-ip=127.0.0.1", f"--healthz-port={HEALTH_PORT}"]
        return ["nsenter", f"--net=/run/netns/{NAME}", "--", FLANNELD, *store, *more, *args]

    def start(self, *args: str) -> None:
        """Start flanneld there with these arguments."""
        self.node.start(self._argv(args), name=NAME)

    def run_to_end(self, *args: str, seconds: float = END_SECONDS) -> Result:
        """Run flanneld until it ends by itself; the code is 124 where it did not within `seconds`."""
        argv = ["timeout", f"{seconds:g}", *self._argv(args)]
        return self.node.run(argv, check=False, timeout=seconds + 10)

    def wait_ready(self) -> None:
        """Wait until it says that it is ready. Raises ProductError with its log."""
        deadline = Deadline(READY_SECONDS)
        written = deadline.poll(self.subnet_env)  # which costs less to look for
        if not written or deadline.poll(lambda: self.status("/readyz") == 200 or None) is None:
            raise ProductError(
                f"flanneld is not ready within {READY_SECONDS:.0f} s\n{self.log()}", where=self.node.name
            )

    @property
    def running(self) -> bool:
        """Whether the one that was started has not ended yet."""
        return self.node.run(["sh", "-c", 'kill -0 "$(cat "$1")"', "running", f"/run/{NAME}.pid"], check=False).ok

    def status(self, path: str) -> int:
        """What its health server answers, as HTTP's status; 0 for no answer."""
        return http_status(self.place, HEALTH_PORT, path)

    def subnet_env(self) -> str | None:
        """Its subnet.env; None where there is none."""
        with suppress(FileNotFoundError):
            return self.node.read(SUBNET_FILE).decode()
        return None

    @contextmanager
    def changes(self) -> Iterator[Callable[[], list[str]]]:
        """What returns the changes in the kernel since the block began, as `ip -o monitor all` tells them."""
        name = f"{NAME}-monitor"
        argv = ["nsenter", f"--net=/run/netns/{NAME}", "--", "ip", "-o", "monitor", "all"]
        pid = self.node.start(argv, name=name)

        def listens() -> bool:
            return any(line.split()[2] == str(pid) for line in self._sockets())

        def lines() -> list[str]:
            return self.node.read(f"/var/log/{name}.log").decode(errors="replace").splitlines()

        try:
            if not Deadline(READY_SECONDS).poll(listens, every=0.02):
                raise LabError("`ip monitor` does not listen", where=self.place.name)
            yield lines
        finally:
            self.node.run(["kill", str(pid)], check=False)
            self.node.run(["rm", "-f", f"/var/log/{name}.log", f"/run/{name}.pid"])

    def _sockets(self) -> list[str]:
        """The netlink sockets of the namespace that are told of changes."""
        lines = self.place.run(["cat", "/proc/net/netlink"]).stdout.splitlines()[1:]
        return [line for line in lines if line.split()[1] == "0" and int(line.split()[3], 16)]

    def log(self) -> str:
        """What it has logged."""
        with suppress(FileNotFoundError):
            return self.node.read(f"/var/log/{NAME}.log").decode(errors="replace")
        return ""

    def stop(self) -> None:
        """End it, if it runs; what it made in the kernel stays."""
        script = 'pid=$(cat "$1") && kill "$pid" && while kill -0 "$pid"; do sleep 0.02; done'
        self.node.run(["sh", "-c", script, "stop", f"/run/{NAME}.pid"], check=False)
        self.node.run(["rm", "-rf", f"/run/{NAME}.pid", f"/run/{NAME}"])

    def signal(self, name: str) -> None:
        """Send it a signal (`STOP`, `CONT`, …)."""
        self.node.run(["sh", "-c", 'kill -s "$1" "$(cat "$2")"', "signal", name, f"/run/{NAME}.pid"])

    def clear_leases(self) -> None:
        """Forget its leases; the configuration stays."""
        self.etcd.delete_all(self.etcd.under(f"{PREFIX}/subnets/"))

    def clear(self) -> None:
        """Forget what its network has in etcd."""
        self.etcd.delete_all(self.etcd.under(f"{PREFIX}/"))


@contextmanager
def flanneld_alone(cluster: Cluster) -> Iterator[Alone | None]:
    """A namespace for a flanneld, on the control plane, for as long as the block lasts; None where there is no etcd."""
    etcd = etcd_of(cluster)
    if etcd is None:
        yield None
        return
    node = etcd.node
    alone = Alone(node, node.netns(f"/run/netns/{NAME}", f"{node.name}/{NAME}"), etcd)
    node.run(["ip", "netns", "add", NAME])
    try:
        node.run(["ip", "-batch", "-"], stdin=_OUTSIDE)
        alone.place.run(["ip", "-batch", "-"], stdin=_INSIDE)
        alone.clear()
        yield alone
    finally:
        alone.stop()
        node.run(["ip", "netns", "delete", NAME])
        node.run(["ip", "link", "delete", f"{NAME}0"], check=False)
        node.run(["rm", "-f", f"/var/log/{NAME}.log"])
        alone.clear()


_OUTSIDE = f"""link add {NAME}0 type veth peer name eth0 netns {NAME}
address add {UPLINK[1]}/{UPLINK.prefixlen} dev {NAME}0
link set dev {NAME}0 up
"""
_INSIDE = f"""link set dev lo up
address add {UPLINK[2]}/{UPLINK.prefixlen} dev eth0
link set dev eth0 up
route add default via {UPLINK[1]}
link add eth1 type veth peer name far1
address add {SECOND}/24 dev eth1
link set dev eth1 up
link set dev far1 up
"""
