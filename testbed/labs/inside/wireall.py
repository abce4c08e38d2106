"""Wires many machines that somebody else made, containers, at once: one interpreter that enters each of them."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any

from testbed.labs.inside.node import describe, node_facts, send, set_sysctls, wire
from testbed.labs.inside.root import libc, write


def enter(pid: int, kinds: tuple[str, ...]) -> None:
    """Be in a process's namespaces of these kinds."""
    handles = [os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY) for kind in kinds]
    for handle in handles:
        if libc.setns(handle, 0):
            number = ctypes.get_errno()
            raise OSError(number, f"entering: {os.strerror(number)}")
        os.close(handle)


def wire_network(pid: int, plan: dict[str, Any]) -> dict[str, Any]:
    """Wire a machine that has none of our programs: by those that are here, its files left alone."""
    wired = f"/proc/{pid}/root/run/wired"
    enter(pid, ("net",))
    set_sysctls(plan["sysctls"])
    facts = node_facts(plan)
    write(wired, "")  # its first process waits for it
    return facts


def begin(pid: int, plan: dict[str, Any], *, network_only: bool) -> int:
    """Wire one machine in a child; returns where its answer comes."""
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        return reader
    try:
        if network_only:
            send(writer, wire_network(pid, plan))
        else:
            enter(pid, ("net", "mnt"))
            send(writer, wire(plan))
    except BaseException as error:
        send(writer, {"error": describe(error)})
    os._exit(0)


def main() -> None:
    """Read pids and plans by name on standard input, answer with what came out by name."""
    machines = json.load(sys.stdin)
    readers = {
        name: begin(machine["pid"], machine["plan"], network_only=machine["network_only"])
        for name, machine in machines.items()
    }
    answers = {}
    for name, reader in readers.items():
        with os.fdopen(reader) as file:
            answers[name] = json.loads(file.read() or '{"error": "no answer"}')
    send(1, answers)
