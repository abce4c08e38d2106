"""Tells of a machine's and its pods' network state again and again. A program, of several modules: see `PROGRAM`.

For every line on standard input it prints one: {"same": true} where nothing has changed since the last time, else
{"state": {PLACE: [LINE, …]}} with what is there now.  A PLACE is "" for the machine itself, else the name of a network
namespace under /run/netns.  What changes by itself is left out: counters, timers, learned entries, ARP.

It reads the kernel's tables by netlink, in this one process, and a few small files; the rules, which only programs can
show, anew only once the kernel says that they have changed.  Its one argument is iptables-legacy where those are to be
read too.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from testbed.probes.machinefiles import told_by_files
from testbed.probes.netlinkwords import address, attributes, mac, messages, next_hops, number, text, told_of
from testbed.probes.rulelines import by_chain, saved_by_chain

NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12
REQUEST, DUMP, DONE, ERROR = 0x1, 0x300, 3, 2
GETLINK, GETADDR, GETROUTE, GETNEIGH, GETRULE, GETQDISC = 18, 22, 26, 30, 34, 38
NEWNEIGH, DELNEIGH = 28, 29
SOL_NETLINK, ADD_MEMBERSHIP = 270, 1
GROUPS = (1, 3, 4, 5, 7, 8, 9, 11, 19, 24)  # links, neighbours, queues, addresses, routes, rules, settings
GETGEN = 10 << 8 | 16  # nf_tables' own
FAMILIES = ("ip", "ip6", "inet", "arp", "bridge", "netdev")
SKIP_STATS = 1 << 3
CLONE_NEWNET = 0x40000000
AF_BRIDGE = 7
LINK_FLAGS = {0x1: "UP", 0x10: "POINTOPOINT", 0x80: "NOARP", 0x10000: "LOWER_UP"}
PERMANENT, NOARP = 0x80, 0x40
LOCAL_TABLE, KERNEL, ROUTER_ADVERTISEMENT, CLONED = 255, 2, 9, 0x200
BRIDGE_KEPT, PORT_KEPT = (4, 5, 7), (1, 4, 8, 9, 33)
GETNETCONF = 82
SETTINGS = {2: "forwarding", 3: "rp_filter", 5: "proxy_arp", 6: "ignore_routes_with_linkdown"}
ROUTE_TYPES = {1: "", 2: "local ", 6: "blackhole ", 7: "unreachable ", 8: "prohibit ", 9: "throw "}

PROGRAM = ("netlinkwords", "rulelines", "machinefiles", "stateof")
"""The modules that make up the program, each after those that it imports."""

libc = ctypes.CDLL(None, use_errno=True)


class Space:
    """One network namespace, and the rules that were found in it last."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.names: dict[int, str] = {}
        self.own: set[str] = set()
        self.generation = -1
        self.rules: list[str] = []
        self.tables: list[str] = []
        self.lasting: set[bytes] = set()  # the addresses and MACs of the neighbours that are told
        self.events: socket.socket | None = None
        if not path:
            self.open()
            self.listen()

    def open(self) -> None:
        """Make sockets in it: as long as there are any, it stays, though the pod may have gone."""
        with inside(self.path):
            self.route = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE)
            self.netfilter = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        for sock in (self.route, self.netfilter):
            sock.bind((0, 0))
            sock.settimeout(5)

    def close(self) -> None:
        self.route.close()
        self.netfilter.close()

    def look(self, legacy: bool) -> list[str]:
        """Everything, with sockets of this look alone where it is a pod's."""
        if not self.path:
            return self.state(legacy)
        self.open()
        try:
            return self.state(False)
        finally:
            self.close()

    def listen(self) -> None:
        """Hear of changes: as long as there are none, nothing has to be read."""
        self.events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE)
        self.events.bind((0, 0))
        self.events.setblocking(False)
        for group in GROUPS:
            self.events.setsockopt(SOL_NETLINK, ADD_MEMBERSHIP, group)

    def changed(self) -> bool:
        """Whether there may be something new in the kernel's tables since this was asked last."""
        if self.events is None or not self.tables:
            return True
        found = False
        while True:
            try:
                data = self.events.recv(1 << 17)
            except BlockingIOError:
                return found
            except OSError:  # more than there was room for
                found = True
                continue
            found = found or any(self.matters(kind, body) for kind, body in messages(data))

    def matters(self, kind: int, body: bytes) -> bool:
        """Whether an event is about something that is told: ARP comes and goes."""
        if kind not in (NEWNEIGH, DELNEIGH):
            return True
        if struct.unpack_from("H", body, 8)[0] & (PERMANENT | NOARP):
            return True
        told = dict(attributes(body, 12, len(body)))
        return told.get(1) in self.lasting or told.get(2) in self.lasting

    def dump(self, kind: int, body: bytes) -> Iterator[bytes]:
        """The messages that answer a request for a whole table."""
        self.route.send(struct.pack("IHHII", 16 + len(body), kind, REQUEST | DUMP, 1, 0) + body)
        while True:
            for answer, body in messages(self.route.recv(1 << 17)):
                if answer in (DONE, ERROR):
                    return
                yield body

    def state(self, legacy: bool) -> list[str]:
        """Everything, line by line."""
        if self.changed():
            lines = self.links()
            lines += self.addresses()
            lines += self.routes()
            lines += self.policies()
            lines += self.neighbours()
            lines += self.queues()
            lines += self.settings()
            self.tables = sorted(lines)
        # A pod's files are the machine's, and its settings would take going there.
        return self.tables + self.filter_rules(legacy) + ([] if self.path else told_by_files())

    # --- devices

    def links(self) -> list[str]:
        lines = []
        self.names.clear()
        found = []
        for data in self.dump(GETLINK, struct.pack("BxHiII", 0, 0, 0, 0, 0) + struct.pack("HHI", 8, 29, SKIP_STATS)):
            _, index, flags, _ = struct.unpack_from("xxHiII", data)
            told = dict(attributes(data, 16, len(data)))
            self.names[index] = text(told.get(3, b"?"))
            found.append((index, flags, told))
        for index, flags, told in found:
            info = dict(attributes(told.get(18, b""), 0, len(told.get(18, b""))))
            kind = text(info.get(1, b""))
            master = self.names.get(number(told.get(10, b"")), "")
            if self.name(index) == "veth*" and not master:
                continue  # of a pod that is gone, whose network somebody still looks at
            shown = " ".join(word for bit, word in LINK_FLAGS.items() if flags & bit)
            data = info.get(2, b"")
            kept = dict(attributes(data, 0, len(data))) if kind == "bridge" else {}
            details = (
                [kept[key].hex() for key in BRIDGE_KEPT if key in kept]
                if kind == "bridge"
                else told_of(kind, data, self.name)
            )
            port = (
                dict(attributes(info.get(5, b""), 0, len(info.get(5, b""))))
                if text(info.get(4, b"")) == "bridge"
                else {}
            )
            switches = [f"{key}={port[key].hex()}" for key in PORT_KEPT if key in port]
            words = ["link", self.name(index), kind, shown, f"mtu {number(told.get(4, b''))}"]
            words += [f"master {master}"] if master else []
            lasting = self.path == "" and kind != "bridge" and self.name(index) != "veth*"
            words += [f"mac {mac(told.get(1, b''))}"] if lasting and 1 in told else []
            words += details if kind not in ("veth", "") else []
            lines.append(" ".join(word for word in [*words, *switches] if word))
        return lines

    def name(self, index: int) -> str:
        found = self.names.get(index, f"#{index}")
        return "veth*" if self.path == "" and found.startswith("veth") else found

    def addresses(self) -> list[str]:
        lines = []
        for data in self.dump(GETADDR, struct.pack("BBBBi", 0, 0, 0, 0, 0)):
            family, length, _, scope, index = struct.unpack_from("BBBBi", data)
            told = dict(attributes(data, 8, len(data)))
            if family == socket.AF_INET6 and scope:
                continue  # the kernel gives them to every device
            lines.append(f"address {address(told.get(2) or told[1])}/{length} dev {self.name(index)}")
        if self.path:  # a pod that is made anew has another address
            own = {line.split()[1].partition("/")[0] for line in lines} - {"127.0.0.1", "::1"}
            self.own = own
            return ["address its own" if line.split()[1].partition("/")[0] in own else line for line in lines]
        return lines

    # --- routing

    def routes(self) -> list[str]:
        lines = []
        for family in (socket.AF_INET, socket.AF_INET6):
            for data in self.dump(GETROUTE, struct.pack("BBBBBBBBI", family, 0, 0, 0, 0, 0, 0, 0, 0)):
                _, length, _, _, table, protocol, _, kind, flags = struct.unpack_from("BBBBBBBBI", data)
                told = dict(attributes(data, 12, len(data)))
                table = number(told[15]) if 15 in told else table
                if table == LOCAL_TABLE or flags & CLONED or kind == 5:
                    continue
                if family == socket.AF_INET6 and protocol in (KERNEL, ROUTER_ADVERTISEMENT):
                    continue
                lines.append(self.route_line(length, table, protocol, kind, flags, told))
        return lines

    def route_line(self, length: int, table: int, protocol: int, kind: int, flags: int, told: dict[int, bytes]) -> str:
        target = f"{address(told[1])}/{length}" if 1 in told else "default"
        words = [f"route {ROUTE_TYPES.get(kind, f'type {kind} ')}{target}"]
        hops = [(number(told[4]), told, flags)] if 4 in told else []
        if 9 in told:
            hops = list(next_hops(told[9]))
        for index, more, marks in hops:
            words += [f"via {address(more[5])}"] if 5 in more else []
            words += [f"via {address(more[18][2:])}"] if 18 in more else []
            words += [f"dev {self.name(index)}"]
            words += [word for bit, word in ((1, "dead"), (4, "onlink"), (16, "linkdown")) if marks & bit]
        words += [f"src {'its own' if address(told[7]) in self.own else address(told[7])}"] if 7 in told else []
        words += [f"metric {number(told[6])}"] if number(told.get(6, b"")) else []
        words += [f"table {table}"] if table != 254 else []
        words += [f"metrics {told[8].hex()}"] if 8 in told else []
        return " ".join([*words, f"proto {protocol}"])

    def policies(self) -> list[str]:
        lines = []
        for family in (socket.AF_INET, socket.AF_INET6):
            for data in self.dump(GETRULE, struct.pack("BBBBBBBBI", family, 0, 0, 0, 0, 0, 0, 0, 0)):
                told = sorted((kind, value.hex()) for kind, value in attributes(data, 12, len(data)) if kind != 15)
                lines.append(f"rule of routing {data[:12].hex()} {told}")
        return lines

    def neighbours(self) -> list[str]:
        lines = []
        self.lasting.clear()
        for family in (0, AF_BRIDGE):
            body = struct.pack("BxxxiHBB", family, 0, 0, 0, 0)
            if family == AF_BRIDGE:
                body = struct.pack("BxHiII", family, 0, 0, 0, 0)
            for data in self.dump(GETNEIGH, body):
                found, index, state = struct.unpack_from("BxxxiH", data)
                told = dict(attributes(data, 12, len(data)))
                if found == AF_BRIDGE:
                    kept = (1 in told and state & (PERMANENT | NOARP)) or (state & NOARP and not state & PERMANENT)
                    target = f" dst {address(told[1])}" if 1 in told else ""
                    line = f"fdb {mac(told.get(2, b''))} dev {self.name(index)}{target}"
                else:
                    kept = state & PERMANENT and 1 in told
                    target = address(told[1]) if 1 in told else ""
                    line = f"neighbour {target} dev {self.name(index)} {mac(told.get(2, b''))}"
                if kept:
                    self.lasting |= {value for value in (told.get(1), told.get(2)) if value}
                    lines.append(line)
        return lines

    def queues(self) -> list[str]:
        lines = []
        for data in self.dump(GETQDISC, struct.pack("BxxxiIII", 0, 0, 0, 0, 0)):
            _, index, _, parent, _ = struct.unpack_from("BxxxiIII", data)
            told = dict(attributes(data, 20, len(data)))
            kind = text(told.get(1, b""))
            if kind not in ("noqueue", "mq") and self.name(index) != "veth*":
                lines.append(f"qdisc {kind} dev {self.name(index)} parent {parent:x} {told.get(2, b'').hex()}")
        return lines

    # --- rules

    def filter_rules(self, legacy: bool) -> list[str]:
        """The rules; nft shows those of iptables-nft too."""
        generation = self.rule_generation()
        if generation != self.generation or legacy:
            lines = [] if generation <= 0 else by_chain(self.ruleset())
            if legacy:
                lines += saved_by_chain(self.listed(["iptables-legacy-save"]))
            self.generation, self.rules = generation, [f"rules {line}" for line in lines]
        return self.rules

    def ruleset(self) -> list[str]:
        """What nft lists, a family at a time: of several at once it tells what `masquerade` does of the first alone."""
        return [line for family in FAMILIES for line in self.listed(["nft", "-s", "list", "ruleset", family])]

    def rule_generation(self) -> int:
        """A number that the kernel changes with every change of rules; 0 where it has no nf_tables."""
        self.netfilter.send(struct.pack("IHHII", 20, GETGEN, REQUEST, 1, 0) + struct.pack("!BBH", 0, 0, 0))
        data = self.netfilter.recv(1 << 16)
        if struct.unpack_from("IH", data)[1] == ERROR:
            return 0
        told = dict(attributes(data, 20, len(data)))
        return int.from_bytes(told.get(1, b""), "big")

    def listed(self, argv: list[str]) -> list[str]:
        entering = ["nsenter", f"--net={self.path}", "--"] if self.path else []
        done = subprocess.run([*entering, *argv], capture_output=True, check=False, stdin=subprocess.DEVNULL)
        lines = done.stdout.decode(errors="replace").splitlines()
        return [" ".join(line.split()) for line in lines if line.strip() and not line.startswith("#")]

    def settings(self) -> list[str]:
        """How each device forwards and filters, which is what /proc/sys/net/ipv4/conf shows."""
        lines = []
        for data in self.dump(GETNETCONF, struct.pack("B", socket.AF_INET)):
            told = {
                kind: struct.unpack("i", value)[0] for kind, value in attributes(data, 4, len(data)) if len(value) == 4
            }
            index = told.pop(1, 0)
            device = {-1: "all", -2: "default"}.get(index) or self.name(index)
            if device == "veth*":
                continue
            words = [f"{name} {told[kind]}" for kind, name in SETTINGS.items() if kind in told]
            lines.append(f"sysctl {device} {' '.join(words)}")
        return lines


