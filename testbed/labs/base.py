"""The contract of every lab kind: run a command somewhere, files in and out, up and down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import IO, Protocol

from testbed.model import LabSpec, LinkSpec, NodeSpec

TIMED_OUT = -255
"""`Result.rc` of a command that did not end in time."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a command on a node ended. `rc` is negative for a signal, `TIMED_OUT` for a time-out."""

    where: str
    argv: tuple[str, ...]
    rc: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether the command exited 0."""
        return self.rc == 0


class Process(Protocol):
    """A command that runs on; `subprocess.Popen` is one."""

    stdin: IO[bytes] | None
    stdout: IO[bytes] | None
    stderr: IO[bytes] | None

    @property
    def pid(self) -> int:
        """Its pid outside the lab."""
        ...

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, and return the exit code."""
        ...

    def terminate(self) -> None:
        """Ask it to end."""
        ...

    def kill(self) -> None:
        """End it."""
        ...


class Place(Protocol):
    """Where commands run: a node's namespaces, or a pod's network on that node."""

    @property
    def name(self) -> str:
        """`worker1` for a node, `worker1/client` for a pod."""
        ...

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        timeout: float = 30.0,
        stdin: str | bytes | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Result:
        """Run a command to its end.

        Raises CommandError on a non-zero exit or a time-out, unless `check` is off.
        """
        ...

    def spawn(self, argv: Sequence[str], *, pass_fds: Sequence[int] = (), stdin: bool = False) -> Process:
        """Start a command whose output is piped to the caller; it ends with the lab at the latest."""
        ...


class Node(Place, Protocol):
    """One machine of a lab."""

    @property
    def spec(self) -> NodeSpec:
        """What this machine is."""
        ...

    def start(self, argv: Sequence[str], *, name: str, env: Mapping[str, str] | None = None) -> int:
        """Start a daemon that outlives the caller; returns its pid on the node.

        Its output goes to /var/log/NAME.log, its pid to /run/NAME.pid, both on the node.
        """
        ...

    def read(self, path: str) -> bytes:
        """Return a file of the node. Raises FileNotFoundError."""
        ...

    def write(self, path: str, data: bytes | str, *, mode: int = 0o644) -> None:
        """Write a file on the node, making its folder where it is missing."""
        ...

    def netns(self, path: str, name: str) -> Place:
        """The same node, but inside the network namespace at that path on it (a pod's)."""
        ...

    def in_vrf(self) -> Place:
        """The same machine, but with the sockets of what runs there in its VRF; itself where it has none.

        It is what `ip vrf exec` does on a switch.  Sockets below IP (tcpdump's) are in no VRF.
        """
        ...


class Lab(Protocol):
    """A lab that is up."""

    @property
    def kind(self) -> str:
        """The lab kind: `netns`, …"""
        ...

    @property
    def spec(self) -> LabSpec:
        """What this lab is."""
        ...

    @property
    def nodes(self) -> Mapping[str, Node]:
        """Its machines by name."""
        ...

    def node(self, name: str) -> Node:
        """Return the machine of that name; KeyError where there is none."""
        ...

    def fault(
        self,
        link: str,
        *,
        delay: float = 0.0,
        jitter: float = 0.0,
        loss: float = 0.0,
        reorder: float = 0.0,
        duplicate: float = 0.0,
        corrupt: float = 0.0,
        rate: float = 0.0,
        down: bool = False,
        towards: str = "",
    ) -> AbstractContextManager[LinkSpec]:
        """Give a link (`leaf1-spine1`) a fault for as long as the block lasts, whatever ends it.

        `delay` and `jitter` are milliseconds, one way; `loss`, `reorder`, `duplicate` and `corrupt` per cent of the
        packets; `rate` Mbit/s.  Both directions have them, or with `towards` only what travels to that end of the
        link.  `down` takes the carrier from both ends; at the end of the block it is waited until routing has
        converged again.  Faults add up: with those of the topology and those of blocks around this one, the innermost
        counting where two say the same.

        Raises InputError for a link that is not there and values that make no sense, LabError where the kernel has no
        netem, which all but `down` takes.
        """
        ...

    def restart(self, name: str) -> None:
        """Let a machine start anew, as after a loss of power: it loses its processes, network, /run and /tmp.

        Its links, addresses and routing are made again, nothing else; what ran there is for the caller to start.  Ask
        `node` for the machine afterwards: what was known of it before may not reach it.  Raises InputError where one of
        its links has a fault by `fault`, LabError where the machine does not come back.
        """
        ...

    def down(self) -> None:
        """Remove the lab, and check that nothing of it is left."""
        ...
