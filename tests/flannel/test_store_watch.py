"""Following everybody's leases through what happens to an etcd."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Network
from typing import TYPE_CHECKING, Any

import pytest

from flannel.lease import LeaseAttrs
from flannel.netconf import NetConf
from flannel.stores.base import Event, LeaseLost, Snapshot, StoreDown
from flannel.stores.etcd_client import PAGE
from flannel.stores.leasecodec import lease_value

if TYPE_CHECKING:
    from tests.flannel.conftest import Etcd, Recorder

MakeStore = Callable[..., Any]
Attrs = Callable[[int], LeaseAttrs]
SEVEN = IPv4Network("10.244.7.0/24")
NINE = IPv4Network("10.244.9.0/24")


@pytest.fixture
def node(etcd: Etcd, make_store: MakeStore, conf: NetConf, attrs_of: Attrs) -> tuple[Any, Recorder]:
    """Node 1 with subnet 10.244.7.0/24, watching."""
    store, seen = make_store(etcd)
    store.acquire(conf, attrs_of(1), SEVEN)
    store.watch(seen.post)
    seen.wait(Snapshot)
    return store, seen


def put_peer(etcd: Etcd, attrs: LeaseAttrs, subnet: str = "10.244.9.0-24", lease: str = "0") -> int:
    return etcd.put(f"subnets/{subnet}", lease_value(attrs).decode(), lease)


def test_a_peer_comes_changes_and_goes(etcd: Etcd, node: tuple[Any, Recorder], attrs_of: Attrs) -> None:
    _, seen = node
    assert [lease.subnet for lease in seen.of(Snapshot)[0].leases] == [SEVEN], "the own lease is in the list"
    put_peer(etcd, attrs_of(2))
    put_peer(etcd, attrs_of(2))
    put_peer(etcd, attrs_of(3))
    etcd.delete("subnets/10.244.9.0-24")
    events = seen.wait(Event, 3)
    assert [(event.kind, event.lease.subnet, event.lease.attrs) for event in events] == [
        ("added", NINE, attrs_of(2)),
        ("added", NINE, attrs_of(3)),
        ("removed", NINE, attrs_of(3)),
    ]


def test_a_peers_lease_ends(etcd: Etcd, node: tuple[Any, Recorder], attrs_of: Attrs) -> None:
    _, seen = node
    put_peer(etcd, attrs_of(2), lease=etcd.ask("/v3/lease/grant", {"TTL": "1"})["ID"])
    assert [event.kind for event in seen.wait(Event, 2)] == ["added", "removed"]


def test_the_own_key_is_deleted(etcd: Etcd, node: tuple[Any, Recorder], conf: NetConf, attrs_of: Attrs) -> None:
    store, seen = node
    etcd.delete("subnets/10.244.7.0-24")
    assert "10.244.7.0/24 is lost" in seen.wait(LeaseLost)[0].reason
    assert store.acquire(conf, attrs_of(1), SEVEN).subnet == SEVEN
    assert [lease.subnet for lease in seen.wait(Snapshot, 2)[1].leases] == [SEVEN]
    etcd.delete("subnets/10.244.7.0-24")
    assert len(seen.wait(LeaseLost, 2)) == 2
    assert not seen.of(StoreDown)


def test_the_own_lease_ends_while_nobody_renews(
    etcd: Etcd, make_store: MakeStore, conf: NetConf, attrs_of: Attrs
) -> None:
    store, seen = make_store(etcd)
    store.acquire(conf, attrs_of(1), SEVEN)
    store.watch(seen.post)
    key = etcd.get("subnets/10.244.7.0-24")
    assert key is not None
    etcd.ask("/v3/lease/revoke", {"ID": key["lease"]})
    seen.wait(LeaseLost)


def test_the_own_key_is_taken(etcd: Etcd, node: tuple[Any, Recorder], attrs_of: Attrs) -> None:
    _, seen = node
    put_peer(etcd, attrs_of(5), "10.244.7.0-24")
    assert "now leased to 192.0.2.5" in seen.wait(LeaseLost)[0].reason
    assert [(event.kind, event.lease.subnet) for event in seen.wait(Event)] == [("added", SEVEN)]


def test_junk_in_the_own_key_is_written_over(etcd: Etcd, node: tuple[Any, Recorder], attrs_of: Attrs) -> None:
    _, seen = node
    etcd.put("subnets/10.244.7.0-24", "junk")

    def mended() -> bool:
        key = etcd.get("subnets/10.244.7.0-24")
        return key is not None and key["value"] == lease_value(attrs_of(1)).decode()

    wait_for(mended)
    assert not seen.of(LeaseLost)


def wait_for(holds: Callable[[], bool]) -> None:
    from tests.flannel.conftest import eventually

    eventually(holds, "the condition of the test")


VTEP = {"VNI": 1, "VtepMAC": "0a:00:00:00:00:42"}


def value_of(ip: str = "192.0.2.66", kind: str = "vxlan", data: Any = VTEP) -> str:
    return json.dumps({"PublicIP": ip, "BackendType": kind, "BackendData": data})


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("10.99.1.0-24", value_of(), "not a part of the Network"),
        ("0.0.0.0-0", value_of(), "not a part of the Network"),
        ("10.244.7.0-25", value_of(), "overlaps this node's 10.244.7.0/24"),
        ("10.244.0.0-17", value_of(), "overlaps this node's 10.244.7.0/24"),
        ("10.244.9.0-24", value_of(ip="192.0.2.1"), "is this node's own"),
        ("10.244.9.0-24", '{"PublicIP":', "not JSON"),
        ("10.244.9.0-24", value_of(kind="warp\nspeed"), "is unknown"),
        ("10.244.9.0-24", value_of(data={"VNI": 1, "VtepMAC": "01:00:5e:00:00:01"}), "no unicast MAC"),
        ("10.244.9.0-24", value_of(data="x"), "not a JSON object"),
        ("../../etc", value_of(), "no subnet's key"),
    ],
)
def test_a_hostile_lease_costs_that_lease_only(
    etcd: Etcd, node: tuple[Any, Recorder], attrs_of: Attrs, name: str, value: str, fault: str
) -> None:
    store, seen = node
    etcd.put(f"subnets/{name}", value)
    put_peer(etcd, attrs_of(2), "10.244.20.0-24")
    assert [str(event.lease.subnet) for event in seen.wait(Event)] == ["10.244.20.0/24"]
    warnings = [text for level, text in seen.lines if level == "warning"]
    assert len(warnings) == 1
    assert fault in warnings[0]
    assert repr(name) in warnings[0]
    assert "\n" not in warnings[0]
    # The same in a list.
    store._watcher.relist()
    listed = seen.wait(Snapshot, 2)[1].leases
    assert sorted(str(lease.subnet) for lease in listed) == ["10.244.20.0/24", "10.244.7.0/24"]


def test_a_known_lease_survives_a_broken_value(etcd: Etcd, node: tuple[Any, Recorder], attrs_of: Attrs) -> None:
    store, seen = node
    put_peer(etcd, attrs_of(2))
    seen.wait(Event)
    etcd.put("subnets/10.244.9.0-24", "junk")
    store._watcher.relist()
    assert NINE in [lease.subnet for lease in seen.wait(Snapshot, 2)[1].leases]
    assert len(seen.of(Event)) == 1


def test_two_keys_with_one_subnet(etcd: Etcd, node: tuple[Any, Recorder], attrs_of: Attrs) -> None:
    """The older key holds; the younger takes its place when the older goes."""
    _, seen = node
    put_peer(etcd, attrs_of(2), "10.244.9.0-24")
    put_peer(etcd, attrs_of(3), "10.244.9.0-24&fd00::-64")
    put_peer(etcd, attrs_of(4), "10.244.20.0-24")
    assert [event.lease.attrs for event in seen.wait(Event, 2)] == [attrs_of(2), attrs_of(4)]
    assert seen.warned("older key has subnet 10.244.9.0/24")
    etcd.delete("subnets/10.244.9.0-24")
    last = seen.wait(Event, 3)[2]
    assert (last.kind, last.lease.attrs) == ("added", attrs_of(3))


def test_a_list_begins_with_who_came_first(etcd: Etcd, make_store: MakeStore, conf: NetConf, attrs_of: Attrs) -> None:
    """Of what two leases contest, the first one has it after a restart of flanneld too."""
    for number in (9, 8, 6):
        put_peer(etcd, attrs_of(number), f"10.244.{number}.0-24")
    put_peer(etcd, attrs_of(8), "10.244.8.0-24")  # written again, and still the second
    store, seen = make_store(etcd)
    store.acquire(conf, attrs_of(1), SEVEN)
    store.watch(seen.post)
    [snapshot] = seen.wait(Snapshot)
    assert [lease.attrs for lease in snapshot.leases] == [attrs_of(number) for number in (9, 8, 6, 1)]


def test_two_subnets_of_one_node_both_count(etcd: Etcd, node: tuple[Any, Recorder], attrs_of: Attrs) -> None:
    _, seen = node
    put_peer(etcd, attrs_of(2), "10.244.9.0-24")
    put_peer(etcd, attrs_of(2), "10.244.10.0-24")
    assert len(seen.wait(Event, 2)) == 2


def test_a_restart_loses_nothing(etcd: Etcd, node: tuple[Any, Recorder], attrs_of: Attrs) -> None:
    _, seen = node
    put_peer(etcd, attrs_of(2))
    seen.wait(Event)
    etcd.stop()
    seen.wait(StoreDown)
    etcd.start()
    put_peer(etcd, attrs_of(3))
    assert seen.wait(Event, 2)[1].lease.attrs == attrs_of(3)
    snapshots = seen.wait(Snapshot, 2)
    assert sorted(lease.subnet for lease in snapshots[1].leases) == [SEVEN, NINE]
    assert len(seen.of(StoreDown)) == 1
    assert not seen.of(LeaseLost)


def test_compaction_while_away(etcd: Etcd, node: tuple[Any, Recorder], attrs_of: Attrs) -> None:
    """What was missed for ever is made up for by a complete list, changed data included (upstream: F5)."""
    _, seen = node
    put_peer(etcd, attrs_of(2))
    put_peer(etcd, attrs_of(8), "10.244.20.0-24")
    seen.wait(Event, 2)
    port = etcd.port
    etcd.stop()
    seen.wait(StoreDown)
    # On another port, so that the store is still away while its history goes.
    etcd.port = port + 1 if port < 65000 else port - 1
    etcd.url = f"http://127.0.0.1:{etcd.port}"
    etcd.start()
    put_peer(etcd, attrs_of(3))
    etcd.delete("subnets/10.244.20.0-24")
    revision = put_peer(etcd, attrs_of(4), "10.244.30.0-24")
    etcd.ask("/v3/kv/compaction", {"revision": str(revision), "physical": True})
    etcd.stop()
    etcd.port, etcd.url = port, f"http://127.0.0.1:{port}"
    etcd.start()

    def made_up() -> bool:
        leases = {str(lease.subnet): lease.attrs for lease in seen.of(Snapshot)[-1].leases}
        return leases == {"10.244.7.0/24": attrs_of(1), "10.244.9.0/24": attrs_of(3), "10.244.30.0/24": attrs_of(4)}

    wait_for(made_up)
    assert all(snapshot.complete for snapshot in seen.of(Snapshot))
    assert not seen.of(LeaseLost)
    put_peer(etcd, attrs_of(5), "10.244.40.0-24")
    wait_for(lambda: "10.244.40.0/24" in [str(event.lease.subnet) for event in seen.of(Event)])


def test_an_etcd_restored_empty(etcd: Etcd, node: tuple[Any, Recorder], conf: NetConf, attrs_of: Attrs) -> None:
    """Its revisions begin anew: a watch from the old one would wait for ever."""
    store, seen = node
    for number in range(20):
        put_peer(etcd, attrs_of(2 + number % 2))
    seen.wait(Event, 20)
    etcd.stop(wipe=True)
    etcd.start()
    seen.wait(LeaseLost)
    assert seen.wait(Snapshot, 2)[1].leases == ()
    assert store.acquire(conf, attrs_of(1), SEVEN).subnet == SEVEN
    assert [lease.subnet for lease in seen.wait(Snapshot, 3)[2].leases] == [SEVEN]
    put_peer(etcd, attrs_of(2))
    assert seen.wait(Event, 21)[20].lease.subnet == NINE


def test_an_update_waits_for_an_etcd_that_is_away(etcd: Etcd, node: tuple[Any, Recorder], attrs_of: Attrs) -> None:
    store, seen = node
    etcd.stop()
    seen.wait(StoreDown)
    store.update(attrs_of(77))
    etcd.start()
    wait_for(lambda: (etcd.get("subnets/10.244.7.0-24") or {})["value"] == lease_value(attrs_of(77)).decode())
    assert not seen.of(LeaseLost)


def test_many_leases_come_in_pages(etcd: Etcd, make_store: MakeStore, conf: NetConf, attrs_of: Attrs) -> None:
    count = 2 * PAGE + 1
    ops = []
    from tests.flannel.conftest import PREFIX, encoded

    for number in range(count):
        subnet = f"10.{1 + number // 250}.{number % 250}.0-24"
        ops.append(
            {"request_put": {"key": encoded(f"{PREFIX}/subnets/{subnet}"), "value": encoded(value_of("192.0.2.66"))}}
        )
    for start in range(0, count, 100):
        etcd.ask("/v3/kv/txn", {"success": ops[start : start + 100]})
    wide = conf._replace(network=IPv4Network("10.0.0.0/8"))
    store, seen = make_store(etcd)
    store.acquire(wide, attrs_of(1), IPv4Network("10.244.7.0/24"))
    store.watch(seen.post)
    assert len(seen.wait(Snapshot)[0].leases) == count + 1


class _Liar(BaseHTTPRequestHandler):
    """A gateway that says more keys than it gives, or ends in the middle of a page."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        page = {"header": {"revision": "9"}, "kvs": [], "count": "3"}
        body = json.dumps(page).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) + (50 if self.server.cut else 0)))  # type: ignore[attr-defined]
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(params=[False, True], ids=["too few", "cut"])
def liar(request: pytest.FixtureRequest) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Liar)
    server.cut = request.param  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_list_that_was_cut_is_never_a_shorter_complete_one(liar: str, make_store: MakeStore) -> None:
    store, seen = make_store([liar])
    store.watch(seen.post)
    reason = seen.wait(StoreDown)[0].reason
    assert "cut: 0 of 3" in reason or "broke off" in reason
    assert not seen.of(Snapshot)


