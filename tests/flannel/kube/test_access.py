"""The Kubernetes store by flags and environment, and what only Kubernetes' own API can answer."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flannel.stores.base import Snapshot, StoreDown, StoreError
from flannel.stores.kubernetes import KubernetesStore
from flannel.stores.kubernetes_config import find_access
from flannel.stores.kubernetes_http import KubeClient
from flannel.stores.kubernetes_open import KubeFlags, open_store
from tests.flannel.conftest import Recorder, eventually
from tests.flannel.kubeapi import FaultProxy, SmallApi, node_object
from tests.flannel.kubelab import Api, MakeStore, settled, subnets
from tests.flannel.realapi import RealApi


def flags(url: str = "", kubeconfig: str = "", prefix: str = "flannel.alpha.coreos.com") -> KubeFlags:
    return KubeFlags(url, kubeconfig, prefix, "/nonexistent/net-conf.json", set_condition=True)


def test_node_name(small: SmallApi, proxy: FaultProxy) -> None:
    log = Recorder().log
    assert open_store(flags(proxy.url), {"NODE_NAME": "here"}, log).node_name == "here"
    pod = {"POD_NAME": "flannel-x", "POD_NAMESPACE": "kube-flannel"}
    assert proxy.count("/pods/") == 0
    assert open_store(flags(proxy.url), pod, log).node_name == "node1"
    assert proxy.count("GET /api/v1/namespaces/kube-flannel/pods/flannel-x") == 1
    with pytest.raises(StoreError, match="NODE_NAME"):
        open_store(flags(proxy.url), {"POD_NAME": "x"}, log)
    with pytest.raises(StoreError, match="EVENT_QUEUE_DEPTH"):
        open_store(flags(proxy.url), {"NODE_NAME": "here", "EVENT_QUEUE_DEPTH": "many"}, log)
    with pytest.raises(StoreError, match="kube-annotation-prefix"):
        open_store(flags(proxy.url, prefix="x"), {"NODE_NAME": "here"}, log)


def test_network_configuration(make_store: MakeStore, tmp_path: Path) -> None:
    store, _ = make_store()
    with pytest.raises(StoreError, match="net-conf.json: No such file"):
        store.network_config()
    (tmp_path / "net-conf.json").write_text('{"Network": "10.244.0.0/16"}')
    assert store.network_config() == '{"Network": "10.244.0.0/16"}'


def test_token_is_read_again(small: SmallApi, proxy: FaultProxy, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("first\n")
    access = find_access(proxy.url, "", {})
    client = KubeClient(access._replace(token_file=str(token)))
    client.get("/api/v1/nodes/node1")
    token.write_text("second\n")
    client.get("/api/v1/nodes/node1")
    assert small.authorizations[-2:] == ["Bearer first", "Bearer second"]
    token.write_text("")
    with pytest.raises(StoreError, match="holds no token"):
        client.get("/api/v1/nodes/node1")


# -- what only Kubernetes' own API can answer ----------------------------------------------------------------------


def come_back_at(
    version: str, store: KubernetesStore, proxy: FaultProxy, recorder: Recorder, meanwhile: Callable[[], None]
) -> None:
    """Have an outage, in which the version that all is known up to becomes another one."""
    watcher = store._watcher
    assert watcher is not None
    proxy.away = True
    watcher._end_stream()
    recorder.wait(StoreDown)
    meanwhile()
    watcher._version = version
    proxy.away = False


def test_history_that_is_another_one(api: Api, following: MakeStore, proxy: FaultProxy) -> None:
    store, recorder = following()
    come_back_at("99999999", store, proxy, recorder, lambda: None)
    recorder.wait(Snapshot, 2)
    assert recorder.warned("history is another one")
    settled(api, proxy, recorder)


def test_api_server_that_restarts_has_forgotten_old_versions(
    real: RealApi, following: MakeStore, proxy: FaultProxy
) -> None:
    real.put(node_object(2))
    store, recorder = following()
    come_back_at("2", store, proxy, recorder, real.restart_server)
    eventually(lambda: proxy.count("limit=3") == 2, "the nodes are listed again", 10)
    assert subnets(recorder.of(Snapshot)[-1]) == ["10.244.1.0/24", "10.244.2.0/24"]
    assert any("listing again" in text and "410" in text for _, text in recorder.lines)
    settled(real, proxy, recorder)


def kubeconfig(folder: Path, real: RealApi, user: dict[str, str], **cluster: str) -> KubeClient:
    """A client by a kubeconfig whose certificates stand in it."""
    config = {
        "current-context": "x",
        "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
        "clusters": [{"name": "x", "cluster": {"server": real.plane.url, **cluster}}],
        "users": [{"name": "x", "user": user}],
    }
    (folder / "kubeconfig").write_text(json.dumps(config))
    return KubeClient(find_access("", str(folder / "kubeconfig"), {}))


def encoded(path: str) -> str:
    return base64.b64encode(Path(path).read_bytes()).decode()


def test_certificates_inline_and_by_path(real: RealApi, tmp_path: Path) -> None:
    pki = real.plane.folder
    inline = {"client-certificate-data": encoded(f"{pki}/admin.crt"), "client-key-data": encoded(f"{pki}/admin.key")}
    by_path = {"client-certificate": f"{pki}/admin.crt", "client-key": f"{pki}/admin.key"}
    ca, ca_data = {"certificate-authority": f"{pki}/ca.crt"}, {"certificate-authority-data": encoded(f"{pki}/ca.crt")}
    for user, cluster in (
        (inline, ca_data),
        (by_path, ca),
        (inline, {"tls-server-name": "kubernetes.default.svc", **ca}),
    ):
        client = kubeconfig(tmp_path, real, user, **cluster)
        assert client.get("/api/v1/nodes/node1")["metadata"]["name"] == "node1"


def test_server_that_is_not_the_one_is_refused(real: RealApi, tmp_path: Path) -> None:
    pki = real.plane.folder
    for cluster in (
        {},
        {"certificate-authority": f"{pki}/admin.crt"},
        {"certificate-authority": f"{pki}/ca.crt", "tls-server-name": "x"},
    ):
        client = kubeconfig(tmp_path, real, {"token": "x"}, **cluster)
        with pytest.raises(StoreError, match="CERTIFICATE_VERIFY_FAILED"):
            client.get("/api/v1/nodes/node1")
    broken = kubeconfig(tmp_path, real, {}, **{"certificate-authority": f"{pki}/none.crt"})
    with pytest.raises(StoreError, match="cannot use the certificates"):
        broken.get("/api/v1/nodes/node1")


def test_token_and_what_it_may_do(real: RealApi, tmp_path: Path) -> None:
    ca = {"certificate-authority": f"{real.plane.folder}/ca.crt"}
    with pytest.raises(StoreError, match="401.*not accepted"):
        kubeconfig(tmp_path, real, {"token": "junk"}, **ca).get("/api/v1/nodes/node1")
    accounts = "/api/v1/namespaces/default/serviceaccounts"
    real.ask("POST", accounts, {"metadata": {"name": "nobody"}})
    _, answer = real.ask("POST", f"{accounts}/nobody/token", {"spec": {}})
    with pytest.raises(StoreError, match="403.*ClusterRole"):
        kubeconfig(tmp_path, real, {"token": answer["status"]["token"]}, **ca).get("/api/v1/nodes/node1")
