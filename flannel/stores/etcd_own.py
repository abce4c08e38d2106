"""Which of etcd's keys is this node's, and what is kept of it."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from flannel.lease import Lease, LeaseAttrs
from flannel.stores.allocate import fits, fits6, free_subnets, free_subnets6
from flannel.stores.base import StoreError
from flannel.stores.etcd_client import KeyValue

if TYPE_CHECKING:
    from flannel.netconf import NetConf

#: What in a backend's data belongs to one node alone.
_IDENTITIES = ("VtepMAC", "PublicKey")


class Entry(NamedTuple):
    """A key below `subnets/` that names a subnet; `attrs` is None where its value cannot be read."""

    key: KeyValue
    subnet: IPv4Network
    subnet6: IPv6Network | None
    attrs: LeaseAttrs | None


class Own:
    """The own lease and what etcd knows of it; `due` is the monotonic time of the next renewal, None for never."""

    __slots__ = ("create_revision", "due", "etcd_lease", "generation", "key", "lease", "mod_revision", "published")

    def __init__(
        self, key: bytes, lease: Lease, etcd_lease: int, create_revision: int, mod_revision: int, due: float | None
    ) -> None:
        self.key, self.lease, self.etcd_lease = key, lease, etcd_lease
        self.create_revision, self.mod_revision, self.due = create_revision, mod_revision, due
        self.published = True
        self.generation = 0  # counts what was acquired


class Proof:
    """The id of the etcd lease that this node's key was last written with, in a file beside subnet.env.

    A node that wrote a key with an etcd lease of its own is the only one that knows this id, and whoever takes the key
    over writes it with another one: so a node whose address has changed knows its own lease again. Without a path, or
    where the file cannot be read or written, nothing is proven.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def read(self) -> int:
        """The id that an earlier run kept; 0 for none."""
        try:
            with open(self._path, encoding="ascii", errors="replace") as file:
                return int(file.read(), 16)
        except (OSError, ValueError):
            return 0

    def keep(self, etcd_lease: int) -> str:
        """Keep an id for the next run; return what went wrong, "" for nothing."""
        if not self._path:
            return ""
        aside = self._path + ".new"
        try:
            os.makedirs(os.path.dirname(self._path) or ".", mode=0o755, exist_ok=True)
            with open(aside, "w", encoding="ascii", opener=_only_for_us) as file:
                file.write(f"{etcd_lease:x}\n")
            os.rename(aside, self._path)
        except OSError as error:
            return f"{self._path}: {error.strerror}"
        return ""


def _only_for_us(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def own_entries(
    entries: Sequence[Entry], attrs: LeaseAttrs, previous: IPv4Network | None, proof: int
) -> list[Entry]:  # fmt: skip
    """The entries that are this node's: those of its PublicIP, and the one of subnet.env (`previous`) that this node
    can be shown to have written, whatever address it had then. The best one comes first: pods live in the subnet of
    subnet.env; else the oldest counts."""

    def ours(entry: Entry) -> bool:
        if entry.attrs is None:
            return False
        return entry.attrs.public_ip == attrs.public_ip or (
            entry.subnet == previous and written_by_us(entry, attrs, proof)
        )

    return sorted(filter(ours, entries), key=lambda entry: (entry.subnet != previous, entry.key.create_revision))


def written_by_us(entry: Entry, attrs: LeaseAttrs, proof: int) -> bool:
    """Whether a key was written by this node: with the etcd lease that it remembers, or with its own tunnel's MAC
    address or public key."""
    if proof and entry.key.lease == proof:
        return True
    identity = _identity(attrs)
    return identity is not None and entry.attrs is not None and _identity(entry.attrs) == identity


def _identity(attrs: LeaseAttrs) -> tuple[str, str, str] | None:
    data = attrs.backend_data
    for key in _IDENTITIES if isinstance(data, dict) else ():
        if isinstance(data.get(key), str) and data[key]:
            return attrs.backend_type, key, data[key]
    return None


def choose_subnets(
    conf: NetConf, previous: IPv4Network | None, previous6: IPv6Network | None, entries: Sequence[Entry]
) -> tuple[IPv4Network, IPv6Network | None]:
    """The subnets of a new lease: the previous ones where they are free, else one of the first free ones, by chance.

    Raises StoreError where none is free.
    """
    network, network6 = conf.network, conf.ipv6_network
    assert isinstance(network, IPv4Network)  # all else is refused
    taken = [one.subnet for one in entries if one.subnet.subnet_of(network) and one.subnet != network]
    subnet = previous
    if previous is None or not fits(conf._replace(ipv6_network=None), previous) or any(map(previous.overlaps, taken)):
        subnet = _any_of(free_subnets(conf, taken), conf.subnet_min, conf.subnet_max)
    assert subnet is not None
    if network6 is None:
        return subnet, None
    taken6 = [one.subnet6 for one in entries if one.subnet6 is not None and one.subnet6.subnet_of(network6)]
    subnet6 = previous6
    if previous6 is None or not fits6(conf, previous6) or any(map(previous6.overlaps, taken6)):
        subnet6 = _any_of(free_subnets6(conf, taken6), conf.ipv6_subnet_min, conf.ipv6_subnet_max)
    return subnet, subnet6


_Subnet = TypeVar("_Subnet", IPv4Network, IPv6Network)


def _any_of(free: list[_Subnet], low: object, high: object) -> _Subnet:
    if not free:
        raise StoreError(f"out of subnets: all of {low} to {high} are leased")
    return random.choice(free)  # noqa: S311 - it spreads nodes, and guards nothing
