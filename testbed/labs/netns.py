"""The embedded lab: network namespaces on one Linux machine, without Docker, cluster, image or root."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from testbed.deadline import Deadline
from testbed.errors import LabBusyError, LabError
from testbed.labs import Progress, Quiet, inside, interpreter, residents, restart, state
from testbed.labs.faults import LinkFaults, fault, require_features
from testbed.labs.inside.node import REBOOTED
from testbed.labs.netnsnode import ENVIRONMENT, NetnsNode, as_lab_user, root_becomes
from testbed.labs.plan import box_plan, node_plan, wiring_faults
from testbed.linkfault import LinkFault
from testbed.model import LabSpec, LinkSpec

FRR_FOLDERS = ("/usr/lib/frr", "/usr/libexec/frr")

UP_SECONDS = 60.0
DOWN_SECONDS = 20.0
LEFT_SECONDS = 5.0
RESTART_SECONDS = 20.0


def frr_folder() -> str:
    """Where FRR's daemons are. Raises LabError where they are not installed."""
    for folder in FRR_FOLDERS:
        if os.access(f"{folder}/zebra", os.X_OK) and os.access(f"{folder}/bgpd", os.X_OK):
            return folder
    raise LabError("FRR's zebra and bgpd are not installed", hint="apt-get install frr, or `./run` as root")


@dataclass
class NetnsLab:
    """An embedded lab that is up."""

    record: state.LabRecord
    lifeline: int | None = None
    kind: str = "netns"
    nodes: Mapping[str, NetnsNode] = field(init=False)
    link_faults: LinkFaults = field(init=False, default_factory=LinkFaults)

    def __post_init__(self) -> None:
        pid = self.record.holder.pid
        nodes = {n.name: NetnsNode(n, pid, self.record.pids[n.name]) for n in self.record.spec.nodes}
        self.nodes = MappingProxyType(nodes)

    @property
    def spec(self) -> LabSpec:
        """What this lab is."""
        return self.record.spec

    def node(self, name: str) -> NetnsNode:
        """Return the machine of that name; KeyError where there is none."""
        return self.nodes[name]

    @property
    def alive(self) -> bool:
        """Whether the lab's holder still runs."""
        return self.record.holder.alive

    def remember(self, **facts: Any) -> None:
        """Keep facts about the lab for later commands."""
        self.record = replace(self.record, facts=self.record.facts | facts)
        self.record.save()

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
    ) -> contextlib.AbstractContextManager[LinkSpec]:
        """Give a link a fault for as long as the block lasts; see `Lab.fault`."""
        return fault(
            self, link, LinkFault(delay, jitter, loss, reorder, duplicate, corrupt, rate, down=down, towards=towards)
        )

    def restart(self, name: str) -> None:
        """Let a machine start anew; see `Lab.restart`."""
        node = self.node(name)
        restart.check_no_faults(self, name)
        residents.leave(node)
        box = [*as_lab_user(), "nsenter", "-t", str(self.record.holder.pid), "-U", "--preserve-credentials"]
        box += ["-n", "-m", "-p", "--"]
        restart.put_aside(box, node.spec, node.pid)
        # Its first process does it by itself, and so keeps what is on its disk.
        subprocess.run([*box, "kill", "-s", "USR1", str(node.pid)], check=True, env=ENVIRONMENT)

        def back() -> bool | None:
            return node.run(["test", "-e", REBOOTED], check=False).ok or None

        if Deadline(RESTART_SECONDS).poll(back) is None:
            raise LabError(f"{name} did not start anew within {RESTART_SECONDS:.0f} s", where=self.spec.id)
        node.run(["rm", REBOOTED])
        restart.put_back(box, node.spec, node.pid, node.pid)
        plan = node_plan(self.spec, node.spec) | {"frr_folder": frr_folder() if node.spec.routes else ""}
        restart.wire_again(self, name, plan)

    def settle(self, names: Iterable[str]) -> None:
        """Make many commands on these machines cheap for as long as this process lives."""
        for name in names:
            residents.settle(self.nodes[name], ENVIRONMENT)

    def detach(self) -> None:
        """Let the lab outlive this process."""
        if self.lifeline is not None:
            os.write(self.lifeline, b"s")
            os.close(self.lifeline)
            self.lifeline = None

    def down(self) -> None:
        """Kill the holder, and with it everything; then check that nothing is left. Raises LabError."""
        lab_id, holder = self.spec.id, self.record.holder
        for node in self.nodes.values():
            residents.leave(node)
        with state.locked(lab_id):
            end_those_who_entered(holder)
            if not holder.kill(DOWN_SECONDS):
                raise LabError(
                    f"lab {lab_id} did not end within {DOWN_SECONDS:.0f} s of being killed",
                    hint=f"its first process is pid {holder.pid}",
                )
            if not Deadline(LEFT_SECONDS).poll(lambda: not processes_in(holder.pid_namespace) or None):
                left = processes_in(holder.pid_namespace)
                raise LabError(f"lab {lab_id} is down, but left processes behind: {' '.join(map(str, left))}")
            if self.lifeline is not None:
                os.close(self.lifeline)
                self.lifeline = None
            self.record.forget()


