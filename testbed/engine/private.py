"""A private Docker engine, for machines where none runs: own namespaces, socket and images; removed without a trace.

It has no uplink, so it never pulls: its images are built here or imported.  Its socket is 0600 in a folder that only
root may enter, and there is no other way to it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from testbed.deadline import Deadline
from testbed.errors import LabBusyError, LabError
from testbed.labs import interpreter, state

READY_SECONDS = 30.0
ROOM = 64 << 20
"""Bytes of disk without which an engine is not even started: its own files, and the smallest image."""

DOWN_SECONDS = 20.0
NAME = "engine"
CGROUPS = Path("/sys/fs/cgroup")
MAX_SOCKET_PATH = 107
CAP_LAST = 40  # the highest capability that engines of today name


@dataclass(frozen=True, slots=True)
class PrivateEngine:
    """An engine that was started here."""

    holder: state.Holder
    data: Path  # where its images and containers are
    cgroup: str

    @property
    def socket(self) -> Path:
        """Its only door."""
        return state.state_folder() / NAME / "docker.sock"

    @property
    def address(self) -> str:
        """The same, as DOCKER_HOST has it."""
        return address()

    @property
    def alive(self) -> bool:
        """Whether its first process still runs."""
        return self.holder.alive

    def entering(self) -> tuple[str, ...]:
        """The words that put a command into the engine's namespaces, where it knows its containers' pids."""
        return ("nsenter", "-t", str(self.holder.pid), "-m", "-n", "-u", "-i", "-p", "--")

    def save(self) -> None:
        """Keep track of it."""
        record = {
            "holder": [self.holder.pid, self.holder.start_time, self.holder.pid_namespace],
            "data": str(self.data),
            "cgroup": self.cgroup,
        }
        path = _record()
        aside = path.with_suffix(".new")
        aside.write_text(json.dumps(record))
        aside.replace(path)


def folder() -> Path:
    """The engine's folder among the user's state. Raises LabError where there can be none."""
    path = state.state_folder() / NAME
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def address() -> str:
    """The private engine's only door as DOCKER_HOST has it, whether or not the engine runs."""
    return f"unix://{state.state_folder() / NAME / 'docker.sock'}"


def _record() -> Path:
    return folder() / "record"


def running() -> PrivateEngine | None:
    """The private engine that was started and still runs; None where there is none."""
    found = _read()
    return found if found and found.alive else None


