"""extension: commands of the operator's, run at start-up and for each peer that comes, changes or goes."""

from __future__ import annotations

import os
import queue
import re
import threading
from collections.abc import Mapping

from flannel import log
from flannel.backends.alloc import AllocBackend
from flannel.backends.base import NOTHING, BackendError, Facts, Ignored, Wants
from flannel.interface import External
from flannel.kernel.netlink import Netlink
from flannel.lease import Lease, LeaseAttrs, Network
from flannel.netconf import NetConf, NetConfError, unread_keys
from flannel.process import Outcome, run
from flannel.state import Recorded

_KEYS = ("PreStartupCommand", "PostStartupCommand", "SubnetAddCommand", "SubnetRemoveCommand")
_SECONDS = 60.0
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


def expand(command: str, variables: Mapping[str, str]) -> list[str]:
    """Split a command at its blanks and put the variables in; nothing else of a shell's language is known."""
    return [_VARIABLE.sub(lambda found: variables.get(found[1] or found[2], ""), word) for word in command.split()]


class ExtensionBackend(AllocBackend):
    """See flannel-behaviour.md, section 3.7. The commands of peers are run in order, on a thread of their own."""

    name = "extension"

    def __init__(self, conf: NetConf, external: External) -> None:
        self.mtu = external.mtu
        self._external = external
        self._network = conf.network
        for note in unread_keys(conf, _KEYS):
            log.warning(note)
        self._commands = {key: _command(conf, key) for key in _KEYS}
        self._data: str | None = None
        self._peers: dict[Network, Lease] = {}
        self._jobs: queue.SimpleQueue[tuple[str, Lease]] = queue.SimpleQueue()

    def prepare(self, netlink: Netlink, recorded: Recorded) -> LeaseAttrs:
        """Run the first command; what it prints is published."""
        if self._commands["PreStartupCommand"]:
            outcome = self._run("PreStartupCommand", {}, "\n")
            if outcome.code:
                raise BackendError(_failure("PreStartupCommand", outcome))
            self._data = (outcome.output + outcome.errors).strip()
        return self.attrs()

    def attrs(self) -> LeaseAttrs:
        """What is published: the interface's addresses, whatever the public ones are, and the first command's words.

        In dual stack the words are in the data of IPv4 alone, where upstream's commands have them from.
        """
        return LeaseAttrs(self._external.address, self.name, self._data, self._external.address6)

    def start(self, netlink: Netlink, lease: Lease) -> None:
        """Run the second command."""
        if self._commands["PostStartupCommand"]:
            variables = {"NETWORK": str(self._network), **_variables(lease._replace(attrs=self.attrs()))}
            outcome = self._run("PostStartupCommand", variables, "\n")
            if outcome.code:
                raise BackendError(_failure("PostStartupCommand", outcome))
        threading.Thread(target=self._work, name="extension", daemon=True).start()

    def wants(self, lease: Lease, facts: Facts) -> Wants:
        """Nothing of the kernel: that is the commands' business."""
        if lease.attrs.backend_type != self.name:
            raise Ignored(f"its backend is {lease.attrs.backend_type or 'udp or none'!r}, not extension")
        return NOTHING

    def update(self, leases: dict[Network, Lease], may_remove: bool) -> None:
        """Have the commands run for peers that came, changed or went."""
        peers = {subnet: lease for subnet, lease in leases.items() if lease.attrs.backend_type == self.name}
        for subnet, lease in self._peers.items():
            if subnet not in peers:
                self._jobs.put(("SubnetRemoveCommand", lease))
        for subnet, lease in peers.items():
            before = self._peers.get(subnet)
            if before is None or (before.attrs, before.subnet6) != (lease.attrs, lease.subnet6):
                self._jobs.put(("SubnetAddCommand", lease))
        self._peers = peers

    def _work(self) -> None:
        while True:
            key, lease = self._jobs.get()
            if not self._commands[key]:
                continue
            subnet, address, data = lease.subnet, lease.attrs.public_ip, lease.attrs.backend_data
            outcome = self._run(key, _variables(lease), (data if isinstance(data, str) else "") + "\n")
            if outcome.code:
                log.error(f"{subnet} by {address}: {_failure(key, outcome)}")
            else:
                log.info(f"{key} for {subnet} by {address}: {outcome.output.strip()[:200]}")

    def _run(self, key: str, variables: Mapping[str, str], text: str) -> Outcome:
        environment = {**os.environ, **variables}
        argv = expand(self._commands[key], environment)
        return run(argv, text, _SECONDS, environment) if argv and argv[0] else Outcome(127, "", "there is no command")


def _variables(lease: Lease) -> dict[str, str]:
    """A lease for a command; what it has nothing of is empty."""
    first = (lease.subnet, lease.attrs.public_ip)
    second = (lease.subnet6, lease.attrs.public_ip6)
    four, six = (first, second) if lease.subnet.version == 4 else ((None, None), first)
    values = zip(("SUBNET", "PUBLIC_IP", "IPV6SUBNET", "PUBLIC_IPV6"), (*four, *six), strict=True)
    return {name: "" if value is None else str(value) for name, value in values}


def _command(conf: NetConf, key: str) -> str:
    value = conf.backend.get(key.lower(), "")
    if not isinstance(value, str):
        raise NetConfError(f"Backend.{key} is {value!r}, not a command")
    return value


def _failure(key: str, outcome: Outcome) -> str:
    if outcome.late:
        return f"{key} took more than {_SECONDS:.0f} s"
    said = (outcome.errors.strip() or outcome.output.strip())[:300]
    how = f"ended with {outcome.code}" if outcome.code > 0 else f"was ended by signal {-outcome.code}"
    return f"{key} {how}: {said}"
