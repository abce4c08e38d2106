"""What it takes to follow a store, whichever it is: list, watch, list again after trouble, and say each thing once."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Hashable, Iterable, Iterator
from typing import Generic, Protocol, TypeVar

from flannel.lease import Lease
from flannel.log import place_of
from flannel.stores.base import Event, Log, Post, Snapshot, StoreDown, StoreError
from flannel.stores.leasecodec import overlap
from flannel.stores.table import LeaseTable

_WARNINGS_KEPT = 1000

Key = TypeVar("Key", bound=Hashable)


class Stream(Protocol):
    """A watch that is under way."""

    def close(self) -> None:
        """End it, from any thread."""

    def release(self) -> None:
        """Give back what it holds; for the reading thread."""


class Watcher(Generic[Key]):
    """Posts a Snapshot, then Events; after an outage, or when the watch had to be begun anew, a Snapshot again.

    A store's own watcher says how to list and to follow. Back-offs are in seconds.
    """

    def __init__(self, store: str, log: Log, post: Post, first_back_off: float, longest_back_off: float) -> None:
        self._store, self._log, self._post = store, log, post
        self._first_back_off, self._longest_back_off = first_back_off, longest_back_off
        self._back_off = first_back_off
        self._table: LeaseTable[Key] = LeaseTable()
        self._down = False
        self._warned: set[tuple[Key, str]] = set()
        self._lock = threading.Lock()
        self._stream: Stream | None = None
        self._relist = False
        self._closed = threading.Event()

    # -- what a store's own watcher knows ---------------------------------------------------------------------------

    def _knows_its_place(self) -> bool:
        """Whether it is known from where on to watch."""
        raise NotImplementedError

    def _forget_place(self) -> None:
        """Have the leases listed before they are watched again."""
        raise NotImplementedError

    def _list(self) -> None:
        """List all leases, and post a Snapshot. Raises StoreError."""
        raise NotImplementedError

    def _follow(self) -> None:
        """Watch until the stream ends. Returns to have it go on, raises StoreError when the store is away."""
        raise NotImplementedError

    def _failed(self, error: StoreError) -> tuple[str, float]:
        """Return why the store is down, "" if it is not, and the seconds that it asks to be left alone."""
        return str(error), 0.0

    def _own(self) -> Lease | None:
        """The own lease, if there is one now."""
        raise NotImplementedError

    # -- the loop ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Have `run` return."""
        self._closed.set()
        self._end_stream()

    def relist(self) -> None:
        """Have the leases listed and judged again: the own lease is another one now."""
        with self._lock:
            self._relist = True
        self._end_stream()

    def _end_stream(self) -> None:
        with self._lock:
            stream = self._stream
        if stream is not None:
            stream.close()

    def run(self) -> None:
        """List and watch until closed; whatever goes wrong is posted, and tried again."""
        while not self._closed.is_set():
            try:
                if self._list_wanted():
                    self._list()
                self._follow()
                continue
            except StoreError as error:
                reason, least = self._failed(error)
            except Exception as error:  # noqa: BLE001 - a thread that died would leave the daemon blind, without a word
                reason, least = place_of(error), 0.0
                self._forget_place()
            if self._closed.is_set() or self._relist:
                continue
            if reason and not self._down:
                self._down = True
                self._post(StoreDown(reason))
            self._rest(least)

    def _rest(self, least: float) -> None:
        """Wait before the next try: longer each time, never in step with other nodes, and as long as the store asks."""
        self._closed.wait(max(least, self._back_off) * random.uniform(1.0, 1.5))  # noqa: S311 - it guards nothing
        self._back_off = min(self._back_off * 2, self._longest_back_off)

    def _list_wanted(self) -> bool:
        with self._lock:
            wanted, self._relist = self._relist or not self._knows_its_place(), False
        return wanted

    @contextlib.contextmanager
    def _reading(self, stream: Stream) -> Iterator[None]:
        """Let others end the stream while it is read."""
        with self._lock:
            self._stream = stream
            if self._relist or self._closed.is_set():
                stream.close()
        try:
            yield
        finally:
            with self._lock:
                self._stream = None
            stream.release()

    # -- what is told -----------------------------------------------------------------------------------------------

    def _recovered(self) -> None:
        if self._down:
            self._down = False
            self._log("info", f"{self._store} is back")

    def _post_snapshot(self) -> None:
        leases, own = self._table.leases(), self._own()
        if own is not None:
            leases.append(own)
        self._post(Snapshot(tuple(leases)))

    def _post_all(self, events: Iterable[Event]) -> None:
        for event in events:
            self._post(event)

    def _warn(self, key: Key, why: str) -> None:
        """Say once why a key's lease is ignored."""
        if (key, why) in self._warned:
            return
        if len(self._warned) >= _WARNINGS_KEPT:
            self._warned.clear()
        self._warned.add((key, why))
        self._log("warning", f"Ignoring the {self._shown(key)}: {why}")

    def _shown(self, key: Key) -> str:
        """A key as the log has it."""
        raise NotImplementedError


def why_clashing(lease: Lease, own: Lease | None, what: str) -> str:
    """Why a peer's lease cannot stand beside the own one: an overlapping subnet, called `what`; "" if it can."""
    if own is None:
        return ""
    if overlap(lease.subnet, own.subnet):
        return f"its {what} {lease.subnet} overlaps this node's {own.subnet}"
    if own.subnet6 is not None and lease.subnet6 is not None and own.subnet6.overlaps(lease.subnet6):
        return f"its {what} {lease.subnet6} overlaps this node's {own.subnet6}"
    return ""
