"""ipsec: ESP between the nodes, by policies of our making and keys that strongSwan's charon agrees on."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from ipaddress import IPv4Network
from typing import Any

from flannel import log
from flannel.backends.base import NOTHING, Backend, BackendError, Facts, Ignored, Wants
from flannel.interface import External
from flannel.kernel import xfrm
from flannel.kernel.netlink import Netlink
from flannel.lease import Lease, LeaseAttrs
from flannel.netconf import NetConf, NetConfError, backend_bool, unread_keys
from flannel.process import find
from flannel.state import Recorded
from flannel.vici import Vici, ViciError

#: What ESP in tunnel mode takes, in bytes, and what UDP around it takes in addition.
OVERHEAD, ENCAP_OVERHEAD = 77, 8
PROPOSAL, IKE_PROPOSAL = "aes128gcm16-sha256-prfsha256-ecp256", "aes256-sha256-modp4096"
_SHORTEST_PSK = 96
_SMALLEST_MTU = 68
_CHARON = ("charon", "/usr/lib/strongswan/charon", "/usr/lib/ipsec/charon", "/usr/libexec/strongswan/charon",
           "/usr/libexec/ipsec/charon", "charon-systemd")  # fmt: skip
_FOLDER = "/run/flannel"
_RETRY = 1.0
#: Under this name the policies are recorded like a device, so that another backend takes them away.
RECORD = "xfrm-policies"


class IpsecBackend(Backend):
    """See flannel-behaviour.md, section 3.6. Policies outlive the daemon; charon does not."""

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
        self.mtu = external.mtu - OVERHEAD - (ENCAP_OVERHEAD if self._encap else 0)
        if self.mtu < _SMALLEST_MTU:
            raise BackendError(f"an MTU of {external.mtu} leaves {self.mtu} bytes inside the tunnel: too few")
        for note in unread_keys(conf, ("PSK", "UDPEncap", "ESPProposal")):
            log.warning(note)
        self._external = external
        self._recorded = Recorded()
        self._charon: Charon | None = None
        self._subnet: IPv4Network | None = None
        self._netlink: Netlink | None = None
        self._unsure = True
        self._there: set[xfrm.Policy] = set()

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
            xfrm.dump_policies(self._netlink)
        except OSError as error:
            raise BackendError(f"this kernel has no IPsec policies: {error.strerror}") from None
        program = next((path for name in _CHARON if (path := find(name))), "")
        if not program:
            raise BackendError("charon is not installed (Debian: strongswan-charon, libstrongswan-standard-plugins)")
        self._recorded.note_device(RECORD, b"")
        self._charon = Charon(program, str(self._external.public), self._psk)
        self._charon.start()

    def device(self, netlink: Netlink, external: External) -> None:
        """There is no device; but the policies are looked up again."""
        self._unsure = True

    def wants(self, lease: Lease, facts: Facts) -> Wants:
        """No routes: policies catch the packets."""
        if lease.attrs.backend_type != self.name:
            raise Ignored(f"its backend is {lease.attrs.backend_type or 'udp or none'!r}, not ipsec")
        return NOTHING

    def update(self, leases: dict[IPv4Network, Lease], may_remove: bool) -> None:
        """Make policies and connections those of the leases."""
        if self._netlink is None or self._subnet is None or self._charon is None:
            return
        peers = {subnet: lease.attrs for subnet, lease in leases.items() if lease.attrs.backend_type == self.name}
        wanted: dict[xfrm.Policy, None] = {}
        for subnet, attrs in peers.items():
            for policy in xfrm.policies_of(self._subnet, self._external.public, subnet, attrs.public_ip):
                wanted[policy] = None
        there = set(xfrm.dump_policies(self._netlink)) if self._unsure else self._there
        missing = [policy for policy in wanted if policy not in there]
        # A policy that another one replaces is gone already.
        kept = {_packets(policy) for policy in wanted}
        gone = [
            policy for policy in there
            if _packets(policy) not in kept and (may_remove or policy in self._there)
        ]  # fmt: skip
        failures = self._netlink.batch([*map(xfrm.set_policy, missing), *map(xfrm.delete_policy, gone)])
        for failure in failures:
            log.error(f"cannot change an IPsec policy: {failure}")
        self._unsure = bool(failures)
        self._there = set(wanted)
        self._charon.want({
            name: connection
            for subnet, attrs in peers.items()
            for name, connection in (self._connection(subnet, attrs),)
        })  # fmt: skip

    def _connection(self, subnet: IPv4Network, attrs: LeaseAttrs) -> tuple[str, dict[str, Any]]:
        here, there, own = str(self._external.public), str(attrs.public_ip), str(self._subnet)
        child = {
            "local_ts": [own], "remote_ts": [str(subnet)], "esp_proposals": [self._proposal],
            "start_action": "start", "close_action": "trap", "dpd_action": "restart", "mode": "tunnel",
            "reqid": str(xfrm.REQID), "rekey_time": "1h", "policies": "no",
        }  # fmt: skip
        connection = {
            "local_addrs": [here], "remote_addrs": [there], "proposals": [IKE_PROPOSAL], "version": "2",
            "keyingtries": "0", "encap": "yes" if self._encap else "no",
            "local": {"auth": "psk", "id": here}, "remote": {"auth": "psk", "id": there},
            "children": {f"{own}-{subnet}": child},
        }  # fmt: skip
        return f"{here}-{own}-{subnet}-{there}", connection

    def stop(self) -> None:
        """Stop charon; policies stay."""
        if self._charon is not None:
            self._charon.stop()


def _packets(policy: xfrm.Policy) -> tuple[int, IPv4Network, IPv4Network]:
    """Which packets a policy is for: the kernel has one for each."""
    return policy.direction, policy.source, policy.target


def remove_policies() -> None:
    """Take flannel's policies out of the kernel: an earlier run's, of which another backend's packets know nothing."""
    netlink = Netlink(xfrm.NETLINK_XFRM)
    for failure in netlink.batch([xfrm.delete_policy(policy) for policy in xfrm.dump_policies(netlink)]):
        log.error(f"cannot remove an IPsec policy: {failure}")
    netlink.close()


