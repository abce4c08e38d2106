"""A real etcd on loopback, with ports and a data folder of its own, and what tests do to it."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from flannel.lease import LeaseAttrs
from flannel.netconf import NetConf, parse
from flannel.stores.base import Message
from flannel.stores.etcd import EtcdStore
from tests.flannel.waiting import PATIENCE as PATIENCE
from tests.flannel.waiting import until

PREFIX = "/coreos.com/network"
EC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


eventually = until


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    socks = [socket.socket() for _ in range(count)]
    for sock in socks:
        sock.bind(("127.0.0.1", 0))
    ports = [sock.getsockname()[1] for sock in socks]
    for sock in socks:
        sock.close()
    return ports


class Certificates:
    """PEM files: a CA, a server's, and clients' with and without a CommonName."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = folder / "ca.pem"
        self._openssl("req", "-x509", *EC, "-days", "2", "-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.pem")
        self.make("server", "/O=etcd")

    def make(self, name: str, subject: str) -> tuple[str, str]:
        """Make a key and a certificate; return their paths."""
        self._openssl("req", *EC, "-subj", subject, "-keyout", f"{name}.key", "-out", f"{name}.csr")
        (self.folder / "ext").write_text("subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n")
        ca = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "ext")
        self._openssl("x509", "-req", *ca, "-in", f"{name}.csr", "-out", f"{name}.pem")
        return str(self.folder / f"{name}.key"), str(self.folder / f"{name}.pem")

    def _openssl(self, *argv: str) -> None:
        subprocess.run(["openssl", *argv], cwd=self.folder, check=True, capture_output=True)


