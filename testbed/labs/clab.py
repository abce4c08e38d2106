"""Labs of containers: the rendered topology deployed by containerlab on a Docker engine."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from importlib import resources
from types import MappingProxyType
from typing import Any, Self

from docker.errors import NotFound

from testbed.clab import remains
from testbed.clab.program import find_containerlab
from testbed.clab.remains import LABEL, container_name, folder_of, one_at_a_time
from testbed.deadline import Deadline
from testbed.engine import private
from testbed.engine.find import ENGINE_ERRORS, Engine, find_engine
from testbed.errors import LabBusyError, LabError
from testbed.images.chosen import default_image, images_of
from testbed.labs import Progress, Quiet, inside, interpreter, residents, restart, state
from testbed.labs.farnode import FarNode
from testbed.labs.faults import LinkFaults, fault, require_features
from testbed.labs.netnsnode import ENVIRONMENT, NetnsNode
from testbed.labs.plan import node_plan, wiring_faults
from testbed.linkfault import LinkFault
from testbed.model import LabSpec, LinkSpec, NodeSpec, Role
from testbed.parallel import each
from testbed.render import Images, cluster_name, render_lab

STORE_ROOM, MACHINE_ROOM = 192 << 20, 8 << 20
"""Bytes of disk that a lab takes: etcd, which sets aside its log, and each machine with flannel's files and logs."""


ENDING_SECONDS = 5.0


@dataclass(frozen=True)
class ClabNode(NetnsNode):
    """A machine of a containerlab lab, entered by its container's namespaces."""

    way: tuple[str, ...] = ()  # into the PID namespace that `pid` is of; empty where that is ours

    def entering(self, *, stay: bool = False) -> list[str]:
        """The words that put a command into this container; with `stay` it outlives whoever started it."""
        return [
            *self.way,
            *("nsenter", "-t", str(self.pid), "-n", "-m", "-u", "-i", "-p", "--"),
            *(() if stay else ("setpriv", "--pdeathsig", "KILL", "--")),
            *self.inner,
        ]


@dataclass(frozen=True)
class PulledRouter(ClabNode):
    """A router of an image that has FRR and little else: commands are this machine's programs, in its network.

    `interactive` alone goes into the container, where `vtysh` is.
    """

    def entering(self, *, stay: bool = False) -> list[str]:
        """The words that put a command into this container's network; with `stay` it outlives whoever started it."""
        tied = () if stay else ("setpriv", "--pdeathsig", "KILL", "--")
        return [*self.way, *("nsenter", "-t", str(self.pid), "-n", "-u", "-p", "--"), *tied, *self.inner]

    def read(self, path: str) -> bytes:
        """Return a file of this router. Raises FileNotFoundError."""
        return super().read(self.inside(path))

    def write(self, path: str, data: bytes | str, *, mode: int = 0o644) -> None:
        """Write a file on this router, making its folder where it is missing."""
        super().write(self.inside(path), data, mode=mode)

    def start(self, argv: Sequence[str], *, name: str, env: Mapping[str, str] | None = None) -> int:
        """Refuse: what would run, and leave files, is not in the container. Raises LabError."""
        raise LabError(f"{name} cannot be started on a router of a pulled image", where=self.name)

    def interactive(self, argv: Sequence[str]) -> int:
        """Run a command of the container's own on the caller's terminal; returns its exit code."""
        inside = ClabNode(self.spec, self.holder_pid, self.pid, self.inner, self.label, self.via, way=self.way)
        return inside.interactive(argv)

    def in_vrf(self) -> Self:
        """This machine, but with the sockets of what runs there in its VRF; see `Node.in_vrf`."""
        if not self.spec.vrf:
            return self
        program = str(resources.files("testbed.labs").joinpath("vrfexec.py"))
        via = (interpreter(), "-I", "-S", program, self.spec.vrf)
        return replace(self, via=via, label=f"{self.name}/{self.spec.vrf}")

    def inside(self, path: str) -> str:
        """A path in the container as this machine, or the engine, has it."""
        return path if path.startswith("/proc/") else f"/proc/{self.pid}/root{path}"


