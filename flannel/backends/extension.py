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
        self._peers: dict[Network, LeaseAttrs] = {}
        self._jobs: queue.SimpleQueue[tuple[str, Network, LeaseAttrs]] = queue.SimpleQueue()

    def prepare(self, netlink: Netlink, recorded: Recorded) -> LeaseAttrs:
        """Run the first command; what it prints is published."""
        if self._commands["PreStartupCommand"]:
            outcome = self._run("PreStartupCommand", {}, "\n")
            if outcome.code:
                raise BackendError(_failure("PreStartupCommand", outcome))
            self._data = (outcome.output + outcome.errors).strip()
        return self.attrs()

    def attrs(self) -> LeaseAttrs:
        """What is published: the interface's own address, whatever the public one is, and the first command's words."""
        return LeaseAttrs(self._external.address, self.name, self._data)

    def start(self, netlink: Netlink, lease: Lease) -> None:
        """Run the second command."""
        if self._commands["PostStartupCommand"]:
            variables = {"NETWORK": str(self._network), **self._variables(lease.subnet, self.attrs())}
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
        peers = {subnet: lease.attrs for subnet, lease in leases.items() if lease.attrs.backend_type == self.name}
        for subnet, attrs in self._peers.items():
            if subnet not in peers:
                self._jobs.put(("SubnetRemoveCommand", subnet, attrs))
        for subnet, attrs in peers.items():
            if self._peers.get(subnet) != attrs:
                self._jobs.put(("SubnetAddCommand", subnet, attrs))
        self._peers = peers

    def _work(self) -> None:
        while True:
            key, subnet, attrs = self._jobs.get()
            if not self._commands[key]:
                continue
            data = attrs.backend_data if isinstance(attrs.backend_data, str) else ""
            outcome = self._run(key, self._variables(subnet, attrs), data + "\n")
            if outcome.code:
                log.error(f"{subnet} by {attrs.public_ip}: {_failure(key, outcome)}")
            else:
                log.info(f"{key} for {subnet} by {attrs.public_ip}: {outcome.output.strip()[:200]}")

    def _variables(self, subnet: Network, attrs: LeaseAttrs) -> dict[str, str]:
        return {"SUBNET": str(subnet), "PUBLIC_IP": str(attrs.public_ip), "IPV6SUBNET": "", "PUBLIC_IPV6": ""}

    def _run(self, key: str, variables: Mapping[str, str], text: str) -> Outcome:
        environment = {**os.environ, **variables}
        argv = expand(self._commands[key], environment)
        return run(argv, text, _SECONDS, environment) if argv and argv[0] else Outcome(127, "", "there is no command")


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
