"""Keeps the rules by iptables of either flavour: looks when something changed, and writes only what is wrong."""

from __future__ import annotations

import os
import select
import threading
import time
from ipaddress import IPv4Network
from typing import NamedTuple

from flannel import log
from flannel.kernel import nftables
from flannel.kernel.netlink import NETLINK_NETFILTER, Netlink
from flannel.process import Outcome, run
from flannel.rules.masquerade import Group, Tables, forward, masquerade, payload, read_tables, removal, repair
from flannel.subnetenv import Previous

#: Who holds the lock of iptables may keep us waiting so many seconds.
_LOCK_WAIT = "10"
_SETTLE_MS = 50
_RETRY = 2.0
_RANDOM_FULLY_SINCE = (1, 6, 2)


class RulesError(Exception):
    """The rules cannot be read or set; the text says what iptables said."""


class RulesWanted(NamedTuple):
    """Which rules are wanted."""

    network: IPv4Network
    subnet: IPv4Network
    masquerade: bool
    forward: bool
    random_fully: bool


class RulesKeeper:
    """Sets the rules, and keeps them on a thread of its own, for iptables may wait for its lock.

    `resync` is in seconds: how often legacy rules are looked at, of which the kernel tells nothing. Rules of nftables
    are looked at when it tells of a change; the timer then only compares its generation. 0 or less: no timer.
    """

    def __init__(self, wanted: RulesWanted, previous: Previous, resync: int) -> None:
        self._wanted = wanted
        self._previous = previous
        self._resync = resync
        self._groups: list[Group] = []
        self._watch: nftables.RuleWatch | None = None
        self._netlink: Netlink | None = None
        self._generation = 0
        self._complaint = ""
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Set the rules as far as that can be done, then keep them. A failure is logged and tried again."""
        nft, random_fully = self._ask_flavour()
        wanted = self._wanted
        if nft:
            self._subscribe()
        try:
            self._clean_and_set(wanted, random_fully and wanted.random_fully)
        except (RulesError, OSError) as error:
            self._complain(str(error))
        if not nft and self._resync <= 0:
            log.warning("--iptables-resync is 0: rules that somebody removes stay away")
        if self._groups:
            self._thread = threading.Thread(target=self._keep, name="rules", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop keeping the rules; they stay."""
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        if self._thread is not None:
            self._thread.join(timeout=1.0)

    def _ask_flavour(self) -> tuple[bool, bool]:
        """Whether iptables is the nftables one, and whether it knows --random-fully."""
        said = run(["iptables", "--version"]).output.split()
        try:
            version = tuple(int(part) for part in said[1].lstrip("v").split("."))
        except (IndexError, ValueError):
            return False, True
        return "(nf_tables)" in said, version >= _RANDOM_FULLY_SINCE

    def _subscribe(self) -> None:
        try:
            self._watch = nftables.RuleWatch()
            self._netlink = Netlink(NETLINK_NETFILTER)
        except OSError as error:
            log.warning(f"cannot be told of changed rules ({error}); looking at them every {self._resync} s")

    # -- start -----------------------------------------------------------------------------------------------------

    def _clean_and_set(self, wanted: RulesWanted, random_fully: bool) -> None:
        masq = masquerade(wanted.network, wanted.subnet, random_fully)
        fwd = forward(wanted.network)
        self._groups = [group for group, on in ((masq, wanted.masquerade), (fwd, wanted.forward)) if on]
        unwanted = [group for group, on in ((masq, wanted.masquerade), (fwd, wanted.forward)) if not on]
        tables = self._read([masq.table, fwd.table])
        changes: dict[str, list[str]] = {}
        for group in self._groups:
            # At start the whole chain is set: nothing tells an old network's rules from another flanneld's,
            # and that one puts its own back.
            changes[group.table] = repair(tables, group, keep_foreign=False)
        for group in unwanted:
            changes[group.table] = removal(tables, group, self._earlier_rules(group))
        self._write(changes)
        self._note_generation()
        if self._groups:
            log.info(f"bootstrap done: {' and '.join(group.chain for group in self._groups)} hold their rules")

    def _earlier_rules(self, group: Group) -> list[str]:
        """What rules an earlier run may have put into this group's chain."""
        found: list[str] = []
        for network in (self._previous.network, self._wanted.network):
            for subnet in (self._previous.subnet, self._wanted.subnet):
                if network is None or subnet is None:
                    continue
                for random_fully in (True, False):
                    one = masquerade(network, subnet, random_fully) if group.table == "nat" else forward(network)
                    found += one.rules
        return found

    # -- keep ------------------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        if self._watch is not None:
            poll.register(self._watch, select.POLLIN)
        period = self._resync if self._resync > 0 else None
        while not self._stopping:
            wait = _RETRY if self._complaint else period
            events = poll.poll(wait * 1000 if wait is not None else None)
            if self._stopping:
                return
            try:
                if self._may_have_changed(bool(events)):
                    self._set_right()
            except (RulesError, OSError) as error:
                self._complain(str(error))

    def _may_have_changed(self, told: bool) -> bool:
        if self._complaint or self._watch is None or self._netlink is None:
            return True
        if not told:
            return nftables.generation(self._netlink) != self._generation
        time.sleep(_SETTLE_MS / 1000)  # who changes one rule changes more; look once, when it is done
        touched = self._watch.touched(self._chains())
        if not touched:
            self._note_generation()
        return touched

    def _chains(self) -> list[tuple[str, str]]:
        return [(group.table, chain) for group in self._groups for chain in (group.parent, group.chain)]

    def _set_right(self) -> None:
        self._note_generation()
        tables = self._read([group.table for group in self._groups])
        changes = {group.table: repair(tables, group, keep_foreign=True) for group in self._groups}
        if any(changes.values()):
            log.info("Some iptables rules are missing or out of order; setting them again")
            self._write(changes)
            if self._watch is not None:
                self._watch.touched(())  # the echo of our own writing
                self._note_generation()
        if self._complaint:
            log.info("iptables rules are as they must be again")
        self._complaint = ""

    def _note_generation(self) -> None:
        if self._netlink is not None:
            self._generation = nftables.generation(self._netlink)

    def _complain(self, text: str) -> None:
        if text != self._complaint:
            log.error(f"iptables rules: {text}; trying again")
        self._complaint = text

    # -- iptables --------------------------------------------------------------------------------------------------

    def _read(self, tables: list[str]) -> Tables:
        found: Tables = {}
        for table in tables:
            found |= read_tables(_checked(["iptables-save", "-t", table]).output)
        return found

    def _write(self, changes: dict[str, list[str]]) -> None:
        text = payload(changes)
        if text:
            _checked(["iptables-restore", "--noflush", "-w", _LOCK_WAIT], text)


def _checked(argv: list[str], text: str = "") -> Outcome:
    outcome = run(argv, text)
    if outcome.code:
        raise RulesError(f"`{' '.join(argv)}` ended with {outcome.code}: {outcome.errors.strip()[:500]}")
    return outcome
