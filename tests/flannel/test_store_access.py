"""Reaching an etcd: dead endpoints, a password, TLS, and certificates that its gateway refuses."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from ipaddress import IPv4Network
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flannel.lease import LeaseAttrs
from flannel.netconf import NetConf
from flannel.stores.base import Event, LeaseLost, Renewed, Snapshot, StoreDown, StoreError
from flannel.stores.etcd_client import TlsFiles, parse_endpoint
from flannel.stores.leasecodec import lease_value
from tests.flannel.waiting import until

if TYPE_CHECKING:
    from tests.flannel.conftest import Certificates, Etcd

MakeStore = Callable[..., Any]
MakeEtcd = Callable[..., Any]
Attrs = Callable[[int], LeaseAttrs]
SEVEN = IPv4Network("10.244.7.0/24")
ROOT = Path(__file__).parents[2]


def exercise(etcd: Etcd, store: Any, seen: Any, conf: NetConf, attrs_of: Attrs) -> None:
    """Everything that a node asks of a store."""
    assert store.acquire(conf, attrs_of(1), SEVEN).subnet == SEVEN
    assert store.acquire(conf, attrs_of(1), None).subnet == SEVEN
    store.update(attrs_of(1))
    store.watch(seen.post)
    assert [lease.subnet for lease in seen.wait(Snapshot)[0].leases] == [SEVEN]
    seen.wait(Renewed)


# -- endpoints ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "files", "host", "port", "tls"),
    [
        ("http://127.0.0.1:2379", TlsFiles(), "127.0.0.1", 2379, False),
        ("https://etcd.example", TlsFiles(), "etcd.example", 2379, True),
        ("127.0.0.1:4001", TlsFiles(), "127.0.0.1", 4001, False),
        ("127.0.0.1:4001", TlsFiles(ca="ca"), "127.0.0.1", 4001, False),
        ("127.0.0.1:4001", TlsFiles("key", "cert"), "127.0.0.1", 4001, True),
        ("http://[fd00::1]:2379/", TlsFiles(), "fd00::1", 2379, False),
    ],
)
def test_endpoints(text: str, files: TlsFiles, host: str, port: int, tls: bool) -> None:
    assert parse_endpoint(text, files)[1:] == (host, port, tls)


@pytest.mark.parametrize(
    "text", ["ftp://x", "http://", "http://x:port", "http://x/v3", "unix:///run/x", "http://x:99999"]
)
def test_bad_endpoints(text: str, make_store: MakeStore) -> None:
    with pytest.raises(StoreError, match="endpoint"):
        make_store([text])


def test_no_endpoint(make_store: MakeStore) -> None:
    with pytest.raises(StoreError, match="no etcd endpoint"):
        make_store([" ", ""])


def test_one_endpoint_of_three_is_alive(etcd: Etcd, make_store: MakeStore, conf: NetConf, attrs_of: Attrs) -> None:
    """One refuses, one takes connections and never answers: neither costs more than its own short wait, once."""
    refuses = socket.socket()
    refuses.bind(("127.0.0.1", 0))
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        endpoints = [f"http://127.0.0.1:{sock.getsockname()[1]}" for sock in (refuses, deaf)]
        store, seen = make_store([*endpoints, etcd.url], ttl=3, renew_margin=2)
        started = time.monotonic()
        store.acquire(conf, attrs_of(1), SEVEN)
        first = time.monotonic() - started
        started = time.monotonic()
        exercise(etcd, store, seen, conf, attrs_of)
        assert time.monotonic() - started < 5, "the endpoint that answered is asked first from then on"
    refuses.close()
    assert first < 10
    assert not seen.of(StoreDown)


def test_the_endpoint_in_use_dies(make_etcd: MakeEtcd, make_store: MakeStore, conf: NetConf, attrs_of: Attrs) -> None:
    """Two doors to one etcd; the first is shut."""
    etcd = make_etcd()
    with _Door(etcd.port) as door:
        store, seen = make_store([f"http://127.0.0.1:{door.port}", etcd.url])
        store.acquire(conf, attrs_of(1), SEVEN)
        store.watch(seen.post)
        seen.wait(Snapshot)
        etcd.put("subnets/10.244.9.0-24", lease_value(attrs_of(2)).decode())
        seen.wait(Event)
        door.shut()
        seen.wait(StoreDown)
        etcd.put("subnets/10.244.9.0-24", lease_value(attrs_of(3)).decode())
        assert seen.wait(Event, 2)[1].lease.attrs == attrs_of(3)


class _Door:
    """A TCP relay that can be shut."""

    def __init__(self, port: int) -> None:
        code = (
            "import asyncio,sys\n"
            "async def pump(r, w):\n"
            "    try:\n"
            "        while data := await r.read(65536):\n"
            "            w.write(data); await w.drain()\n"
            "    finally: w.close()\n"
            "async def relay(r, w):\n"
            "    r2, w2 = await asyncio.open_connection('127.0.0.1', int(sys.argv[1]))\n"
            "    await asyncio.gather(pump(r, w2), pump(r2, w), return_exceptions=True)\n"
            "async def main():\n"
            "    server = await asyncio.start_server(relay, '127.0.0.1', 0)\n"
            "    print(server.sockets[0].getsockname()[1], flush=True)\n"
            "    await server.serve_forever()\n"
            "asyncio.run(main())\n"
        )
        argv = [sys.executable, "-c", code, str(port)]
        self._process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def shut(self) -> None:
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> _Door:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shut()
        assert self._process.stdout is not None
        self._process.stdout.close()


# -- a password --------------------------------------------------------------------------------------------------------


def test_password(make_etcd: MakeEtcd, make_store: MakeStore, conf: NetConf, attrs_of: Attrs) -> None:
    """Tokens live for a second here, so that they run out between calls."""
    etcd = make_etcd(extra=["--auth-token-ttl", "1"])
    etcd.enable_auth("flannel", "secret")
    store, seen = make_store(etcd, username="flannel", password="secret", ttl=6, renew_margin=4)
    exercise(etcd, store, seen, conf, attrs_of)
    assert len(seen.wait(Renewed, 3)) == 3
    assert not seen.of(LeaseLost)


def test_a_token_dies_with_its_etcd(make_etcd: MakeEtcd, make_store: MakeStore, conf: NetConf, attrs_of: Attrs) -> None:
    etcd = make_etcd()
    etcd.enable_auth("flannel", "secret")
    store, seen = make_store(etcd, username="flannel", password="secret")
    store.acquire(conf, attrs_of(1), SEVEN)
    store.watch(seen.post)
    seen.wait(Snapshot)
    etcd.stop()
    seen.wait(StoreDown)
    # With authentication on, only a connection tells that it serves.
    etcd._serves = lambda: _connects(etcd.port)
    etcd.start()
    assert [lease.subnet for lease in seen.wait(Snapshot, 2)[1].leases] == [SEVEN]
    assert store.acquire(conf, attrs_of(1), None).subnet == SEVEN


def test_a_watch_that_ends_when_its_token_is_dead(
    make_etcd: MakeEtcd, make_store: MakeStore, conf: NetConf, attrs_of: Attrs
) -> None:
    """etcd answers a watch with a dead token by "permission denied"."""
    etcd = make_etcd(extra=["--auth-token-ttl", "1", "--logger", "zap"])
    etcd.enable_auth("flannel", "secret")
    with _Door(etcd.port) as door:
        endpoints = [f"http://127.0.0.1:{door.port}", etcd.url]
        store, seen = make_store(endpoints, username="flannel", password="secret")
        store.acquire(conf, attrs_of(1), SEVEN)
        store.watch(seen.post)
        seen.wait(Snapshot)
        first = store._client._token
        log = etcd.folder / "etcd.log"  # by zap it tells of dead tokens; asking with one would keep it alive
        until(lambda: first in log.read_text(), "etcd has forgotten the token")
        door.shut()
        seen.wait(StoreDown)
        seen.wait(Snapshot, 2)
        assert store._client._token != first


def _connects(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def test_a_wrong_password_and_none(make_etcd: MakeEtcd, make_store: MakeStore) -> None:
    etcd = make_etcd()
    etcd.enable_auth("flannel", "secret")
    with pytest.raises(StoreError, match="does not accept user 'flannel'") as caught:
        make_store(etcd, username="flannel", password="hunter2")[0].network_config()
    assert "hunter2" not in str(caught.value)
    with pytest.raises(StoreError, match="user name is empty"):
        make_store(etcd)[0].network_config()


def test_a_password_that_nobody_asks_for(etcd: Etcd, make_store: MakeStore) -> None:
    etcd.put("config", "{}")
    assert make_store(etcd, username="flannel", password="secret")[0].network_config() == "{}"


# -- TLS ---------------------------------------------------------------------------------------------------------------


def files(certificates: Certificates, pair: tuple[str, str]) -> dict[str, str]:
    return {"keyfile": pair[0], "certfile": pair[1], "cafile": str(certificates.ca)}


def test_tls(
    certificates: Certificates, make_etcd: MakeEtcd, make_store: MakeStore, conf: NetConf, attrs_of: Attrs
) -> None:
    etcd = make_etcd(tls=certificates)
    pair = certificates.make("plain", "/O=flannel")
    store, seen = make_store(etcd, ttl=3, renew_margin=2, **files(certificates, pair))
    exercise(etcd, store, seen, conf, attrs_of)
    etcd.put("subnets/10.244.9.0-24", lease_value(attrs_of(2)).decode())
    seen.wait(Event)
    assert not any("gRPC" in text for _, text in seen.lines)
    store.close()


def test_an_etcd_of_another_ca(
    certificates: Certificates, make_etcd: MakeEtcd, make_store: MakeStore, tmp_path: Path
) -> None:
    etcd = make_etcd(tls=certificates)
    other = type(certificates)(tmp_path)
    pair = certificates.make("plain", "/O=flannel")
    with pytest.raises(StoreError, match="CERTIFICATE_VERIFY_FAILED"):
        make_store(etcd, keyfile=pair[0], certfile=pair[1], cafile=str(other.ca))[0].network_config()


def test_files_that_are_no_certificates(certificates: Certificates, make_store: MakeStore, tmp_path: Path) -> None:
    (tmp_path / "junk").write_text("junk")
    junk = str(tmp_path / "junk")
    with pytest.raises(StoreError, match=f"CA file {junk}"):
        make_store(["https://127.0.0.1:1"], cafile=junk)
    with pytest.raises(StoreError, match=f"certificate {junk}"):
        make_store(["https://127.0.0.1:1"], keyfile=junk, certfile=junk, cafile=str(certificates.ca))
    with pytest.raises(StoreError, match="CA file /none"):
        make_store(["https://127.0.0.1:1"], cafile="/none")


@pytest.fixture
def picky(certificates: Certificates, make_etcd: MakeEtcd) -> Etcd:
    """An etcd with authentication by the CommonName of client certificates."""
    etcd: Etcd = make_etcd(tls=certificates)
    etcd.enable_auth("flannel")
    return etcd


def test_a_certificate_with_a_common_name(
    certificates: Certificates, picky: Etcd, make_store: MakeStore, conf: NetConf, attrs_of: Attrs
) -> None:
    pytest.importorskip("grpc", reason="grpcio is missing")
    named = files(certificates, certificates.make("named", "/CN=flannel"))
    store, seen = make_store(picky, ttl=3, renew_margin=2, **named)
    exercise(picky, store, seen, conf, attrs_of)
    assert any("Speaking gRPC with etcd" in text and "CommonName" in text for _, text in seen.lines)
    other, others = make_store(picky, **named)
    other.acquire(conf, attrs_of(2), None)
    other.watch(others.post)
    assert seen.wait(Event)[0].lease.attrs == attrs_of(2)
    assert SEVEN in [lease.subnet for lease in others.wait(Snapshot)[0].leases]
    # Not by chance: the certificate of a user without the right is refused, by gRPC as well.
    stranger = files(certificates, certificates.make("stranger", "/CN=stranger"))
    with pytest.raises(StoreError, match=r"permission denied|user name not found|invalid"):
        make_store(picky, **stranger)[0].network_config()


def test_grpc_survives_a_restart(
    certificates: Certificates, picky: Etcd, make_store: MakeStore, conf: NetConf, attrs_of: Attrs
) -> None:
    pytest.importorskip("grpc", reason="grpcio is missing")
    store, seen = make_store(picky, **files(certificates, certificates.make("named", "/CN=flannel")))
    store.acquire(conf, attrs_of(1), SEVEN)
    store.watch(seen.post)
    seen.wait(Snapshot)
    picky.stop()
    seen.wait(StoreDown)
    picky.start()
    assert [lease.subnet for lease in seen.wait(Snapshot, 2)[1].leases] == [SEVEN]
    assert not seen.of(LeaseLost)


def test_a_gateway_that_is_switched_off(
    make_etcd: MakeEtcd, make_store: MakeStore, conf: NetConf, attrs_of: Attrs
) -> None:
    pytest.importorskip("grpc", reason="grpcio is missing")
    etcd = make_etcd(extra=["--enable-grpc-gateway=false"])
    store, seen = make_store(etcd, ttl=3, renew_margin=2)
    exercise(etcd, store, seen, conf, attrs_of)


ASK = """
import sys
sys.path.insert(0, sys.argv[1])
from flannel.stores.base import StoreError
from flannel.stores.etcd import EtcdStore
key, cert, ca = sys.argv[3:6]
if len(sys.argv) > 6:
    import site
    site.main = lambda: None
