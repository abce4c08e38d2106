"""`testbed status`: which labs are up, and what is in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from testbed.commands.labs import json_option, live_ids, name_option, print_json
from testbed.labs.faults import present
from testbed.labs.kinds import open_lab
from testbed.labs.netnsnode import NetnsNode
from testbed.model import Role
from testbed.parallel import each

if TYPE_CHECKING:
    from testbed.labs.kinds import AnyLab

WIDE = 200
"""Columns of a table that nobody looks at on a terminal: nothing is wrapped for grep's sake."""

#: Answers in one command what would be several: the pid of flanneld if it lives, then subnet.env.
_LOOK = (
    'pid=$(cat /run/flanneld.pid 2>/dev/null) && kill -0 "$pid" 2>/dev/null && echo "$pid" || echo; '
    'cat "$1" 2>/dev/null'
)


def node_status(node: NetnsNode, subnet_file: str) -> dict[str, Any]:
    """What a machine is, and how flannel is on it."""
    facts: dict[str, Any] = {"name": node.name, "role": str(node.spec.role), "address": str(node.spec.ip)}
    if node.spec.vrf:
        facts["vrf"] = node.spec.vrf
    if node.spec.role is Role.NODE:
        done = node.run(["sh", "-c", _LOOK, "look", subnet_file], check=False)
        pid, _, text = done.stdout.partition("\n")
        env = dict(line.partition("=")[::2] for line in text.splitlines())
        facts |= {
            "flanneld": int(pid) if pid else None,
            "subnet": env.get("FLANNEL_SUBNET"),
            "mtu": int(env["FLANNEL_MTU"]) if "FLANNEL_MTU" in env else None,
        }
    return facts


def lab_status(lab: AnyLab) -> dict[str, Any]:
    """What a lab is, and how its machines are."""
    facts = lab.record.facts
    subnet_file = facts.get("subnet_file", "/run/flannel/subnet.env")
    return {
        "name": lab.spec.id,
        "lab": lab.kind,
        "topology": lab.spec.topology,
        "mtu": lab.spec.mtu,
        "backend": facts.get("backend"),
        "holder": lab.record.holder.pid,
        "faults": dict(present(lab.spec, facts)),
        "nodes": each(lambda node: node_status(node, subnet_file), lab.nodes.values()),
        "pods": [{"endpoint": name, "address": pod["address"]} for name, pod in sorted(facts.get("pods", {}).items())],
    }


def _table(lab: dict[str, Any]) -> Table:
    title = f"{lab['name']}: {lab['backend'] or 'no flannel'} on {lab['topology']}, MTU {lab['mtu']}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("machine", "role", "address", "subnet", "MTU", "flanneld", "pods"):
        table.add_column(heading)
    for node in lab["nodes"]:
        pods = [p for p in lab["pods"] if p["endpoint"].startswith(node["name"] + "/")]
        mine = ", ".join(f"{p['endpoint'].partition('/')[2]} {p['address']}" for p in pods)
        flanneld = "" if "flanneld" not in node else ("runs" if node["flanneld"] else "does not run")
        cells = (node["name"], node["role"], node["address"], node.get("subnet") or "", str(node.get("mtu") or ""))
        table.add_row(*cells, flanneld, mine)
    return table


@click.command()
@name_option
@json_option
def status(name: str | None, as_json: bool) -> None:
    """Tell which labs are up, and what is in them."""
    labs = [lab_status(open_lab(lab_id)) for lab_id in ([name] if name else live_ids())]
    if as_json:
        print_json({"labs": labs})
        return
    if not labs:
        click.echo("no lab is up; `testbed up` makes one")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDE
    for lab in labs:
        console.print(_table(lab))
        for link, text in lab["faults"].items():
            console.print(f"fault: {link}: {text}", markup=False)
