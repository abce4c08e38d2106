"""flanneld with a store that the test steers: a JSON line on standard input is a message of the store.

`{"snapshot": [lease, ...], "complete": true}`, `{"added": lease}`, `{"removed": lease}`, `{"lost": "why"}`,
`{"down": "why"}`; a lease is `{"subnet", "ip", "type", "data"}`. What flanneld publishes is printed to standard output.
`STEERED` in the environment holds the network configuration, the own subnet and the grace period in seconds; `broken`
in it names parts of flanneld that raise what nobody foresaw (see `break_parts`). `REMEMBERED` is what the store kept of
the node: `{"public_ip", "public_ip6", "lease"}`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from ipaddress import IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from flannel import cli, daemon
from flannel.backends.base import Facts, Wants
from flannel.backends.vxlan import VxlanBackend
from flannel.lease import Address, Lease, LeaseAttrs, Network
from flannel.netconf import NetConf
from flannel.reconcile import Reconciler
from flannel.stores.base import Event, LeaseLost, Post, Remembered, Snapshot, StoreDown

STEERED: dict[str, Any] = json.loads(os.environ["STEERED"])


def lease(given: dict[str, Any]) -> Lease:
    """Read a lease of the test's."""
    ip6 = IPv6Address(given["ip6"]) if given.get("ip6") else None
    attrs = LeaseAttrs(ip_address(given["ip"]), given["type"], given.get("data"), ip6, given.get("data6"))
    subnet6 = IPv6Network(given["subnet6"]) if given.get("subnet6") else None
    return Lease(ip_network(given["subnet"]), attrs, subnet6=subnet6)


class SteeredStore:
    """A Store whose news come from standard input."""

    name = "steered"

    def remembered(self) -> Remembered:
        given: dict[str, Any] = json.loads(os.environ.get("REMEMBERED", "{}"))
        attrs = lease(given["lease"]).attrs if "lease" in given else None
        return Remembered(given.get("public_ip", ""), attrs, given.get("public_ip6", ""))

    def published_by(self, public: Address) -> LeaseAttrs | None:
        return None

    def network_config(self) -> str:
        return json.dumps(STEERED["conf"])

    def acquire(
        self, conf: NetConf, attrs: LeaseAttrs, previous: Network | None, previous6: IPv6Network | None = None
    ) -> Lease:  # fmt: skip
        self.update(attrs)
        subnet6 = IPv6Network(STEERED["subnet6"]) if STEERED.get("subnet6") else None
        return Lease(ip_network(STEERED["subnet"]), attrs, subnet6=subnet6)

    def update(self, attrs: LeaseAttrs) -> None:
        published = {"ip": str(attrs.public_ip), "type": attrs.backend_type, "data": attrs.backend_data}
        if attrs.public_ip6 is not None:
            published |= {"ip6": str(attrs.public_ip6), "data6": attrs.backend_data6}
        print(json.dumps(published), flush=True)

    def watch(self, post: Post) -> None:
        threading.Thread(target=self._read, args=(post,), daemon=True).start()

    def _read(self, post: Post) -> None:
        for line in sys.stdin:
            given = json.loads(line)
            if "snapshot" in given:
                post(Snapshot(tuple(lease(one) for one in given["snapshot"]), given.get("complete", True)))
            elif "lost" in given:
                post(LeaseLost(given["lost"]))
            elif "down" in given:
                post(StoreDown(given["down"]))
            elif "added" in given:
                post(Event("added", lease(given["added"])))
            else:
                post(Event("removed", lease(given["removed"])))

    def close(self) -> None:
        pass


SECRET = "geheim"


def break_parts(names: list[str]) -> None:
    """Have a part raise an exception of no kind that flanneld expects, with a secret in its text."""

    def broken(*_: object) -> Any:
        raise ZeroDivisionError(SECRET)

    def is_bad(subnet: Network) -> bool:
        return str(subnet) == "10.244.66.0/24"

    wants, take = VxlanBackend.wants, Reconciler.take

    def wants_but_one(backend: VxlanBackend, one: Lease, facts: Facts) -> Wants:
        return broken() if is_bad(one.subnet) else wants(backend, one, facts)

    def take_but_one(reconciler: Reconciler, message: Event | Snapshot) -> None:
        if isinstance(message, Event) and is_bad(message.lease.subnet):
            broken()
        take(reconciler, message)

    def hang(*_: object) -> None:
        threading.Event().wait()

    def linger(*_: object) -> None:
        # Until the signal that the test sends has come: what handled it has gone then.
        deadline = time.monotonic() + 30
        while signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL and time.monotonic() < deadline:
            threading.Event().wait(0.02)

    acquire, acquired = SteeredStore.acquire, []

    def acquire_but_the_second_time(store: SteeredStore, *given: Any) -> Lease:
        acquired.append(given)
        return broken() if len(acquired) == 2 else acquire(store, *given)

    parts: dict[str, tuple[type, str, Callable[..., Any]]] = {
        "wants": (VxlanBackend, "wants", wants_but_one),
        "take": (Reconciler, "take", take_but_one),
        "acquire": (SteeredStore, "acquire", acquire_but_the_second_time),
        "start": (VxlanBackend, "start", broken),
        "close": (SteeredStore, "close", broken),
        "hang": (SteeredStore, "close", hang),
        "slow": (SteeredStore, "close", linger),
    }
    for name in names:
        if name == "thread":
            threading.Thread(target=broken, name="doomed").start()
        else:
            setattr(*parts[name])


def make_store(options: cli.Options) -> SteeredStore:
    break_parts(STEERED.get("broken", []))
    return SteeredStore()


if __name__ == "__main__":
    sys.exit(daemon.main(sys.argv[1:], os.environ, make_store, grace=STEERED["grace"]))
