"""Always-on captures: one tcpdump an interface for the whole run, and looking back into them.

Starting a tcpdump costs more than most checks, so they run from the first check to the last and stream into a bounded
ring each.  A check opens a `Window`, sends packets that carry its own nonce, and looks back for them.

What is absent can only be asserted beside a control that is present in the same capture (`Window.absent`), and
packets that the kernel dropped during a window make its verdict inconclusive (`Window.close`).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources

from testbed.deadline import Deadline
from testbed.errors import LabError
from testbed.labs import interpreter
from testbed.labs.base import Place, Process
from testbed.probes.flows import BULK_PORTS, Nonce
from testbed.probes.packets import Decoded, Tunnel, decode
from testbed.probes.pcap import Packet, PcapReader, to_pcap

RING_BYTES = 4 << 20
"""How much of an interface's traffic is kept, in bytes."""

ROOM_KIB, MOST_ROOM_KIB, LEAST_ROOM_KIB = 192 << 10, 8 << 10, 2 << 10
"""What the kernel may hold for the tcpdumps of a run together, and for each of them, in KiB: a burst of a check waits
there for a tcpdump that a busy machine does not let run. A packet takes about 10 KiB (`tapper.SNAPSHOT_BYTES`)."""

MOST_KEPT = 200
"""How many of the packets that a check was given are kept decoded for its report."""

LISTEN_SECONDS, SEEN_SECONDS, STATS_SECONDS = 30.0, 3.0, 10.0

# The end of a tcpdump, by its own words: whoever entered the node for it may hold its pipes open.
_ENDED = re.compile(
    rb"^(?:\d+ packets? captured|tcpdump: (?!listening on|WARNING|verbose output|data link|\d+ packet).*)\n",
    re.MULTILINE,
)
_STATS = re.compile(rb"(\d+) packets? captured, (\d+) packets? received by filter, (\d+) packets? dropped by kernel")


class Inconclusive(Exception):
    """A check could not tell: neither held nor failed."""


@dataclass(frozen=True, slots=True)
class Target:
    """An interface to capture on: of a node, or, where `netns` is a path on the node, of a pod there."""

    name: str  # worker1:eth0, worker1/client:eth0
    node: Place
    iface: str
    netns: str = ""
    pod: str = ""  # whose way to its node it is


def capture_filter(tunnel: Tunnel) -> str:
    """The pcap filter of the always-on captures: everything but bulk flows, inside a tunnel too."""
    first, last = BULK_PORTS.start, BULK_PORTS.stop - 1
    parts = [f"portrange {first}-{last}"]
    inner = {"vxlan": 8 + 8 + 14, "udp": 8}.get(tunnel.kind or "")
    if inner is not None and tunnel.port:
        # Only TCP and UDP have ports there: the checksum of a ping stands in the same place.
        ported = f"(udp[{inner + 9}] = 6 or udp[{inner + 9}] = 17)"
        for at in (inner + 20, inner + 22):  # the inner source and destination port, behind an IP header of 20 bytes
            bulk = f"udp[{at}:2] >= {first} and udp[{at}:2] <= {last}"
            parts.append(f"(udp dst port {tunnel.port} and {ported} and {bulk})")
    if tunnel.kind == "ipip":
        for at in (40, 42):
            bulk = f"ip[{at}:2] >= {first} and ip[{at}:2] <= {last}"
            parts.append(f"(ip proto 4 and (ip[29] = 6 or ip[29] = 17) and {bulk})")
    return f"not ({' or '.join(parts)})"


@dataclass
class Tap:
    """One interface's capture: its ring, and what its tcpdump said."""

    target: Target
    reader: PcapReader
    packets: deque[Packet] = field(default_factory=deque)
    size: int = 0
    listening: bool = False
    ended: bool = False
    messages: bytes = b""
    stats: int = 0  # statistics answered so far
    dropped: int = 0

    def add(self, packet: Packet, limit: int) -> None:
        """Keep a packet, and let go of the oldest where the ring is full."""
        self.packets.append(packet)
        self.size += len(packet.data)
        while self.size > limit:
            self.size -= len(self.packets.popleft().data)

    def say(self, data: bytes) -> None:
        """Take what tcpdump wrote to standard error."""
        self.messages = (self.messages + data)[-8192:]
        self.listening = self.listening or b"listening on" in self.messages
        self.ended = self.ended or _ENDED.search(self.messages) is not None
        while found := _STATS.search(self.messages):
            self.stats += 1
            self.dropped = int(found[3])
            self.messages = self.messages[found.end() :]