@dataclass
class ClabLab:
    """A lab of containers that is up."""

    record: state.LabRecord
    engine: Engine
    kind: str = "clab"
    nodes: Mapping[str, ClabNode | FarNode] = field(init=False)
    link_faults: LinkFaults = field(init=False, default_factory=LinkFaults)

    def __post_init__(self) -> None:
        self.nodes = MappingProxyType(self._nodes())

    def _nodes(self) -> dict[str, ClabNode | FarNode]:
        own = self.engine.private
        way = ("nsenter", "-t", str(own.holder.pid), "-m", "-p", "-F", "--") if own else ()
        pids = self.record.pids
        holder = own.holder.pid if own else 0
        if not self.engine.local:
            address, client = self.engine.address, self.engine.client
            return {
                n.name: FarNode(
                    n, holder, pids[n.name], container=container_name(self.spec, n.name), address=address, client=client
                )
                for n in self.spec.nodes
                if n.name in pids
            }
        return {
            n.name: (PulledRouter if self._pulled(n) else ClabNode)(n, holder, pids[n.name], way=way)
            for n in self.spec.nodes
            if n.name in pids
        }

    def _pulled(self, node: NodeSpec) -> bool:
        """Whether a machine's image has none of our programs."""
        return bool(self.record.facts.get("pulled_routers")) and node.role in (Role.LEAF, Role.SPINE)

    def machine(self, name: str) -> dict[str, Any]:
        """What the program that wires machines has to know of one."""
        node = self.node(name)
        only = isinstance(node, PulledRouter)
        return {"pid": node.pid, "plan": _plan(self.spec, name), "network_only": only}

    @property
    def spec(self) -> LabSpec:
        """What this lab is."""
        return self.record.spec

    def node(self, name: str) -> ClabNode | FarNode:
        """Return the machine of that name; KeyError where there is none."""
        return self.nodes[name]

    def remember(self, **facts: Any) -> None:
        """Keep facts about the lab for later commands."""
        self.record = replace(self.record, facts=self.record.facts | facts)
        self.record.save()

    @property
    def alive(self) -> bool:
        """Whether all of its containers run."""
        return self.engine.private is None or self.engine.private.alive

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
        """Give a link a fault for as long as the block lasts; see `Lab.fault`."""
        wanted = LinkFault(delay, jitter, loss, reorder, duplicate, corrupt, rate, down=down, towards=towards)
        return fault(self, link, wanted)

    def settle(self, names: Iterable[str]) -> None:
        """Make many commands on these machines cheap for as long as this process lives."""
        if not self.engine.local:
            return  # nothing is left there that takes descriptors
        for name in names:
            residents.settle(self.nodes[name], ENVIRONMENT)

    def restart(self, name: str) -> None:
        """Let a machine start anew; see `Lab.restart`."""
        if not self.engine.local:
            what = "a machine's cables are out of reach where its engine is, so it cannot start anew"
            raise LabError(what, where=name, hint="run as root where the engine runs")
        node = self.node(name)
        restart.check_no_faults(self, name)
        residents.leave(node)
        way = self.engine.private.entering() if self.engine.private else ()
        if isinstance(node, PulledRouter):
            node.run(["rm", "-f", node.inside("/run/wired")])
        restart.put_aside(way, node.spec, node.pid)
        try:
            self.engine.client.containers.get(container_name(self.spec, name)).restart(timeout=0)
        except ENGINE_ERRORS as error:
            raise LabError(f"the container of {name} cannot be started anew: {error}", where=self.spec.id) from error
        self.record = replace(self.record, pids=_pids(self.engine, self.spec))
        self.record.save()
        self.nodes = MappingProxyType(self._nodes())
        restart.put_back(way, node.spec, node.pid, self.node(name).pid)
        _wire(self, (name,))

    def detach(self) -> None:
        """Let the lab outlive this process, as containers do by themselves."""

    def down(self) -> None:
        """Remove the lab's containers and files, and check that nothing is left. Raises LabError."""
        for node in self.nodes.values():
            residents.leave(node)
        with state.locked(self.spec.id):
            _forget(self.engine, self.record)


