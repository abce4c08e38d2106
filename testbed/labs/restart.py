"""A machine of a lab that starts anew: what every lab kind does the same way.

Its ends of its cables are put aside meanwhile, so that its neighbours lose their carrier and nothing else.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from testbed.errors import InputError, LabError
from testbed.labs import inside, interpreter
from testbed.labs.base import Node
from testbed.labs.faults import FaultyLab
from testbed.labs.plan import wiring_faults
from testbed.model import NodeSpec


def check_no_faults(lab: FaultyLab, name: str) -> None:
    """Raise InputError where a cable of the machine has a fault that is still wanted."""
    faulty = [made.link.name for made in lab.link_faults.made if name in (made.link.a.node, made.link.b.node)]
    if faulty:
        raise InputError(f"{name} cannot start anew while {faulty[0]} has a fault", hint="end the fault first")


def put_aside(way: Sequence[str], node: NodeSpec, pid: int) -> None:
    """Take the machine's interfaces out of it, to the first process of where `way` leads."""
    batch = "".join(
        f"link set dev {iface.name} netns 1 name {_aside(pid, number)}\n" for number, iface in enumerate(node.ifaces)
    )
    _ip([*way, "nsenter", "-t", str(pid), "-n", "--"], batch, node)


def put_back(way: Sequence[str], node: NodeSpec, was: int, pid: int) -> None:
    """Give the machine, which had another pid perhaps, its interfaces again."""
    batch = "".join(
        f"link set dev {_aside(was, number)} netns {pid} name {iface.name}\n"
        for number, iface in enumerate(node.ifaces)
    )
    _ip(way, batch, node)


def _aside(pid: int, number: int) -> str:
    return f"tb{pid}-{number}"


def _ip(way: Sequence[str], batch: str, node: NodeSpec) -> None:
    done = subprocess.run([*way, "ip", "-batch", "-"], input=batch, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"its cables cannot be moved: {done.stderr.strip()}", where=node.name)


def wire_node(node: Node, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Give a machine what its plan says from inside; returns what came out. Raises LabError."""
    argv = [interpreter(), "-I", "-S", "-c", inside.program(*inside.WIRE)]
    answer: dict[str, Any] = json.loads(node.run(argv, stdin=json.dumps(plan)).stdout)
    if "error" in answer:
        raise LabError(f"{node.name} cannot be wired: {answer['error']}")
    return answer


def wire_again(lab: FaultyLab, name: str, plan: Mapping[str, Any]) -> None:
    """Wire the machine. Raises LabError where it differs from the model."""
    facts = wire_node(lab.node(name), plan)
    faults = wiring_faults(lab.spec, {name: facts}, (name,))
    if faults:
        raise LabError(f"{name} is not wired as before:\n  " + "\n  ".join(faults), where=lab.spec.id)