def test_closing_ends_the_threads(etcd: Etcd, node: tuple[Any, Recorder]) -> None:
    store, seen = node
    store.close()
    wait_for(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("flannel-")])
    assert not seen.of(StoreDown)
    assert etcd.keys() == ["10.244.7.0-24"], "the lease stays"


def test_an_etcd_that_hangs_does_not_hang_the_caller(etcd: Etcd, make_store: MakeStore, conf: NetConf) -> None:
    other_store, _ = make_store([etcd.url])
    etcd.signal(signal.SIGSTOP)
    threads = [threading.Thread(target=_refused, args=(other_store,))]
    threads[0].start()
    threads[0].join(30)
    alive = threads[0].is_alive()
    etcd.signal(signal.SIGCONT)
    assert not alive


def _refused(store: Any) -> None:
    from flannel.stores.base import StoreError

    with pytest.raises(StoreError, match="no etcd endpoint answers"):
        store.network_config()


def test_the_end_of_an_earlier_lease_is_not_that_of_this_one(node: tuple[Any, Recorder]) -> None:
    """A watch may still bring the deletion of what was acquired again since."""
    store, seen = node
    key = b"/coreos.com/network/subnets/10.244.7.0-24"
    store.own_key_deleted(key, 1)
    assert not seen.of(LeaseLost)
    store.own_key_deleted(key, 10**9)
    assert seen.of(LeaseLost)
