"""What `wg show` says of a node's device, as typed values."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from testbed.errors import LabError
from testbed.labs.base import Place


@dataclass(frozen=True, slots=True)
class WireguardDevice:
    """A device's own side."""

    public_key: str
    port: int


@dataclass(frozen=True, slots=True)
class WireguardPeer:
    """A peer of it. `endpoint` is ADDRESS:PORT, "" for none; `handshake_age` is in seconds, None for never.

    `psk` is the key that both share beforehand, "" for none; `keepalive` is in seconds, 0 for never.
    """

    key: str
    endpoint: str
    allowed: tuple[str, ...]
    handshake_age: float | None
    psk: str = field(default="", repr=False)
    keepalive: int = 0


def read_wireguard(place: Place, device: str) -> tuple[WireguardDevice, tuple[WireguardPeer, ...]]:
    """A device and its peers. Raises LabError where `wg` shows none of that name."""
    return parse_dump(place.run(["wg", "show", device, "dump"]).stdout, place.name, time.time())


def parse_dump(text: str, where: str, now: float) -> tuple[WireguardDevice, tuple[WireguardPeer, ...]]:
    """Read what `wg show DEVICE dump` prints, as of `now` (Unix time). Raises LabError for another form."""
    try:
        first, *rest = [line.split("\t") for line in text.splitlines()]
        _, public_key, port, _ = first
        peers = []
        for key, psk, endpoint, allowed, handshake, _, _, keepalive in rest:
            networks = () if allowed == "(none)" else tuple(sorted(allowed.split(",")))
            age = now - int(handshake) if int(handshake) else None
            where_to, shared = ("" if text == "(none)" else text for text in (endpoint, psk))
            seconds = 0 if keepalive == "off" else int(keepalive)
            peers.append(WireguardPeer(key, where_to, networks, age, shared, seconds))
        return WireguardDevice(public_key, int(port)), tuple(peers)
    except ValueError as error:
        raise LabError(f"wg printed another form: {text[:200]!r}", where=where) from error
