"""No PSK, key, token or password reaches the log, at any -v; and what is misspelt is named there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flannel import cli, log
from flannel.backends.choice import make_backend
from flannel.netconf import NetConfError, parse
from flannel.stores.base import StoreError
from flannel.stores.kubernetes_config import find_access
from flannel.stores.kubernetes_http import KubeClient
from flannel.stores.kubernetes_nodes import Keys
from tests.flannel.backendlab import EXTERNAL, conf
from tests.flannel.conftest import Etcd
from tests.flannel.corelab import Node, peer, until
from tests.flannel.kubeapi import FaultProxy, SmallApi, node_object

SECRET = "sesam-0ffne-dich"
PSK = "cHNrLXBzay1wc2stcHNrLXBzay1wc2stcHNrLXBzay0="


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("verbosity", ["0", "4", "10"])
def test_of_a_daemon_with_every_secret_there_is(node: Node, verbosity: str) -> None:
    """In flags, in the environment, in words that nobody reads, and in the network configuration."""
    daemon = node.start(
        f"-v={verbosity}", f"--etcd-password={SECRET}", f"--etcd-endpoints=http://user:{SECRET}@127.0.0.1:2379",
        f"--kube-api-url=https://user:{SECRET}@127.0.0.1:6443/path", "word", f"--etcd-password={SECRET}",
        "--etcd-password", SECRET,
        backend={"Type": "vxlan", "PSK": PSK, "AccessKeySecret": SECRET},
        environment={"FLANNELD_ETCD_PASWORD": SECRET, "ACCESS_KEY_SECRET": SECRET},
    )  # fmt: skip
    daemon.list(peer(2))
    until(lambda: node.programmed(2), "a peer")
    assert daemon.stop() == 0
    assert SECRET not in daemon.log
    assert PSK not in daemon.log
    assert "nobody reads the variable FLANNELD_ETCD_PASWORD" in daemon.log
    assert "words after the flags are not read: word --etcd-password=*** --etcd-password ***" in daemon.log
    assert "nobody reads the key 'psk'" in daemon.log
    assert "http://***@127.0.0.1:2379" in daemon.log


@pytest.mark.parametrize(
    ("urls", "shown"),
    [
        ("http://a:b@c:1", "http://***@c:1"),
        ("http://a:b@c:1,https://d/e@f", "http://***@c:1,https://d/e@f"),
        ("https://a:p@ss@c/path", "https://***@c/path"),
        ("a:b@c:1,http://d", "***@c:1,http://d"),
        ("/coreos.com/network", "/coreos.com/network"),
        ("^eth[0-9]@if3$", "^eth[0-9]@if3$"),
        ("", ""),
    ],
)
def test_urls_are_shown_without_who_asks(urls: str, shown: str) -> None:
    assert log.without_userinfo(urls) == shown


def test_an_endpoint_that_cannot_be_used(make_store: Callable[..., Any]) -> None:
    with pytest.raises(StoreError, match="write it as") as caught:
        make_store([f"ftp://user:{SECRET}@127.0.0.1:1"])
    assert SECRET not in str(caught.value)


def test_an_etcd_that_does_not_answer_at_an_url_with_a_password(make_store: Callable[..., Any]) -> None:
    store, _ = make_store([f"http://user:{SECRET}@127.0.0.1:1"])
    with pytest.raises(StoreError, match="no etcd endpoint answers") as caught:
        store.network_config()
    assert SECRET not in str(caught.value)


def test_etcds_password_and_what_is_said_of_it(make_etcd: Callable[..., Etcd], make_store: Callable[..., Any]) -> None:
    etcd = make_etcd()
    etcd.enable_auth("flannel", "right")
    store, seen = make_store(etcd, username="flannel", password=SECRET)
    with pytest.raises(StoreError) as caught:
        store.network_config()
    assert SECRET not in str(caught.value) + str(seen.lines)


@pytest.mark.parametrize(
    "backend",
    [
        {"Type": "ipsec", "PSK": SECRET},
        {"Type": "ipsec", "PSK": [PSK * 3]},
        {"Type": "ipsec", "PSK": PSK * 3, "UDPEncap": "no"},
        {"Type": "wireguard", "PSK": SECRET},
        {"Type": "wireguard", "PSK": {"key": PSK}},
        {"Type": "wireguard", "PSK": PSK, "Mode": "none"},
        {"Type": "vxlan", "PSK": PSK, "VNI": -1},
    ],
)
def test_a_configuration_that_is_refused(backend: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NetConfError) as caught:
        make_backend(conf(**backend), EXTERNAL)
    said = str(caught.value) + capfd.readouterr().err
    assert SECRET not in said
    assert PSK not in said


@pytest.mark.parametrize("text", ['["{}"]', '{{"Backend": "{}"}}', '{{"Backend": ["{}"]}}', "{{{}"])
def test_a_configuration_that_is_no_object(text: str) -> None:
    with pytest.raises(NetConfError) as caught:
        parse(text.format(PSK))
    assert PSK not in str(caught.value)


def test_a_token_and_what_is_said_of_it(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(SECRET)
    api = SmallApi()
    proxy = FaultProxy(api.port)
    try:
        client = KubeClient(find_access(proxy.url, "", {})._replace(token_file=str(token)))
        proxy.away = True
        with pytest.raises(StoreError) as caught:
            client.get("/api/v1/nodes/node1")
        token.write_text(SECRET + "\nx\r\n")
        with pytest.raises(StoreError) as again:
            client.get("/api/v1/nodes/node1")
    finally:
        proxy.close()
        api.close()
    assert SECRET not in str(caught.value) + str(again.value)


def test_a_kubeconfig_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(json.dumps({"current-context": "a", "users": [{"name": "a", "user": {"token": [SECRET]}}]}))
    with pytest.raises(StoreError) as caught:
        find_access("", str(path), {})
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("url", ["ftp://user:{}@h", "https://user:{}@h", "https://user:{}@h:port", "user:{}@h"])
def test_an_api_that_cannot_be_used(url: str) -> None:
    with pytest.raises(StoreError) as caught:
        find_access(url.format(SECRET), "", {})
    assert SECRET not in str(caught.value)


def test_a_bad_value_of_a_secret_flag() -> None:
    assert SECRET not in cli.parse([f"--etcd-password={SECRET}"], {}).describe()
    assert SECRET not in cli.parse([], {"FLANNELD_ETCD_PASSWORD": SECRET}).describe()


# -- what nobody reads -------------------------------------------------------------------------------------------------


def test_variables_of_no_flag_are_named() -> None:
    assert cli.parse([], {"FLANNELD_IFASE": "eth0", "FLANNELD_IFACE": "eth0", "OTHER": ""}).strange == (
        "FLANNELD_IFASE",
    )


def test_annotations_of_no_meaning_are_named() -> None:
    keys = Keys("flannel.alpha.coreos.com")
    names = [*node_object(1)["metadata"]["annotations"], "flannel.alpha.coreos.com/public-ip-overide", "other/x"]
    assert keys.strange(names) == ["flannel.alpha.coreos.com/public-ip-overide"]
