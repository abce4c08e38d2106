"""What checks ask a cluster for: what flannel did not write is flannel's fault, not the lab's."""

from __future__ import annotations

import py_compile
import tempfile
from collections.abc import Callable
from importlib import util
from ipaddress import IPv4Interface
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from testbed.errors import CommandError, Exit, ProductError
from testbed.flannelbuild import default_flannel
from testbed.nodes import deploy, nodefiles
from testbed.nodes.deploy import Cluster
from testbed.nodes.etcd import Etcd
from testbed.nodes.store import EtcdLeases
from testbed.options import RunOptions
from testbed.topology import load_topology


def cluster(text: str | None, leases: dict[str, Any] | None = None, patch: pytest.MonkeyPatch | None = None) -> Cluster:
    """A cluster whose every node has that subnet.env, or none."""

    def read(path: str) -> bytes:
        if text is None:
            raise FileNotFoundError(path)
        return text.encode()

    if patch:
        store = SimpleNamespace(title="etcd", leases=lambda: leases or {})
        patch.setattr(deploy, "store_of", lambda *_: store)
    lab = cast("Any", SimpleNamespace(node=lambda name: SimpleNamespace(name=name, read=read)))
    return Cluster(lab, default_flannel("vxlan"), RunOptions(backend="vxlan", name="x", reports=Path("reports")))


@pytest.mark.parametrize(
    ("text", "ask", "message"),
    [
        (None, lambda c: c.subnet_env("worker1"), "worker1: flanneld left no /run/flannel/subnet.env"),
        ("FLANNEL_MTU=1450\n", lambda c: c.pod_cidr("worker1"), "worker1: /run/.* has no FLANNEL_SUBNET"),
        ("FLANNEL_SUBNET=moon\n", lambda c: c.pod_cidr("worker1"), "FLANNEL_SUBNET=moon is no subnet"),
    ],
)
def test_a_subnet_env_that_is_not_as_it_should_be(
    text: str | None, ask: Callable[[Cluster], object], message: str
) -> None:
    with pytest.raises(ProductError, match=message) as caught:
        ask(cluster(text))
    assert caught.value.exit_code == Exit.FAILED


def test_a_subnet_env_as_it_should_be() -> None:
    made = cluster("FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.3.1/24\n")
    assert made.subnet("worker1") == IPv4Interface("10.244.3.1/24")
    assert set(made.subnet_env("worker1")) == {"FLANNEL_NETWORK", "FLANNEL_SUBNET"}


@pytest.mark.parametrize("alive", [False, True])
def test_a_signal_to_a_flanneld_that_is_gone_is_flannel_s_fault(alive: bool) -> None:
    """Where it runs and cannot be signalled, it is the lab's."""

    def run(argv: list[str], **_: object) -> SimpleNamespace:
        if argv[0] == "sh":
            raise CommandError("worker1", argv, 1, "kill: no such process")
        return SimpleNamespace(stdout="panic: its last words\n")

    def read(path: str) -> bytes:
        if path != "/run/flanneld.pid" and not alive:
            raise FileNotFoundError(path)
        return b"77"

    made = cluster("")
    node = SimpleNamespace(name="worker1", run=run, read=read)
    made.lab = cast("Any", SimpleNamespace(node=lambda name: node))
    with pytest.raises(CommandError if alive else ProductError) as caught:
        made.stop_flanneld("worker1")
    assert caught.value.exit_code == (Exit.LAB if alive else Exit.FAILED)
    assert alive or "flanneld is gone, and was to get SIGTERM\npanic: its last words" in str(caught.value)


def test_a_lease_that_lacks_something(monkeypatch: pytest.MonkeyPatch) -> None:
    lease = {"key": "10.244.3.0-24", "value": {"PublicIP": "10.0.0.12", "BackendData": {"VNI": 1}}}
    leases = cluster(None, {"worker1": lease}, monkeypatch).leases()
    assert leases["worker1"]["value"]["BackendData"]["VNI"] == 1
    assert leases == {"worker1": lease}
    with pytest.raises(ProductError, match="the list of leases in etcd has no worker2"):
        leases["worker2"]
    with pytest.raises(ProductError, match="etcd's worker1's value's BackendData has no VtepMAC"):
        leases["worker1"]["value"]["BackendData"]["VtepMAC"]


def test_the_bundled_flannel_is_compiled_as_python_would_and_without_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")  # a killed run would leave it behind
    nodefiles.bundled_library.cache_clear()
    files = nodefiles.bundled_library()
    source = tmp_path / "cli.py"
    source.write_bytes(files["cli.py"])
    wanted = py_compile.compile(
        str(source),
        str(tmp_path / "pyc"),
        f"{nodefiles.LIBRARY}/flannel/cli.py",
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    name = Path(util.cache_from_source("cli.py"))
    assert files[f"__pycache__/{name.name}"] == Path(str(wanted)).read_bytes()


@pytest.mark.parametrize("value", ["not JSON", "[]", "{}", '{"PublicIP": null}', '{"PublicIP": "moon"}'])
def test_a_lease_that_cannot_be_read(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "/coreos.com/network/subnets/10.244.3.0-24"
    monkeypatch.setattr(Etcd, "under", lambda *_: {key: value})
    lab = cast("Any", SimpleNamespace(spec=load_topology("flat", "x"), node=lambda _: None))
    with pytest.raises(ProductError, match=f"the lease {key} cannot be read"):
        EtcdLeases(lab, default_flannel("vxlan")).leases()