store = EtcdStore([sys.argv[2]], "/coreos.com/network", lambda *a: None, keyfile=key, certfile=cert, cafile=ca)
try:
    print(store.network_config())
except StoreError as error:
    print("error:", error)
print("loaded" if "grpc" in sys.modules else "not loaded")
"""


def test_grpc_is_found_without_site_packages_and_missed_with_an_advice(
    certificates: Certificates, picky: Etcd, make_store: MakeStore
) -> None:
    """flanneld runs with -I -S."""
    named = certificates.make("named", "/CN=flannel")
    argv = [sys.executable, "-I", "-S", "-c", ASK, str(ROOT), picky.url, *named, str(certificates.ca)]
    without = subprocess.run([*argv, "hide"], capture_output=True, text=True, timeout=60, check=True).stdout
    assert "install Python's grpcio" in without
    assert without.endswith("not loaded\n")
    pytest.importorskip("grpc", reason="grpcio is missing")
    found = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.splitlines() == [
        "error: etcd has no key /coreos.com/network/config: write the network configuration there",
        "loaded",
    ]
    assert found.stderr == ""


def test_grpc_is_not_loaded_where_the_gateway_serves(etcd: Etcd) -> None:
    etcd.put("config", "{}")
    argv = [sys.executable, "-I", "-S", "-c", ASK, str(ROOT), etcd.url, "", "", ""]
    assert subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout == "{}\nnot loaded\n"
