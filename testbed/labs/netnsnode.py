"""A machine of an embedded lab, and a pod's network on it: how a command gets into it, and files do."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Self

from testbed import journal
from testbed.errors import CommandError
from testbed.labs import interpreter, residents
from testbed.labs.base import TIMED_OUT, Result
from testbed.labs.plan import ROOT_BECOMES, VRF_EXEC
from testbed.model import NodeSpec

#: Nothing of the caller's environment gets into a lab.
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}

#: Puts standard input into a file, whole or not at all.
_WRITE = 'mkdir -p "$(dirname "$1")" && cat >"$1.new" && chmod "$2" "$1.new" && mv "$1.new" "$1"'

#: Leaves a daemon behind: its output in a log, its pid in a file and on standard output.
_START = 'log=$1 pid=$2; shift 2; setsid "$@" </dev/null >>"$log" 2>&1 & echo $! >"$pid"; echo $!'


@cache
def root_becomes() -> int | None:
    """The id that root's labs belong to; None for an ordinary user.

    Root of a user namespace that does not have that id is an ordinary user to the machine, and stays what it is.
    """
    if os.getuid() != 0:
        return None
    ranges = (line.split() for line in Path("/proc/self/uid_map").read_text().splitlines())
    mapped = any(int(first) <= ROOT_BECOMES < int(first) + int(count) for first, _, count in ranges)
    return ROOT_BECOMES if mapped else None


@cache
def as_lab_user() -> tuple[str, ...]:
    """Labs of root belong to an id that owns nothing; every command enters them as that id.

    By a program, since Python starts processes much faster where it has no ids to change.
    """
    uid = root_becomes()
    return ("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--inh-caps=-all", "--") if uid else ()


@dataclass(frozen=True)
class NetnsNode:
    """A machine of an embedded lab; also a pod's network on it, where `inner` says how to get there."""

    spec: NodeSpec
    holder_pid: int
    pid: int  # inside the box
    inner: tuple[str, ...] = ()
    label: str = ""
    via: tuple[str, ...] = ()  # the program that runs every command here

    @property
    def name(self) -> str:
        """`worker1` for a node, `worker1/client` for a pod."""
        return self.label or self.spec.name

    def entering(self, *, stay: bool = False) -> list[str]:
        """The words that put a command into this node; with `stay` it outlives whoever started it."""
        return [
            *as_lab_user(),
            *("nsenter", "-t", str(self.holder_pid), "-U", "--preserve-credentials", "-m", "-p", "-F", "--"),
            *("nsenter", "-t", str(self.pid), "-n", "-m", "-u", "-i", "-p", "--"),
            *(() if stay else ("setpriv", "--pdeathsig", "KILL", "--")),
            *self.inner,
        ]

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        timeout: float = 30.0,
        stdin: str | bytes | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Result:
        """Run a command to its end; see `Place.run`."""
        return self._run(self.entering, [*self.via, *argv], check=check, timeout=timeout, stdin=stdin, env=env)

    def _ended(
        self,
        entering: Callable[[], Sequence[str]],
        argv: Sequence[str],
        data: bytes | None,
        timeout: float,
        env: Mapping[str, str],
    ) -> residents.Ended:
        """Run a command by the node's resident, or enter the node for it."""
        resident = residents.resident_of(self)
        if resident is not None:
            with contextlib.suppress(residents.Gone):
                return resident.run(argv, netns=self._inner_netns, env=env, stdin=data, timeout=timeout)
        try:
            done = subprocess.run(
                [*entering(), *argv],
                input=data,
                stdin=subprocess.DEVNULL if data is None else None,
                capture_output=True,
                timeout=timeout,
                check=False,
                env=env,
            )
        except subprocess.TimeoutExpired as error:
            return residents.Ended(None, error.stdout or b"", error.stderr or b"")
        return residents.Ended(done.returncode, done.stdout, done.stderr)

    @property
    def _inner_netns(self) -> str:
        """The path of the network namespace on the node that commands are in; empty for the node's own."""
        return self.inner[1].removeprefix("--net=") if self.inner else ""

    def _run(
        self,
        entering: Callable[[], Sequence[str]],
        argv: Sequence[str],
        *,
        check: bool,
        timeout: float,
        stdin: str | bytes | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Result:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        began = time.monotonic()
        done = self._ended(entering, argv, data, timeout, ENVIRONMENT | dict(env or {}))
        rc, seconds = TIMED_OUT if done.code is None else done.code, time.monotonic() - began
        out, err = (text.decode(errors="replace") for text in (done.out, done.err))
        result = Result(self.name, tuple(argv), rc, out, err, seconds)
        if notes := journal.current():
            notes.command(self.name, argv, rc, seconds, out + err, fed=data is not None or bool(env))
        if check and rc:
            raise CommandError(self.name, argv, rc, result.stderr or result.stdout)
        return result

    def spawn(
        self, argv: Sequence[str], *, pass_fds: Sequence[int] = (), stdin: bool = False
    ) -> subprocess.Popen[bytes]:
        """Start a command that runs on, output piped; see `Place.spawn`."""
        return subprocess.Popen(
            [*self.entering(), *self.via, *argv],
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=pass_fds,
            env=ENVIRONMENT,
        )

    def start(self, argv: Sequence[str], *, name: str, env: Mapping[str, str] | None = None) -> int:
        """Start a daemon on this node; see `Node.start`."""
        log, pidfile = f"/var/log/{name}.log", f"/run/{name}.pid"
        resident = residents.resident_of(self)
        if resident is not None:
            with contextlib.suppress(residents.Gone):
                values = ENVIRONMENT | dict(env or {})
                return resident.start([*self.via, *argv], netns=self._inner_netns, env=values, log=log, pidfile=pidfile)
        words = ["sh", "-c", _START, "start", log, pidfile, *self.via, *argv]
        done = self._run(partial(self.entering, stay=True), words, check=True, timeout=30, env=env)
        return int(done.stdout)

    def read(self, path: str) -> bytes:
        """Return a file of this node. Raises FileNotFoundError."""
        resident = residents.resident_of(self)
        if resident is not None:
            try:
                return resident.read(path)
            except residents.Gone:
                pass
            except OSError as error:
                raise FileNotFoundError(f"{self.name}:{path}: {error.strerror}") from error
        done: subprocess.CompletedProcess[bytes] = subprocess.run(
            [*self.entering(), "cat", "--", path], capture_output=True, check=False, env=ENVIRONMENT
        )
        if done.returncode:
            raise FileNotFoundError(f"{self.name}:{path}: {done.stderr.decode(errors='replace').strip()}")
        return done.stdout

    def write(self, path: str, data: bytes | str, *, mode: int = 0o644) -> None:
        """Write a file on this node, making its folder where it is missing."""
        resident = residents.resident_of(self)
        if resident is not None:
            with contextlib.suppress(residents.Gone, OSError):  # the other way says what is wrong
                resident.write(path, data.encode() if isinstance(data, str) else data, mode)
                return
        self.run(["sh", "-c", _WRITE, "write", path, f"{mode:o}"], stdin=data)

    def netns(self, path: str, name: str) -> NetnsNode:
        """This node, but inside the network namespace at that path."""
        return replace(self, inner=("nsenter", f"--net={path}", "--"), label=name)

    def in_vrf(self) -> Self:
        """This machine, but with the sockets of what runs there in its VRF; see `Node.in_vrf`."""
        if not self.spec.vrf:
            return self
        via = (interpreter(), "-I", "-S", VRF_EXEC, self.spec.vrf)
        return replace(self, via=via, label=f"{self.name}/{self.spec.vrf}")

    def interactive(self, argv: Sequence[str]) -> int:
        """Run a command on the caller's own terminal; returns its exit code."""
        words = [*self.entering(stay=True), *self.via, *argv]
        env = ENVIRONMENT | {key: os.environ[key] for key in ("TERM", "COLORTERM") if key in os.environ}
        return subprocess.run(words, check=False, env=env).returncode
