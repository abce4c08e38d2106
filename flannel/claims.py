"""What each lease may have: nothing that is another's, or this node's own."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Address, IPv6Address

from flannel import log
from flannel.backends.base import NOTHING, Backend, Facts, Ignored, Wants
from flannel.holders import Ground, Holders, keys_of, span
from flannel.known import KnownLeases
from flannel.lease import Lease, Network


class Claims:
    """What the leases want of the kernel and have there; where two contest it, the first one has it.

    `own` are this node's subnets, `no_peers` addresses that no peer can have, and why; whether there is an IPv6Network
    says `dual`. What another lease may have from now on becomes dirty.
    """

    def __init__(
        self,
        backend: Backend,
        known: KnownLeases,
        own: tuple[Network, ...],
        no_peers: Mapping[IPv4Address | IPv6Address, str],
        *,
        dual: bool,
    ) -> None:
        self._backend = backend
        self._known = known
        self._own_subnets = own
        self._no_peers = no_peers
        self._dual = dual
        self._applied: dict[Network, Wants] = {}
        self._ignored: dict[Network, str] = {}
        self._ground = Ground()
        self.holders = Holders()

    def had(self, subnet: Network | None) -> Wants:
        """What was wanted for a lease when it was last looked at."""
        return self._applied.get(subnet, NOTHING) if subnet is not None else NOTHING

    def begin_anew(self) -> list[Network]:
        """Forget who has what, and return the leases in the order in which they have a right to it."""
        order = self._incumbents_first()
        self._applied.clear()
        self.holders.clear()
        self._ground.clear()
        return order

    def wants(self, subnet: Network, facts: Facts) -> Wants:
        """What a lease wants, nothing where it is ignored: then its log line says why."""
        lease = self._known.leases.get(subnet)
        if lease is None:
            self._ignored.pop(subnet, None)
            self._known.dirty |= self._ground.give_back(subnet)
            return NOTHING
        try:
            ground = self._refuse(lease)
            wanted = self._backend.wants(lease, facts)
            self._refuse_taken(subnet, wanted)
        except Exception as error:  # noqa: BLE001 - what nobody foresaw of one lease must not cost the others
            reason = str(error) if isinstance(error, Ignored) else log.place_of(error)
            text = f"ignoring the lease of {subnet} from {lease.attrs.public_ip}: {reason}"
            if self._ignored.get(subnet) != text:
                log.warning(text)
            self._ignored[subnet] = text
            self._known.dirty |= self._ground.give_back(subnet)
            return NOTHING
        self._ignored.pop(subnet, None)
        self._known.dirty |= self._ground.take(subnet, ground)
        return wanted

    def _incumbents_first(self) -> list[Network]:
        """The leases in the order in which they have a right to what two of them contest."""
        held = {*self.holders.contested(), *self._ground.contested()}
        if not held:
            return list(self._known.leases)
        return sorted(self._known.leases, key=lambda subnet: subnet not in held)

    def _refuse(self, lease: Lease) -> tuple[Network, ...]:
        """Refuse what no backend may use, whatever the store let through; return its subnets. Raises Ignored."""
        for address in (lease.attrs.public_ip, lease.attrs.public_ip6):
            if address is not None and address in self._no_peers:
                raise Ignored(f"its address {address} is {self._no_peers[address]}")
        subnets: tuple[Network, ...] = (lease.subnet,)
        if lease.subnet6 is not None and self._dual:
            subnets += (lease.subnet6,)
        for one in subnets:
            for own in self._own_subnets:
                if _overlap(one, own):
                    raise Ignored(f"its subnet {one} overlaps this node's own, {own}")
        for one in subnets:
            others = self._ground.in_the_way(one, lease.subnet)
            if others:
                self._ground.wait_for(others, lease.subnet)
                raise Ignored(f"its subnet {one} overlaps that of the lease of {others[-1]}, which another node has")
        return subnets

    def _refuse_taken(self, subnet: Network, wanted: Wants) -> None:
        """Refuse what would lead another lease's packets elsewhere. Raises Ignored."""
        for entry in wanted.fdb:
            holder = self.holders.of(entry.mac)
            # A node may have two subnets: then the entry is the same.
            if holder not in (None, subnet) and entry not in self._applied.get(holder, NOTHING).fdb:
                self.holders.wait_for(entry.mac, subnet)
                raise Ignored(f"its MAC address {entry.mac.hex(':')} is that of {holder}'s node")

    def usable(self) -> dict[Network, Lease]:
        """The leases that are not ignored."""
        leases, ignored = self._known.leases, self._ignored
        return {subnet: lease for subnet, lease in leases.items() if subnet not in ignored} if ignored else leases

    def note(self, subnet: Network, wanted: Wants) -> None:
        """Note what a lease has from now on."""
        before = self._applied.pop(subnet, NOTHING)
        now = keys_of(subnet, wanted) if wanted != NOTHING else set()
        if before != NOTHING:
            for key in keys_of(subnet, before) - now:
                self._known.dirty |= self.holders.give_back(key, subnet)
        if not now:
            return
        self._applied[subnet] = wanted
        for key in now:
            self.holders.take(key, subnet)


def _overlap(one: Network, other: Network) -> bool:
    """As ipaddress says, but in numbers: there may be thousands of leases."""
    if one.version != other.version:
        return False
    (first, last), (others_first, others_last) = span(one), span(other)
    return first <= others_last and others_first <= last
