"""The process that makes a lab's namespaces and holds them.

It reads a plan (JSON) on standard input, and builds, from the outside in:

1. a user namespace of one id with a mount namespace whose root is an almost empty tmpfs: /usr and its kin bound
   read-only, nothing else of the host.  Everything mounted here is locked for what runs further in.
2. a second user namespace with PID, mount, UTS, IPC and network namespaces: the box.  Its first process holds the
   lab; when it dies, the kernel removes every node, link and process.
3. for each node its own network, mount, UTS, IPC and PID namespaces, with tmpfs where nodes write.

It answers with one JSON line: the holder's pid as the host sees it, and each node's pid inside the box.
A `lifeline` (a pipe from whoever started it) keeps the box alive until it is told to stay on its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
from typing import Any

from testbed.labs.inside.node import describe, run_node, send, tool
from testbed.labs.inside.root import (
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    NEWIPC,
    NEWNET,
    NEWNS,
    NEWPID,
    NEWUSER,
    NEWUTS,
    as_lab_user,
    make_root,
    map_single_id,
    mount,
    tmpfs,
    unshare,
    write,
)


class NodeChild:
    """A node's first process as the holder sees it: its pid in the box, and the pipes to it."""

    def __init__(self, node: dict[str, Any], folder: str) -> None:
        self.name: str = node["name"]
        start_read, self.start = os.pipe()
        answer_read, answer = os.pipe()
        self.pid_read, pid_write = os.pipe()
        self.middle = os.fork()
        if not self.middle:
            unshare(NEWNS | NEWNET | NEWUTS | NEWIPC | NEWPID)
            child = os.fork()
            if not child:
                os.close(answer_read)
                os.close(self.start)
                run_node(node, folder, start_read, answer)
            os.write(pid_write, str(child).encode())
            os._exit(0)
        for number in (start_read, answer, pid_write):
            os.close(number)
        self.pid = 0
        self.answer = os.fdopen(answer_read, "r")

    def made(self) -> None:
        """Learn the node's pid; the others are being made meanwhile."""
        text = os.read(self.pid_read, 32)
        os.close(self.pid_read)
        os.waitpid(self.middle, 0)
        if not text:
            raise OSError(0, f"{self.name}: its namespaces could not be made (limit of this user reached?)")
        self.pid = int(text)

    def line(self) -> str:
        text = self.answer.readline()
        if not text:
            raise OSError(0, f"{self.name}: its first process died")
        return text

    def facts(self, text: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(text)
        if "error" in answer:
            raise OSError(0, f"{self.name}: {answer['error']}")
        return answer


def make_nodes(plan: dict[str, Any]) -> dict[str, Any]:
    """Make all nodes, lay the cables between them, and let each wire itself."""
    children = [NodeChild(node, plan["frr_folder"]) for node in plan["nodes"]]
    for child in children:
        child.made()
        text = child.line()
        if text.strip():
            child.facts(text)
    links = plan["links"]
    for child in children:
        links = links.replace(f"@{child.name}@", str(child.pid))
    tool(["ip", "-batch", "-"], links)
    for child in children:
        os.write(child.start, b"w")
    facts = {}
    for child in children:
        facts[child.name] = {"pid": child.pid, **child.facts(child.line())}
        child.answer.close()
        os.close(child.start)
    return facts


def hold(lifeline: int) -> None:
    """Keep the box alive: for as long as the lifeline is open, or for ever once told to stay."""
    woken, waker = os.pipe()
    for number in (woken, waker):
        os.set_blocking(number, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    watched = [lifeline, woken]
    while True:
        ready, _, _ = select.select(watched, [], [])
        if woken in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(woken, 4096)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if lifeline in ready:
            if os.read(lifeline, 1) != b"s":
                os._exit(0)
            watched.remove(lifeline)


def run_box(plan: dict[str, Any], lifeline: int, answer: int) -> None:
    """Be the first process of the box."""
    try:
        os.setsid()
        mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
        tmpfs("/run")
        tmpfs("/tmp", mode="1777")
        socket.sethostname(plan["id"][:60])
        facts = make_nodes(plan)
        write("/run/lab.json", json.dumps({"id": plan["id"], "nodes": {name: f["pid"] for name, f in facts.items()}}))
        send(answer, {"nodes": facts})
    except BaseException as error:
        with contextlib.suppress(OSError):
            send(answer, {"error": describe(error)})
        os._exit(1)
    os.close(answer)
    quiet = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(quiet, number)
    hold(lifeline)


def main() -> None:
    """Read the plan, make the box, answer on standard output."""
    lifeline = int(sys.argv[1])
    plan = json.load(sys.stdin)
    answer = os.dup(1)
    uid, gid = os.getuid(), os.getgid()
    try:
        tun = "/dev/net/tun" if os.path.exists("/dev/net/tun") else ""
        if plan["root_becomes"]:
            uid = gid = int(plan["root_becomes"])
            tun = as_lab_user(uid)
        unshare(NEWUSER | NEWNS)
        map_single_id(uid, gid)
        make_root(tun)
        unshare(NEWUSER | NEWNS | NEWPID | NEWNET | NEWUTS | NEWIPC)
        map_single_id(0, 0)
        said, saying = os.pipe()
        child = os.fork()
    except BaseException as error:
        send(answer, {"error": describe(error)})
        sys.exit(1)
    if not child:
        os.close(saying)
        os.read(said, 1)  # so that the two answers come one after the other
        run_box(plan, lifeline, answer)
    send(answer, {"pid": child})