def end_those_who_entered(holder: state.Holder) -> None:
    """Kill the programs outside of a lab by which somebody is in it.

    One of them stops when what it runs there is stopped, and reaps nothing then: the lab could never end.
    """
    lab = holder.user_namespace
    if lab is None:
        return
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != holder.pid:
            with contextlib.suppress(OSError):
                handle = os.pidfd_open(int(entry.name))
                try:
                    if (entry / "ns/user").stat().st_ino == lab:
                        signal.pidfd_send_signal(handle, signal.SIGKILL)
                finally:
                    os.close(handle)


def processes_in(pid_namespace: int) -> list[int]:
    """The pids of all live processes in a PID namespace, as far as this user may look; a zombie is none."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                dead = (entry / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
                if not dead and (entry / "ns/pid").stat().st_ino == pid_namespace:
                    found.append(int(entry.name))
    return found


def bring_up(spec: LabSpec, *, progress: Progress | None = None) -> NetnsLab:
    """Make a lab from its model and check its wiring; it ends with this process until it is detached.

    Raises LabError where a lab of that id is up already, something is missing on the host or in its kernel, or the
    wiring differs from the model.
    """
    progress = progress or Quiet()
    require_features(spec)
    with state.locked(spec.id):
        earlier = state.read_record(spec.id)
        if earlier and earlier.holder.alive:
            raise LabBusyError(
                f"lab {spec.id} is already up", hint=f"`testbed down --name {spec.id}`, or another --name"
            )
        machines = f"{len(spec.nodes)} machines, {len(spec.links)} links"
        with progress.step(f"Making {spec.topology}: {machines}"):
            lab, facts = _make_box(spec)
        try:
            faults = wiring_faults(spec, facts)
            if faults:
                raise LabError("the lab is not wired as described:\n  " + "\n  ".join(faults), where=spec.id)
            lab.record.save()
        except BaseException:
            lab.record.holder.kill(DOWN_SECONDS)
            raise
    return lab


def _make_box(spec: LabSpec) -> tuple[NetnsLab, dict[str, Any]]:
    """Start the box, hand it the plan, and wait for both of its answers."""
    plan = json.dumps(box_plan(spec, frr_folder=frr_folder(), root_becomes=root_becomes())).encode()
    own, lifeline = os.pipe()
    # In memory: the checkout may lie where the lab's id cannot read it.
    program = os.memfd_create("box")
    os.write(program, inside.program(*inside.BOX).encode())
    try:
        process = subprocess.Popen(
            [interpreter(), "-I", "-S", f"/proc/self/fd/{program}", str(own), f"testbed-lab={spec.id}"],
            pass_fds=[own, program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
            cwd="/",
        )
    except OSError as error:
        os.close(lifeline)
        raise LabError(f"cannot start the lab: {error.strerror}") from error
    finally:
        os.close(own)
        os.close(program)
    try:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(plan)
            process.stdin.close()
        answers = _answers(process.stdout, time.monotonic() + UP_SECONDS)
        pid, facts = _understand(answers, process.stderr)
        holder = state.Holder.of(pid)
    except BaseException:
        os.close(lifeline)  # the box ends by itself
        process.kill()
        raise
    finally:
        process.wait()
    pids = {name: answer["pid"] for name, answer in facts.items()}
    return NetnsLab(state.LabRecord(spec, holder, pids, {}), lifeline), facts


def _answers(stream: IO[bytes], deadline: float) -> Iterable[dict[str, Any]]:
    """The box's answers, a JSON object a line, until it has said all or the deadline passes."""
    data = b""
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([stream], [], [], left)[0]:
            break
        chunk = os.read(stream.fileno(), 1 << 20)
        data += chunk
        *lines, data = data.split(b"\n")
        yield from (json.loads(line) for line in lines)
        if not chunk:
            return
    raise LabError(f"the lab was not up within {UP_SECONDS:.0f} s")


def _understand(answers: Iterable[dict[str, Any]], stderr: IO[bytes]) -> tuple[int, dict[str, Any]]:
    pid = 0
    for answer in answers:
        if "error" in answer:
            raise LabError(
                f"the lab could not be made: {answer['error']}", hint="`testbed doctor` says what is missing"
            )
        if "nodes" in answer:
            return pid, answer["nodes"]
        pid = answer["pid"]
    said = stderr.read().decode(errors="replace").strip()
    raise LabError(f"the lab could not be made\n{said}".rstrip(), hint="`testbed doctor` says what is missing")