class Etcd:
    """One etcd process."""

    def __init__(self, folder: Path, *, tls: Certificates | None = None, extra: Sequence[str] = ()) -> None:
        self.folder, self.tls, self.extra = folder, tls, tuple(extra)
        self.port, self._peer_port = free_ports(2)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        self.client_cert: tuple[str, str] | None = None

    def start(self) -> None:
        """Start it and wait until it serves."""
        peer = f"http://127.0.0.1:{self._peer_port}"
        argv = [
            *("etcd", "--data-dir", str(self.folder / "data"), "--name", "a"),
            *("--listen-client-urls", self.url, "--advertise-client-urls", self.url),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"a={peer}"),
            *("--heartbeat-interval", "20", "--election-timeout", "200"),
            *self.extra,
        ]
        if self.tls:
            folder = self.tls.folder
            argv += ["--cert-file", str(folder / "server.pem"), "--key-file", str(folder / "server.key")]
            argv += ["--client-cert-auth", "--trusted-ca-file", str(self.tls.ca)]
        with (self.folder / "etcd.log").open("ab") as log:
            self._process = subprocess.Popen(argv, stdout=log, stderr=log, env={"PATH": "/usr/bin:/bin", "HOME": "/"})
        eventually(self._serves, f"etcd serves: see {self.folder}/etcd.log", 30)

    def _serves(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                if self.tls is not None or "--enable-grpc-gateway=false" in self.extra:
                    return "serving" in (self.folder / "etcd.log").read_text()
            self.ask("/v3/kv/range", {"key": encoded("x")})
        except (OSError, RuntimeError, http.client.HTTPException):
            return False
        return True

    def stop(self, *, wipe: bool = False) -> None:
        """Kill it; `wipe` loses its data, too."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if wipe:
            shutil.rmtree(self.folder / "data")

    def signal(self, number: int) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def ask(self, path: str, body: dict[str, Any], token: str = "") -> dict[str, Any]:
        """Ask the JSON gateway; RuntimeError unless it says 200."""
        connection: http.client.HTTPConnection
        if self.tls:
            context = ssl.create_default_context(cafile=str(self.tls.ca))
            key, cert = self.client_cert or (self.tls.folder / "server.key", self.tls.folder / "server.pem")
            context.load_cert_chain(cert, key)
            connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=10, context=context)
        else:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection):
            connection.request("POST", path, json.dumps(body), {"Authorization": token} if token else {})
            answer = connection.getresponse()
            text = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status} {text!r}")
        decoded: dict[str, Any] = json.loads(text)
        return decoded

    def put(self, key: str, value: str, lease: str = "0") -> int:
        """Write a key below the prefix; return the revision."""
        body = {"key": encoded(f"{PREFIX}/{key}"), "value": encoded(value), "lease": lease}
        return int(self.ask("/v3/kv/put", body)["header"]["revision"])

    def get(self, key: str) -> dict[str, Any] | None:
        """Return a key's fields, its value as text."""
        kvs = self.ask("/v3/kv/range", {"key": encoded(f"{PREFIX}/{key}")}).get("kvs", [])
        return {**kvs[0], "value": base64.b64decode(kvs[0].get("value", "")).decode()} if kvs else None

    def delete(self, key: str) -> None:
        """Delete a key below the prefix."""
        self.ask("/v3/kv/deleterange", {"key": encoded(f"{PREFIX}/{key}")})

    def keys(self) -> list[str]:
        """Return the names below `subnets/`."""
        start = f"{PREFIX}/subnets/"
        body = {"key": encoded(start), "range_end": encoded(start[:-1] + "0")}
        return [
            base64.b64decode(kv["key"]).decode()[len(start) :] for kv in self.ask("/v3/kv/range", body).get("kvs", [])
        ]

    def time_to_live(self, lease: str) -> tuple[int, int]:
        """Return an etcd lease's granted and remaining seconds."""
        answer = self.ask("/v3/lease/timetolive", {"ID": lease})
        return int(answer.get("grantedTTL", 0)), int(answer.get("TTL", 0))

    def enable_auth(self, user: str, password: str = "") -> None:
        """Switch authentication on, with a root user and one for the prefix; no password means by certificate only."""
        range_end = f"{PREFIX}0"
        permission = {"permType": 2, "key": encoded(f"{PREFIX}/"), "range_end": encoded(range_end)}
        options = {} if password else {"options": {"no_password": True}}
        self.ask("/v3/auth/user/add", {"name": "root", "password": "root"})
        self.ask("/v3/auth/role/add", {"name": "flannel"})
        self.ask("/v3/auth/role/grant", {"name": "flannel", "perm": permission})
        self.ask("/v3/auth/user/add", {"name": user, "password": password, **options})
        self.ask("/v3/auth/user/grant", {"user": user, "role": "flannel"})
        self.ask("/v3/auth/user/grant", {"user": "root", "role": "root"})
        self.ask("/v3/auth/enable", {})


def encoded(text: str) -> str:
    """Return text as the gateway takes bytes."""
    return base64.b64encode(text.encode()).decode()


class Recorder:
    """What a store posted and logged."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._messages: list[Message] = []
        self.lines: list[tuple[str, str]] = []

    def post(self, message: Message) -> None:
        """Take a message."""
        with self._lock:
            self._messages.append(message)

    def log(self, level: str, text: str) -> None:
        """Take a log line."""
        self.lines.append((level, text))

    def of(self, kind: type) -> list[Any]:
        """Return the messages of one class so far."""
        with self._lock:
            return [message for message in self._messages if isinstance(message, kind)]

    def wait(self, kind: type, count: int = 1, seconds: float = PATIENCE) -> list[Any]:
        """Return the messages of one class once there are `count`."""
        return list(
            eventually(lambda: len(self.of(kind)) >= count and self.of(kind), f"{count} {kind.__name__}", seconds)
        )

    def warned(self, fragment: str) -> bool:
        """Return whether a warning has `fragment` in it."""
        return any(level == "warning" and fragment in text for level, text in list(self.lines))


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is missing, so there is nobody to make certificates")
    return Certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def make_etcd(tmp_path: Path) -> Iterator[Callable[..., Etcd]]:
    """Return a function that starts an etcd; all are killed in the end."""
    if shutil.which("etcd") is None:
        pytest.skip("etcd is missing (Debian and Ubuntu: etcd-server)")
    made: list[Etcd] = []

    def make(**options: Any) -> Etcd:
        folder = tmp_path / f"etcd{len(made)}"
        folder.mkdir()
        made.append(Etcd(folder, **options))
        made[-1].start()
        return made[-1]

    yield make
    for etcd in made:
        etcd.stop()


@pytest.fixture
def etcd(make_etcd: Callable[..., Etcd]) -> Etcd:
    """An etcd without authentication."""
    return make_etcd()


@pytest.fixture
def make_store() -> Iterator[Callable[..., tuple[EtcdStore, Recorder]]]:
    """Return a function that makes a store for an etcd (or for endpoints), and what it posts; all are closed."""
    made: list[EtcdStore] = []

    def make(where: Etcd | list[str], **options: Any) -> tuple[EtcdStore, Recorder]:
        recorder = Recorder()
        endpoints = where if isinstance(where, list) else [where.url]
        made.append(EtcdStore(endpoints, PREFIX, recorder.log, **options))
        return made[-1], recorder

    yield make
    for store in made:
        store.close()


@pytest.fixture
def conf() -> NetConf:
    """The usual network."""
    return parse('{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}')


@pytest.fixture
def attrs_of() -> Callable[[int], LeaseAttrs]:
    """Return a function that gives node number N's attributes."""

    def attrs(number: int) -> LeaseAttrs:
        mac = f"0a:00:00:00:{number // 256:02x}:{number % 256:02x}"
        return LeaseAttrs(IPv4Address("192.0.2.0") + number, "vxlan", {"VNI": 1, "VtepMAC": mac})

    return attrs
