"""What `ip xfrm` says of a node's IPsec policies and associations, as typed values."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from testbed.labs.base import Place


@dataclass(frozen=True, slots=True)
class Policy:
    """Packets from `source` to `target` have to be in ESP from `near` to `far`.

    `optional` policies let them pass in clear as long as there is no association.
    """

    direction: str  # out, in, fwd
    source: IPv4Network
    target: IPv4Network
    near: IPv4Address
    far: IPv4Address
    protocol: str
    reqid: int
    mode: str
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Association:
    """One direction between two nodes. `encap` tells whether ESP travels in UDP."""

    near: IPv4Address
    far: IPv4Address
    protocol: str
    spi: int
    reqid: int
    mode: str
    encap: bool


_POLICY = re.compile(
    r"^src (?P<source>\S+) dst (?P<target>\S+)[^\n]*\n\s+dir (?P<direction>\w+)[^\n]*\n"
    r"(?:\s+(?!tmpl)[^\n]*\n)*?"
    r"\s+tmpl src (?P<near>\S+) dst (?P<far>\S+)\s*\n"
    r"\s+proto (?P<protocol>\w+)(?: spi \S+)? reqid (?P<reqid>\d+)(?:\(\S+\))? mode (?P<mode>\w+)"
    r"(?P<rest>[^\n]*(?:\n\t\t[^\n]*)*)",
    re.MULTILINE,
)
_STATE = re.compile(
    r"^src (?P<near>\S+) dst (?P<far>\S+)[^\n]*\n"
    r"\s+proto (?P<protocol>\w+) spi (?P<spi>0x[0-9a-f]+)(?:\(\d+\))? reqid (?P<reqid>\d+)(?:\(\S+\))?"
    r" mode (?P<mode>\w+)(?P<rest>(?:[^\n]*\n(?=\s))*[^\n]*)",
    re.MULTILINE,
)


def read_policies(place: Place) -> tuple[Policy, ...]:
    """The policies about whole subnets; sockets' own are left out."""
    return parse_policies(place.run(["ip", "xfrm", "policy"]).stdout)


def read_associations(place: Place) -> tuple[Association, ...]:
    """The associations that have keys; one that is only being asked for has SPI 0 and is left out."""
    return parse_associations(place.run(["ip", "xfrm", "state"]).stdout)


def parse_policies(text: str) -> tuple[Policy, ...]:
    """Read what `ip xfrm policy` prints."""
    return tuple(
        Policy(
            found["direction"], IPv4Network(found["source"]), IPv4Network(found["target"]), IPv4Address(found["near"]),
            IPv4Address(found["far"]), found["protocol"], int(found["reqid"]), found["mode"],
            "level use" in found["rest"],
        )
        for found in _POLICY.finditer(text)
    )  # fmt: skip


def parse_associations(text: str) -> tuple[Association, ...]:
    """Read what `ip xfrm state` prints."""
    return tuple(
        Association(
            IPv4Address(found["near"]), IPv4Address(found["far"]), found["protocol"], int(found["spi"], 16),
            int(found["reqid"]), found["mode"], "espinudp" in found["rest"],
        )
        for found in _STATE.finditer(text)
        if int(found["spi"], 16)
    )  # fmt: skip
