"""ipsec: ESP between the nodes, by policies of our making and keys that strongSwan's charon agrees on."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

from flannel import log
from flannel.backends.base import NOTHING, Backend, BackendError, Facts, Ignored, Wants, inner_mtu
from flannel.charon import Charon, connection, find_charon
from flannel.interface import External
from flannel.kernel import xfrm
from flannel.kernel.netlink import Netlink
from flannel.lease import Lease, LeaseAttrs, Network
from flannel.netconf import NetConf, NetConfError, backend_bool, unread_keys
from flannel.state import Recorded

#: What ESP in tunnel mode takes, in bytes, and what UDP around it takes in addition.
OVERHEAD, ENCAP_OVERHEAD = 77, 8
PROPOSAL, IKE_PROPOSAL = "aes128gcm16-sha256-prfsha256-ecp256", "aes256-sha256-modp4096"
_SHORTEST_PSK = 96
#: Under this name the policies are recorded like a device, so that another backend takes them away.
RECORD = "xfrm-policies"


class IpsecBackend(Backend):
    """See flannel-behaviour.md, section 3.6. Policies and associations outlive the daemon; charon does not."""

    name = "ipsec"

    def __init__(self, conf: NetConf, external: External) -> None:
        psk = conf.backend.get("psk")
        if not isinstance(psk, str) or len(psk) < _SHORTEST_PSK:
            raise NetConfError(f"Backend.PSK: password is too short, it must have {_SHORTEST_PSK} characters or more")
        self._psk = psk
        self._encap = backend_bool(conf, "UDPEncap")
        self._proposal = conf.backend.get("espproposal", PROPOSAL)
        if not isinstance(self._proposal, str) or not self._proposal:
            raise NetConfError(f"Backend.ESPProposal is {self._proposal!r}, not a proposal such as {PROPOSAL}")
        self.mtu = inner_mtu(external.mtu, OVERHEAD + (ENCAP_OVERHEAD if self._encap else 0))
        for note in unread_keys(conf, ("PSK", "UDPEncap", "ESPProposal")):
            log.warning(note)
        self._external = external
        self._recorded = Recorded()
        self._charon: Charon | None = None
        self._subnet: Network | None = None
        self._netlink: Netlink | None = None
        self._monitor: xfrm.Monitor | None = None
        self._unsure = True
        self._there: dict[xfrm.Packets, xfrm.Policy] = {}

    @property
    def devices(self) -> tuple[str, ...]:
        """The policies."""
        return (RECORD,)

    def prepare(self, netlink: Netlink, recorded: Recorded) -> LeaseAttrs:
        """Nothing is needed before the lease."""
        self._recorded = recorded
        return self.attrs()

    def attrs(self) -> LeaseAttrs:
        """What is published with the lease."""
        return LeaseAttrs(self._external.public, self.name)

    def start(self, netlink: Netlink, lease: Lease) -> None:
        """Start charon."""
        self._subnet = lease.subnet
        try:
            self._netlink = Netlink(xfrm.NETLINK_XFRM)
            self._monitor = xfrm.Monitor()
            xfrm.dump_policies(self._netlink)
        except OSError as error:
            raise BackendError(f"this kernel has no IPsec policies: {error.strerror}") from None
        self._recorded.note_device(RECORD, b"")
        self._charon = Charon(find_charon(), str(self._external.public), self._psk)
        self._charon.start()

    def device(self, netlink: Netlink, external: External) -> None:
        """There is no device; but the policies are looked up again."""
        self._unsure = True

    def wants(self, lease: Lease, facts: Facts) -> Wants:
        """No routes: policies catch the packets."""
        if lease.attrs.backend_type != self.name:
            raise Ignored(f"its backend is {lease.attrs.backend_type or 'udp or none'!r}, not ipsec")
        return NOTHING

    def watched(self) -> int | None:
        """What the kernel tells of policies and associations."""
        return None if self._monitor is None else self._monitor.fileno()

    def noticed(self) -> bool:
        """Whether a policy of ours is gone or another one; charon is told of associations that are."""
        if self._monitor is None:
            return False
        changes, gone = self._monitor.read()
        if gone and self._charon is not None:
            self._charon.look()
        return any(
            self._there.get(change.packets) not in (None, change.policy) if change.packets else bool(self._there)
            for change in changes
        )

    def update(self, leases: dict[Network, Lease], may_remove: bool) -> None:
        """Make policies and connections those of the leases."""
        if self._netlink is None or self._subnet is None or self._charon is None:
            return
        here, own = self._external.public, self._subnet
        assert isinstance(here, IPv4Address)  # it is refused with IPv6
        assert isinstance(own, IPv4Network)
        peers = {
            subnet: lease.attrs.public_ip
            for subnet, lease in leases.items()
            if lease.attrs.backend_type == self.name
            and isinstance(subnet, IPv4Network)
            and isinstance(lease.attrs.public_ip, IPv4Address)
        }
        wanted: dict[xfrm.Packets, xfrm.Policy] = {}
        for subnet, peer in peers.items():
            for policy in xfrm.policies_of(own, here, subnet, peer):
                wanted[policy.packets] = policy
        there = self._there
        if self._unsure:
            there = {policy.packets: policy for policy in xfrm.dump_policies(self._netlink)}
        missing = [policy for packets, policy in wanted.items() if there.get(packets) != policy]
        gone = [
            policy for packets, policy in there.items()
            if packets not in wanted and (may_remove or packets in self._there)
        ]  # fmt: skip
        failures = self._netlink.batch([*map(xfrm.set_policy, missing), *map(xfrm.delete_policy, gone)])
        for failure in failures:
            log.error(f"cannot change an IPsec policy: {failure}")
        self._unsure = bool(failures)
        self._there = wanted
        proposals = (IKE_PROPOSAL, self._proposal)
        self._charon.want(dict(
            connection(here, str(own), peer, str(subnet), proposals=proposals, encap=self._encap)
            for subnet, peer in peers.items()
        ))  # fmt: skip

    def stop(self) -> None:
        """Stop charon; policies and associations stay."""
        if self._charon is not None:
            self._charon.stop()


def remove_policies() -> None:
    """Take flannel's policies and associations out of the kernel, which another backend's packets know nothing of."""
    netlink = Netlink(xfrm.NETLINK_XFRM)
    changes = [xfrm.delete_policy(policy) for policy in xfrm.dump_policies(netlink)]
    changes += [xfrm.delete_association(one) for one in xfrm.dump_associations(netlink)]
    for failure in netlink.batch(changes):
        log.error(f"cannot remove what ipsec left: {failure}")
    netlink.close()