def _read() -> PrivateEngine | None:
    if not (state.state_folder() / NAME / "record").exists():
        return None
    try:
        record = json.loads(_record().read_text())
        return PrivateEngine(state.Holder(*record["holder"]), Path(record["data"]), record["cgroup"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        hint = "testbed engine down"
        raise LabError("the record of the private engine cannot be read", where=str(_record()), hint=hint) from error


def start() -> PrivateEngine:
    """Start the private engine, and return it once it answers.

    Raises LabBusyError where it runs already, LabError where it cannot be started; nothing is left behind then.
    """
    if os.getuid() != 0:
        raise LabError(
            "a Docker engine is started by root only",
            hint="sudo ./run …; the embedded lab (`--lab netns`) needs neither",
        )
    dockerd = _dockerd()
    _check_path(state.state_folder() / NAME)
    with state.locked(NAME):
        earlier = _read()
        if earlier and earlier.alive:
            raise LabBusyError("the private engine is up already", hint="`testbed engine down` removes it")
        if earlier:
            _remove(earlier)
        return _start(dockerd)


def _check_path(place: Path) -> None:
    """Containerd waits for ever for a socket whose path is longer than the kernel takes."""
    if len(os.fsencode(place / "exec/containerd/containerd.sock.ttrpc")) > MAX_SOCKET_PATH:
        raise LabError(
            "the path of the engine's folder is too long for its sockets",
            where=str(place),
            hint="name a shorter folder by TESTBED_STATE",
        )


def _dockerd() -> str:
    found = shutil.which("dockerd")
    if found is None:
        raise LabError("there is no dockerd on this machine", hint="apt-get install docker.io")
    return found


def lacks_capabilities() -> bool:
    """Whether root of this machine was not given every capability that a privileged container asks for."""
    text = Path("/proc/self/status").read_text()
    held = next(int(line.split()[1], 16) for line in text.splitlines() if line.startswith("CapBnd:"))
    known = min(int(Path("/proc/sys/kernel/cap_last_cap").read_text()), CAP_LAST)
    return any(not held >> number & 1 for number in range(known + 1))


def _data_folder() -> Path:
    """On a disk: overlays of what is in memory would count against it."""
    key = hashlib.sha256(str(state.state_folder()).encode()).hexdigest()[:8]
    base = os.environ.get("TESTBED_ENGINE_DATA", "/var/lib")
    return Path(base) / f"testbed-engine-{key}"


def _arguments(dockerd: str, data: Path, cgroup: str) -> list[str]:
    place = folder()
    argv = [
        dockerd,
        f"--host=unix://{place}/docker.sock",
        f"--config-file={place}/daemon.json",
        f"--data-root={data}",
        f"--exec-root={place}/exec",
        f"--pidfile={place}/dockerd.pid",
        f"--cgroup-parent={cgroup}",
        *("--bridge=none", "--iptables=false", "--ip-forward=false", "--ip-masq=false", "--userland-proxy=false"),
        *("--group=root", "--exec-opt=native.cgroupdriver=cgroupfs", "--log-level=warn"),
    ]
    if lacks_capabilities():
        argv += [f"--add-runtime=testbed={_runtime()}", "--default-runtime=testbed"]
    return argv


def _runtime() -> Path:
    """The runtime that asks for what there is."""
    path = folder() / "runtime"
    program = resources.files("testbed.engine").joinpath("runtime.py").read_bytes()
    path.write_bytes(f"#!{interpreter()} -IS\n".encode() + program)
    path.chmod(0o700)
    return path


def _start(dockerd: str) -> PrivateEngine:
    place, data = folder(), _data_folder()
    key = data.name.rpartition("-")[2]
    cgroup = f"/testbed-engine-{key}"
    try:
        data.mkdir(mode=0o711, parents=True, exist_ok=True)
        seen = os.statvfs(data)
        if seen.f_bavail * seen.f_frsize < ROOM:
            data.rmdir()
            raise OSError(errno.ENOSPC, f"{seen.f_bavail * seen.f_frsize >> 20} MB are left of the disk")
        (place / "daemon.json").write_text("{}\n")
    except OSError as error:
        hint = "TESTBED_ENGINE_DATA names a folder with room for images"
        raise LabError(f"no room for an engine: {error.strerror}", where=str(data), hint=hint) from error
    log = place / "dockerd.log"
    log.unlink(missing_ok=True)
    plan = {
        "state": str(state.state_folder()),
        "log": str(log),
        "argv": _arguments(dockerd, data, cgroup),
        "env": {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"},
    }
    pid, lifeline = _make_box(plan)
    engine = PrivateEngine(state.Holder.of(pid), data, cgroup)
    try:
        engine.save()
        if Deadline(READY_SECONDS).poll(lambda: _look(engine)) is not True:
            said = log.read_text(errors="replace")[-2000:].strip() if log.exists() else ""
            raise LabError(f"the Docker engine did not get ready\n{said}".rstrip(), hint="`dockerd --version`?")
        engine.socket.chmod(0o600)
        os.write(lifeline, b"s")
    except BaseException:
        _remove(engine)
        raise
    finally:
        os.close(lifeline)
    return engine


def _look(engine: PrivateEngine) -> bool | None:
    """True once it answers, False once it is gone, None before."""
    if not engine.alive:
        return False
    return answers(engine.socket) or None


def answers(path: Path) -> bool:
    """Whether an engine answers on that socket."""
    connection = http.client.HTTPConnection("localhost", timeout=5)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.settimeout(5)
    try:
        connection.sock.connect(str(path))
        connection.request("GET", "/_ping")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _make_box(plan: Mapping[str, object]) -> tuple[int, int]:
    """Start the engine's namespaces; returns their first process and the lifeline that it hangs on."""
    inside, lifeline = os.pipe()
    program = resources.files("testbed.engine").joinpath("box.py").read_bytes()
    memory = os.memfd_create("engine")
    os.write(memory, program)
    try:
        done = subprocess.run(
            [interpreter(), "-I", "-S", f"/proc/self/fd/{memory}", str(inside), "testbed-engine"],
            pass_fds=[inside, memory],
            input=json.dumps(plan).encode(),
            stdout=subprocess.PIPE,
            check=False,
            cwd="/",
        )
        answer = json.loads(done.stdout.splitlines()[0]) if done.stdout.strip() else {"error": "no answer"}
    except OSError as error:
        answer = {"error": error.strerror or str(error)}
    finally:
        os.close(inside)
        os.close(memory)
    if "error" in answer:
        os.close(lifeline)
        raise LabError(f"the Docker engine cannot be started: {answer['error']}", hint="`testbed doctor`")
    return int(answer["pid"]), lifeline


def labs() -> list[state.LabRecord]:
    """The labs that run on the private engine."""
    found = running()
    records = [state.read_record(lab_id) for lab_id in state.known_ids()] if found else []
    return [record for record in records if record and found and record.facts.get("engine") == found.address]


def stop() -> bool:
    """Remove the private engine with all of its containers and images; returns whether there was one.

    Raises LabError where it does not go.
    """
    if not (state.state_folder() / NAME).exists():
        return False
    with state.locked(NAME):
        try:
            found = _read()
        except LabError:
            found = None
            shutil.rmtree(folder(), ignore_errors=True)
        if found:
            _remove(found)
        with contextlib.suppress(OSError):
            folder().rmdir()
        return found is not None


def _remove(engine: PrivateEngine) -> None:
    if not engine.holder.kill(DOWN_SECONDS):
        raise LabError(f"the Docker engine did not end within {DOWN_SECONDS:.0f} s", hint=f"pid {engine.holder.pid}")
    _remove_tree(engine.data)
    _remove_cgroups(engine.cgroup)
    _remove_tree(folder())


def _remove_tree(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise LabError(
            f"what the engine left cannot be removed: {error.strerror}", where=str(error.filename)
        ) from error


def _remove_cgroups(parent: str) -> None:
    """Remove the groups of containers: under each controller where there are several trees."""
    for root in (CGROUPS, *(path for path in CGROUPS.iterdir() if path.is_dir())):
        top = root / parent.lstrip("/")
        if top.is_dir():
            for path in (*sorted((p for p in top.rglob("*") if p.is_dir()), reverse=True), top):
                with contextlib.suppress(OSError):  # somebody's processes: not ours to end
                    path.rmdir()