def open_record(record: state.LabRecord) -> ClabLab:
    """The lab of a record. Raises LabError where its engine does not answer."""
    return ClabLab(record, find_engine(record.facts["engine"]))


def remove_record(record: state.LabRecord) -> None:
    """Remove what is left of a lab, also where its private engine is gone, and the containers with it."""
    if record.facts["engine"] != private.address() or record.holder.alive:
        open_record(record).down()
        return
    with state.locked(record.spec.id):
        remains.remove_files(record.spec.id)
        record.forget()


def bring_up(spec: LabSpec, *, progress: Progress | None = None, image: str = "", image_prefix: str = "") -> ClabLab:
    """Deploy a lab by containerlab, address its machines and check its wiring; it stays until `down`.

    `image` is one of `testbed images list` or what the engine calls another; by default the one that suits the engine.
    With `image_prefix` leaves and spines are of the FRR image of that mirror.
    Raises LabError where a lab of that id is up already, there is no engine, containerlab or image, or the wiring
    differs from the model.
    """
    progress = progress or Quiet()
    require_features(spec)
    with state.locked(spec.id):
        earlier = state.read_record(spec.id)
        if earlier is not None and (earlier.kind == "clab" or earlier.holder.alive):
            raise LabBusyError(
                f"lab {spec.id} is already up", hint=f"`testbed down --name {spec.id}`, or another --name"
            )
        engine = find_engine()
        _check_rights()
        _check_room(engine, spec)
        _nobody_elses(engine, spec)
        with progress.step("Looking for containerlab"):  # which may have to be built first
            program = find_containerlab()
        image = image or default_image(engine)
        with progress.step(f"Looking for the image {image}"):  # which may have to be made or pulled first
            images = images_of(engine, image, image_prefix)
        facts = {"engine": engine.address, "image": images.node, "pulled_routers": images.pulled_routers}
        record = state.LabRecord(spec, _holder(engine), {}, facts, "clab")
        try:
            record.save()
            machines = f"{len(spec.nodes)} machines, {len(spec.links)} links"
            with progress.step(f"Deploying {spec.topology}: {machines}"):
                write_files(spec, images)
                with one_at_a_time() as lock:
                    program.deploy(folder_of(spec.id), engine, lock)
            with progress.step("Addressing and checking the wiring"):
                lab = ClabLab(replace(record, pids=_pids(engine, spec)), engine)
                _wire(lab, tuple(lab.nodes))
            lab.record.save()
        except BaseException as error:
            _forget(engine, record)
            if isinstance(error, ENGINE_ERRORS):
                raise LabError(f"the Docker engine failed: {error}", hint="`docker info`, and its log") from error
            if engine.private and not engine.private.alive:
                raise LabError("the private engine has ended", hint="testbed engine up") from error
            raise
    return lab


def _forget(engine: Engine, record: state.LabRecord) -> None:
    """Remove a lab, and its record last; its containers have gone already where the private engine has."""
    try:
        remains.remove(engine, record.spec.id, complete=bool(record.pids))
    except LabError:
        own = engine.private
        # An engine that is killed refuses to answer a moment before its first process has gone.
        if own is None or not Deadline(ENDING_SECONDS).poll(lambda: not own.alive):
            raise
        remains.remove_files(record.spec.id)
    record.forget()


def _holder(engine: Engine) -> state.Holder:
    """Whose end is the lab's end: the private engine's first process, or for another engine this machine's."""
    return engine.private.holder if engine.private else state.Holder.of(1)


