"""What every keeper of rules has: a thread that looks when the kernel tells of a change, and writes what is wrong."""

from __future__ import annotations

import os
import select
import threading
from typing import NamedTuple

from flannel import log
from flannel.kernel import nftables
from flannel.kernel.netlink import NETLINK_NETFILTER, Netlink
from flannel.process import Outcome, run
from flannel.rules.masquerade import Network

_SETTLE_MS = 50
_RETRY = 2.0


class RulesError(Exception):
    """The rules cannot be read or set; the text says what the program for it said."""


class RulesWanted(NamedTuple):
    """Which rules are wanted, for one address family."""

    network: Network
    subnet: Network
    masquerade: bool
    forward: bool
    random_fully: bool


class Keeper:
    """Sets rules, and keeps them on a thread of its own, for the program that does it may wait for a lock.

    `resync` is in seconds: how often rules are looked at of which the kernel tells nothing. Rules of nftables are
    looked at when it tells of a change; the timer then only compares its generation. 0 or less: no timer.
    """

    #: How the rules are called in the log.
    kind = ""

    def __init__(self, resync: int) -> None:
        self._resync = resync
        self._watch: nftables.RuleWatch | None = None
        self._netlink: Netlink | None = None
        self._generation = 0
        self._written = -1
        self._complaint = ""
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = False
        self._thread: threading.Thread | None = None

    # -- what a keeper of one kind does --------------------------------------------------------------------------------

    def set_first(self) -> None:
        """Set the rules at the start, and remove what is not wanted. Raises RulesError or OSError."""
        raise NotImplementedError

    def repair(self) -> bool:
        """Look, and write what is wrong; whether anything was. Raises RulesError or OSError."""
        raise NotImplementedError

    def chains(self) -> list[tuple[str, str]]:
        """The chains whose change is of interest, as (table, chain)."""
        raise NotImplementedError

    # -- start and stop ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Set the rules as far as that can be done, then keep them. A failure is logged and tried again."""
        try:
            self.set_first()
        except (RulesError, OSError) as error:
            self.complain(str(error))
        if self.chains():
            self._thread = threading.Thread(target=self._keep, name="rules", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop keeping the rules; they stay."""
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        if self._thread is not None:
            self._thread.join(timeout=1.0)

    def subscribe(self) -> None:
        """Be told of changes from now on."""
        if self._watch is not None:
            return
        try:
            self._watch = nftables.RuleWatch()
            self._netlink = Netlink(NETLINK_NETFILTER)
        except OSError as error:
            then = f"looking at them every {self._resync} s" if self._resync > 0 else "not looking at them again"
            log.warning(f"cannot be told of changed rules ({error}); {then}")

    # -- keep ----------------------------------------------------------------------------------------------------------

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
                self.complain(str(error))

    def _may_have_changed(self, told: bool) -> bool:
        if self._complaint or self._watch is None or self._netlink is None:
            return True
        if not told:
            return nftables.generation(self._netlink) != self._generation
        self._settle()
        touched = self._watch.touched(self.chains())
        if not touched:
            self.note_generation()
            return False
        return nftables.generation(self._netlink) != self._written

    def _settle(self) -> None:
        """Wait until who changes one rule has changed the others: it is enough to look once. An end cuts it short."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        poll.poll(_SETTLE_MS)

    def _set_right(self) -> None:
        self.note_generation()
        if self.repair():
            log.info(f"Some {self.kind} rules were missing or out of order; setting them again")
        if self._complaint:
            log.info(f"{self.kind} rules are as they must be again")
        self._complaint = ""

    def note_generation(self) -> None:
        """Remember the ruleset as it is now as looked at."""
        if self._netlink is not None:
            self._generation = nftables.generation(self._netlink)

    def wrote(self, transactions: int) -> None:
        """Note so many writes of our own since `note_generation`: their echo is no reason to look.

        Where the generation tells of more, somebody else wrote in between, and the echo makes us look.
        """
        if self._netlink is not None:
            now = nftables.generation(self._netlink)
            if now == self._generation + transactions:
                self._generation = self._written = now

    def complain(self, text: str) -> None:
        """Log a failure, once."""
        if text != self._complaint:
            log.error(f"{self.kind} rules: {text}; trying again")
        self._complaint = text


def checked(argv: list[str], text: str = "") -> Outcome:
    """Run a program that has to succeed. Raises RulesError."""
    outcome = run(argv, text)
    if outcome.code:
        how = "took too long and was stopped" if outcome.late else f"ended with {outcome.code}"
        raise RulesError(f"`{' '.join(argv)}` {how}: {outcome.errors.strip()[:500]}")
    return outcome