class Charon:
    """charon as a child, started again where it ends, and told of keys and connections on a thread of its own."""

    def __init__(self, program: str, here: str, psk: str, folder: str = _FOLDER) -> None:
        self._program, self._here, self._psk = program, here, psk
        self._folder, self._socket = folder, f"{folder}/charon.vici"
        self._changed = threading.Condition()
        self._wanted: dict[str, dict[str, Any]] = {}
        self._told: dict[str, dict[str, Any]] = {}
        self._process = 0
        self._stopping = False
        self._complaint = ""

    def start(self) -> None:
        """Start it. Raises BackendError."""
        self._spawn()
        threading.Thread(target=self._work, name="charon", daemon=True).start()

    def want(self, connections: Mapping[str, dict[str, Any]]) -> None:
        """Have these connections, and no others, from now on."""
        with self._changed:
            self._wanted = dict(connections)
            self._changed.notify_all()

    def stop(self) -> None:
        """End it, and wait for its end."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._process:
            os.kill(self._process, signal.SIGTERM)
            deadline = time.monotonic() + 5
            while self._runs() and time.monotonic() < deadline:
                time.sleep(0.02)
            log.info("Stopped charon daemon")

    def _spawn(self) -> None:
        settings = f"{self._folder}/strongswan.conf"
        plugins = "random nonce openssl aes sha1 sha2 hmac kdf gmp kernel-netlink socket-default vici"
        # Not all that is installed: one plugin does ESP without the kernel, another lets local networks past it.
        daemon = f"install_routes = no\n load = {plugins}\n plugins {{ vici {{ socket = unix://{self._socket} }} }}"
        try:
            os.makedirs(self._folder, mode=0o755, exist_ok=True)
            with open(settings, "w", encoding="ascii") as file:
                file.write(f"charon {{\n {daemon}\n}}\ncharon-systemd {{\n {daemon}\n}}\n")
            tied = find("setpriv")
            argv = [tied, "--pdeathsig", "TERM", "--", self._program] if tied else [self._program]
            environment = {**os.environ, "STRONGSWAN_CONF": settings}
            self._process = os.posix_spawn(
                argv[0], argv, environment, setsigdef=[signal.SIGINT, signal.SIGTERM], setpgroup=0
            )  # fmt: skip
        except OSError as error:
            raise BackendError(f"cannot start {self._program}: {error.strerror}") from None
        self._told = {}
        log.info(f"Started {self._program}")

    def _runs(self) -> bool:
        if not self._process:
            return False
        ended, _ = os.waitpid(self._process, os.WNOHANG)
        if ended:
            self._process = 0
        return not ended

    def _work(self) -> None:
        while True:
            with self._changed:
                if self._wanted == self._told:
                    self._changed.wait(_RETRY)
                if self._stopping:
                    return
                wanted = self._wanted
            try:
                if not self._runs():
                    log.error("charon has ended; starting it again")
                    self._spawn()
                if wanted != self._told:
                    self._tell(wanted)
                self._complaint = ""
            except (ViciError, BackendError) as error:
                if str(error) != self._complaint:
                    log.error(f"ipsec: {error}; trying again")
                self._complaint = str(error)
                time.sleep(_RETRY)

    def _tell(self, wanted: Mapping[str, dict[str, Any]]) -> None:
        vici = Vici(self._socket)
        try:
            if not self._told:
                vici.ask("load-shared", {"type": "IKE", "data": self._psk, "owners": [self._here]})
            for name in [name for name in self._told if name not in wanted]:
                vici.ask("unload-conn", {"name": name})
                try:
                    vici.ask("terminate", {"ike": name, "force": "yes", "timeout": "-1"})
                except ViciError as error:
                    log.debug(f"ipsec: {name} had no association to end: {error}")
                del self._told[name]
            for name, connection in wanted.items():
                if self._told.get(name) == connection:
                    continue
                peer = connection["remote_addrs"][0]
                vici.ask("load-shared", {"type": "IKE", "data": self._psk, "owners": [peer]})
                vici.ask("load-conn", {name: connection})
                self._told[name] = connection
        finally:
            vici.close()