def _check_rights() -> None:
    if os.geteuid() != 0:
        what = "labs of containers are made by root only: containerlab lays cables into the containers' namespaces"
        raise LabError(what, hint="sudo; the embedded lab (`--lab netns`) needs no root")


def _check_room(engine: Engine, spec: LabSpec) -> None:
    wanted = STORE_ROOM + len(spec.nodes) * MACHINE_ROOM
    if engine.room is not None and engine.room < wanted:
        what = f"the engine has {engine.room >> 20} MB of disk left, and the lab takes {wanted >> 20}"
        hint = "`docker system df` tells what takes it; a private engine's folder is chosen by TESTBED_ENGINE_DATA"
        raise LabError(what, where=engine.address, hint=hint)


def _nobody_elses(engine: Engine, spec: LabSpec) -> None:
    name = cluster_name(spec)
    others = engine.client.containers.list(all=True, filters={"label": f"{LABEL}={name}"}, ignore_removed=True)
    if others:
        names = ", ".join(sorted(str(container.name) for container in others))
        raise LabBusyError(
            f"the engine has containers of a lab {name} already: {names}",
            hint="`containerlab destroy` removes them if they are yours, or give this one another --name",
        )


def write_files(spec: LabSpec, images: Images) -> None:
    """Put what containerlab reads into the lab's folder."""
    place = folder_of(spec.id)
    remains.remove_files(spec.id)
    for name, text in render_lab(spec, images).items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _pids(engine: Engine, spec: LabSpec) -> dict[str, int]:
    """Each machine's first process, as the engine numbers it. Raises LabError for one that does not run."""
    found = {}
    for node in spec.nodes:
        try:
            facts = engine.client.api.inspect_container(container_name(spec, node.name))
        except NotFound as error:
            raise LabError(f"containerlab made no container for {node.name}") from error
        found[node.name] = int(facts["State"]["Pid"])
        if not found[node.name]:
            said = facts["State"].get("Error") or f"exit {facts['State']['ExitCode']}"
            raise LabError(f"the container of {node.name} does not run: {said}")
    return found


def _plan(spec: LabSpec, name: str) -> dict[str, Any]:
    """What a container has to be given from inside: its first process starts FRR, with files that it sees already."""
    plan = node_plan(spec, spec.node(name))
    files = {path: text for path, text in plan["files"].items() if not path.startswith("/etc/frr/")}
    # Docker switches IPv6 off where a container has no network of its own.
    ipv6 = {f"net/ipv6/conf/{which}/disable_ipv6": "0" for which in ("all", "default")}
    return plan | {"files": files, "sysctls": ipv6 | plan["sysctls"], "daemons": []}


def _wire(lab: ClabLab, names: Sequence[str]) -> None:
    """Give machines their addresses, settings and files, and compare what came out with the model."""
    if lab.engine.local:
        facts = _wire_by_pids(lab, {name: lab.machine(name) for name in names})
    else:
        answers = each(lambda name: restart.wire_node(lab.node(name), _plan(lab.spec, name)), names)
        facts = dict(zip(names, answers, strict=True))
    faults = wiring_faults(lab.spec, facts, names)
    if faults:
        raise LabError("the lab is not wired as described:\n  " + "\n  ".join(faults), where=lab.spec.id)


def _wire_by_pids(lab: ClabLab, machines: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Wire all machines by one program, which costs a fraction of one in each."""
    way = lab.engine.private.entering() if lab.engine.private else ()
    argv = [*way, interpreter(), "-I", "-S", "-c", inside.program(*inside.WIRE_ALL)]
    done = subprocess.run(
        argv, input=json.dumps(machines), capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    if done.returncode:
        raise LabError(f"the machines cannot be wired: {done.stderr.strip()[-500:]}", where=lab.spec.id)
    answers: dict[str, dict[str, Any]] = json.loads(done.stdout)
    for name, answer in answers.items():
        if "error" in answer:
            raise LabError(f"{name} cannot be wired: {answer['error']}", where=lab.spec.id)
    return answers