class Captures:
    """The captures of a run. Use as a context manager; `window()` gives a check its view."""

    def __init__(self, tunnel: Tunnel, *, ring_bytes: int = RING_BYTES) -> None:
        self.tunnel = tunnel
        self.ring_bytes = ring_bytes
        self.taps: dict[str, Tap] = {}
        self._launchers: dict[str, list[Process]] = {}  # by node
        self._changed = threading.Condition()
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = os.pipe()
        self._selector.register(self._wake, selectors.EVENT_READ, None)
        self._stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._pump, name="captures", daemon=True)
        self._thread.start()

    def __enter__(self) -> Captures:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, targets: Iterable[Target]) -> None:
        """Start capturing on these interfaces and wait until every tcpdump listens. Raises LabError."""
        by_node: dict[str, list[Target]] = {}
        for target in targets:
            by_node.setdefault(target.node.name, []).append(target)
        taps = self.taps.keys() | {target.name for group in by_node.values() for target in group}
        room = max(LEAST_ROOM_KIB, min(MOST_ROOM_KIB, ROOM_KIB // max(1, len(taps))))
        for group in by_node.values():
            self._launch(group, room)
        self._await_listening([target.name for group in by_node.values() for target in group])

    def _launch(self, group: Sequence[Target], room: int) -> None:
        """Start the tcpdumps of one node by one program, each with two pipes of its own."""
        specs, passed, ours = [], [], []
        for target in group:
            packets, packets_out = os.pipe()
            messages, messages_out = os.pipe()
            specs.append(f"{target.netns},{target.iface},{packets_out},{messages_out}")
            passed += [packets_out, messages_out]
            ours.append((target, packets, messages))
        program = resources.files("testbed.probes").joinpath("tapper.py").read_text()
        argv = [interpreter(), "-I", "-S", "-c", program, capture_filter(self.tunnel), str(room), *specs]
        try:
            process = group[0].node.spawn(argv, pass_fds=passed, stdin=True)
        finally:
            for descriptor in passed:
                os.close(descriptor)
        with self._changed:
            self._launchers.setdefault(group[0].node.name, []).append(process)
            for target, packets, messages in ours:
                tap = self.taps[target.name] = Tap(target, PcapReader(target.name))
                for descriptor, take in ((packets, self._take_packets), (messages, self._take_messages)):
                    os.set_blocking(descriptor, False)
                    self._selector.register(descriptor, selectors.EVENT_READ, (tap, take))
        os.write(self._woken, b"w")

    def _await_listening(self, names: Sequence[str]) -> None:
        deadline = Deadline(LISTEN_SECONDS)
        with self._changed:
            while not all(self.taps[name].listening and self.taps[name].reader.link_type for name in names):
                self._raise_failure()
                for tap in (self.taps[name] for name in names):
                    if tap.ended or deadline.passed:
                        said = tap.messages.decode(errors="replace").strip()[-300:]
                        if not (tap.listening and tap.reader.link_type):
                            raise LabError(
                                f"tcpdump does not listen: {said or 'it said nothing'}", where=tap.target.name
                            )
                self._changed.wait(min(0.2, deadline.left))

    def _pump(self) -> None:
        """The one thread that reads every pipe."""
        try:
            while not self._stopping:
                for key, _ in self._selector.select():
                    if key.data is None:
                        os.read(self._wake, 4096)
                        continue
                    tap, take = key.data
                    with self._changed:
                        try:
                            data = os.read(key.fd, 1 << 18)
                        except BlockingIOError:
                            continue
                        if data:
                            take(tap, data)
                        else:
                            self._selector.unregister(key.fd)
                            os.close(key.fd)
                            tap.ended = True
                        self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 (handed to the checks, which would wait for nothing)
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _take_packets(self, tap: Tap, data: bytes) -> None:
        for packet in tap.reader.feed(data):
            tap.add(packet, self.ring_bytes)

    def _take_messages(self, tap: Tap, data: bytes) -> None:
        tap.say(data)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise LabError(f"the captures broke: {self._failure!r}") from self._failure

    @property
    def ended(self) -> tuple[Target, ...]:
        """What is captured no longer, because its interface went away."""
        with self._changed:
            return tuple(tap.target for tap in self.taps.values() if tap.ended)

    def restart_ended(self, targets: Iterable[Target] | None = None) -> None:
        """Capture again where an interface went away and came back, such as a tunnel device made anew.

        With `targets`, everything that is to be captured from now on, an interface that is no longer among them is
        given up, and a new one is taken up. Raises LabError where one that is wanted is away.
        """
        ended = self.ended
        if targets is None:
            self.start(ended)
            return
        with self._changed:
            for target in ended:
                del self.taps[target.name]
            missing = [target for target in targets if target.name not in self.taps]
        self.start(missing)

    def drops(self) -> dict[str, int]:
        """Packets that the kernel has dropped on each interface since its capture began. Raises LabError.

        A tcpdump that has ended, because its interface is gone, answers no more; its last count stands.
        """
        with self._changed:
            wanted = {name: tap.stats + 1 for name, tap in self.taps.items() if not tap.ended}
        self._tell(b"s")
        deadline = Deadline(STATS_SECONDS)
        with self._changed:
            while missing := [
                n for n, count in wanted.items() if self.taps[n].stats < count and not self.taps[n].ended
            ]:
                self._raise_failure()
                if deadline.passed:
                    raise LabError(f"tcpdump told no statistics within {STATS_SECONDS:.0f} s", where=", ".join(missing))
                self._changed.wait(min(0.2, deadline.left))
            return {name: tap.dropped for name, tap in self.taps.items()}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Every tcpdump rests inside, and takes nothing from what is measured; behind it they catch up, or drop."""
        self._tell(b"p")
        try:
            yield
        finally:
            self._tell(b"c")

    def _tell(self, letter: bytes) -> None:
        for process in (process for group in self._launchers.values() for process in group):
            with contextlib.suppress(BrokenPipeError):
                assert process.stdin is not None
                process.stdin.write(letter)
                process.stdin.flush()

    def window(self) -> Window:
        """Open a check's view of everything from now on."""
        return Window(self)

    def stop(self) -> None:
        """End every tcpdump and the thread."""
        self._stopping = True
        os.write(self._woken, b"w")
        self._thread.join()
        for process in (process for group in self._launchers.values() for process in group):
            with contextlib.suppress(OSError):
                assert process.stdin is not None
                process.stdin.close()
            with contextlib.suppress(Exception):
                process.wait(timeout=2)
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        for key in list(self._selector.get_map().values()):
            os.close(key.fd)
        os.close(self._woken)
        self._selector.close()


Selector = Callable[[Decoded], bool]


def since(packets: deque[Packet], began: float) -> list[Packet]:
    """The packets from a time on: the end of a ring, so that one that is full is not gone through."""
    found = list(itertools.takewhile(lambda packet: packet.time >= began, reversed(packets)))
    return found[::-1]


class Window:
    """What a check sees of the captures: everything since it was opened."""

    def __init__(self, captures: Captures) -> None:
        self.captures = captures
        self.began = time.time()
        self.looked_at: set[str] = set()
        self.decoded: dict[tuple[str, float, bytes], Decoded] = {}  # what the check was given, by interface
        self._before: Mapping[str, int] | None = None

    def baseline(self, drops: Mapping[str, int]) -> None:
        """Remember how many packets had been dropped when the window was opened."""
        self._before = drops

    def _tap(self, name: str) -> Tap:
        if name not in self.captures.taps:
            raise LabError("this interface is not captured", where=name)
        self.looked_at.add(name)
        return self.captures.taps[name]

    def _raw(self, tap: Tap, nonce: bytes) -> list[Packet]:
        return [packet for packet in tap.packets if packet.time >= self.began and nonce in packet.data]

    def _decode(self, tap: Tap, packets: Iterable[Packet]) -> list[Decoded]:
        link_type = tap.reader.link_type
        assert link_type is not None  # it listens
        taken = []
        for p in packets:
            taken.append(decode(p.data, link_type, self.captures.tunnel, time=p.time, length=p.length))
            if len(self.decoded) < MOST_KEPT:
                self.decoded[tap.target.name, p.time, p.data] = taken[-1]
        return taken

    def packets(self, name: str, nonce: Nonce, *, at_least: int = 1, seconds: float = SEEN_SECONDS) -> list[Decoded]:
        """The packets with that nonce on an interface, once there are `at_least` so many or none came for `seconds`.

        Fewer than that are an answer: the check says what is wrong with it. Raises LabError where it cannot look.
        """
        return self.select(name, nonce, lambda _: True, at_least=at_least, seconds=seconds)

    def select(
        self, name: str, nonce: Nonce, selector: Selector, *, at_least: int = 1, seconds: float = SEEN_SECONDS
    ) -> list[Decoded]:
        """Those of the packets with that nonce that a selector takes, once there are `at_least` so many; see above."""
        tap, deadline = self._tap(name), Deadline(seconds)
        known: dict[int, Packet] = {}
        taken: list[Decoded] = []
        while True:
            over = deadline.passed
            with self.captures._changed:
                self.captures._raise_failure()
                found = [packet for packet in self._raw(tap, nonce.value) if id(packet) not in known]
                if not (found or over or tap.ended):
                    self.captures._changed.wait(min(0.2, deadline.left))
                    continue
            if found:  # each is decoded once: a burst of many comes in many pieces on a busy machine
                known.update((id(packet), packet) for packet in found)
                taken += [packet for packet in self._decode(tap, found) if selector(packet)]
                deadline = Deadline(seconds)
            if len(taken) >= at_least or not found:
                return taken

    def everything(self, name: str, contains: bytes) -> list[Decoded]:
        """The packets of the window with these bytes in them: for what can carry no nonce, such as ARP.

        It does not wait: look for a nonce sent later on the same interface first.
        """
        tap = self._tap(name)
        with self.captures._changed:
            found = self._raw(tap, contains)
        return self._decode(tap, found)

    def sightings(self, marks: Collection[bytes]) -> dict[str, list[Packet]]:
        """The packets of the window with any of these bytes in them, by interface, in the order of the captures."""
        with self.captures._changed:
            return {
                name: found
                for name, tap in self.captures.taps.items()
                if (found := [p for p in since(tap.packets, self.began) if any(mark in p.data for mark in marks)])
            }

    def absent(self, name: str, nonce: Nonce, *, control: Nonce) -> None:
        """Assert that no packet with that nonce was seen, given that one with the control's nonce was.

        Send the control last, on a path through the same interface: a capture keeps the order, so once the control is
        there everything before it is. Raises Inconclusive without the control, AssertionError where `nonce` was seen.
        """
        if not self.packets(name, control):
            raise Inconclusive(f"{name}: the control packet was not captured, so that nothing seen proves nothing")
        seen = self.packets(name, nonce, at_least=0, seconds=0)
        assert not seen, f"{name}: {len(seen)} packets that must not be there, the first: {seen[0]}"

    def close(self) -> None:
        """Raise Inconclusive where the kernel dropped packets, during the window, on an interface it looked at."""
        if not self.looked_at or self._before is None:
            return
        lost = {name: count - self._before.get(name, 0) for name, count in self.captures.drops().items()}
        bad = {name: count for name, count in lost.items() if count > 0 and name in self.looked_at}
        if bad:
            raise Inconclusive(f"the kernel dropped packets of the capture: {bad}")

    def pcaps(self) -> dict[str, bytes]:
        """The window as pcap files by interface, for the report of a failed check."""
        with self.captures._changed:
            return {
                name: to_pcap((p for p in tap.packets if p.time >= self.began), tap.reader.link_type)
                for name, tap in self.captures.taps.items()
                if tap.reader.link_type is not None
            }
