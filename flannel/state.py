"""What an earlier run made, kept beside subnet.env: a journal of lines, so that a change costs one line.

Recorded are the routes that do not go out of our own tunnel device (nothing in the kernel tells them from an
operator's), the tunnel devices and their addresses. A route is recorded before it is made, so a crash in between leaves
a record too many, never one too few. Lines that cannot be read are skipped: what is not recorded is not ours.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import NamedTuple

from flannel.lease import LeaseAttrs


class OffDevice(NamedTuple):
    """A route through the underlay: destination, gateway, and the interface's name (its index does not outlive it)."""

    subnet: IPv4Network | IPv6Network
    gateway: IPv4Address | IPv6Address
    interface: str


class Recorded:
    """The journal. Without a path, or where it cannot be written, it is kept in memory alone."""

    def __init__(self, path: str = "") -> None:
        self._path = path
        self._file: int | None = None
        self.problem = ""
        self.routes: set[OffDevice] = set()
        self.devices: dict[str, bytes] = {}
        #: What the store remembers of this node, where it does; it may have to ask, and raise StoreError.
        self.published: Callable[[], LeaseAttrs | None] = lambda: None
        self._load()

    def _load(self) -> None:
        try:
            with open(self._path, encoding="ascii", errors="replace") as file:
                lines = file.read().splitlines()
        except OSError:
            return
        for line in lines:
            words = line.split(" ")
            try:
                self._read(words)
            except (ValueError, IndexError):
                continue

    def _read(self, words: list[str]) -> None:
        if words[0] == "device":
            if len(words) > 2:
                self.devices[words[1]] = bytes.fromhex(words[2])
            else:  # the word alone: what was recorded before is not there any more
                self.devices.clear()
        elif words[0] in ("+", "-"):
            route = OffDevice(ip_network(words[1]), ip_address(words[2]), words[3])
            (self.routes.add if words[0] == "+" else self.routes.discard)(route)

    def open(self) -> None:
        """Start a compacted journal and keep it open for appending. A failure is kept in `problem`, not raised."""
        if not self._path:
            return
        temporary = self._path + ".new"
        try:
            os.makedirs(os.path.dirname(self._path) or ".", mode=0o755, exist_ok=True)
            self._file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
            os.write(self._file, "".join([self._device_lines(), *(_line("+", one) for one in self.routes)]).encode())
            os.rename(temporary, self._path)
        except OSError as error:
            self._failed(error)

    def _device_lines(self) -> str:
        return "".join(f"device {name} {mac.hex()}\n" for name, mac in self.devices.items())

    def _append(self, text: str) -> None:
        if self._file is None or not text:
            return
        try:
            os.write(self._file, text.encode())
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        self.problem = f"{self._path}: {error.strerror}"
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def note_device(self, name: str, mac: bytes) -> None:
        """Record a tunnel device of ours and its address."""
        if self.devices.get(name) != mac:
            self.devices[name] = mac
            self._append(f"device {name} {mac.hex()}\n")

    def keep_devices(self, names: Collection[str]) -> list[str]:
        """Forget all devices but these; return those that were forgotten."""
        gone = [name for name in self.devices if name not in names]
        for name in gone:
            del self.devices[name]
        if gone:
            self._append("device\n" + self._device_lines())
        return gone

    def add(self, routes: set[OffDevice]) -> None:
        """Record routes that are about to be made."""
        new = routes - self.routes
        self.routes |= new
        self._append("".join(_line("+", route) for route in new))

    def remove(self, routes: set[OffDevice]) -> None:
        """Record that routes are gone."""
        gone = routes & self.routes
        self.routes -= gone
        self._append("".join(_line("-", route) for route in gone))


def _line(sign: str, route: OffDevice) -> str:
    return f"{sign} {route.subnet} {route.gateway} {route.interface}\n"