@contextlib.contextmanager
def inside(path: str) -> Iterator[None]:
    """Be in a network namespace for a moment."""
    if not path:
        yield
        return
    own, other = os.open("/proc/self/ns/net", os.O_RDONLY), os.open(path, os.O_RDONLY)
    try:
        enter(other)
        yield
    finally:
        enter(own)
        os.close(own)
        os.close(other)


def enter(descriptor: int) -> None:
    if libc.setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


class Spaces:
    """The machine's own namespace, and those of its pods as they come and go."""

    FOLDER = "/run/netns"

    def __init__(self) -> None:
        self.known: dict[str, tuple[int, Space]] = {"": (0, Space(""))}

    def now(self) -> dict[str, Space]:
        there: dict[str, int] = {"": 0}
        with contextlib.suppress(OSError), os.scandir(self.FOLDER) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    there[entry.name] = os.stat(entry.path).st_ino
        for name in list(self.known):
            if there.get(name) != self.known[name][0]:
                del self.known[name]
        for name, inode in there.items():
            if name not in self.known:
                self.known[name] = inode, Space(f"{self.FOLDER}/{name}")
        return {name: space for name, (_, space) in sorted(self.known.items())}


def main() -> None:
    """Answer until standard input ends."""
    legacy = "iptables-legacy" in sys.argv[1:]
    spaces, last = Spaces(), None
    for _ in sys.stdin.buffer:
        state: dict[str, Any] = {}
        for name, space in spaces.now().items():
            try:
                state[name] = space.look(legacy)
            except OSError as error:  # a file that is no namespace any more
                state[name] = [f"cannot be read: {error.strerror}"]
        answer = {"same": True} if state == last else {"state": state}
        last = state
        print(json.dumps(answer), flush=True)
