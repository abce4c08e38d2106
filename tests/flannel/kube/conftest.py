"""Each test runs against a small API written for it, and against Kubernetes' own where that can be built; a proxy in
front of either makes it fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flannel.netconf import NetConf
from flannel.stores.base import Snapshot
from flannel.stores.kubernetes import KubernetesStore, Patience
from flannel.stores.kubernetes_config import find_access
from flannel.stores.kubernetes_http import KubeClient
from testbed.tools import ToolUnavailable
from tests.flannel.conftest import Recorder, eventually
from tests.flannel.kubeapi import FaultProxy, SmallApi, node_object
from tests.flannel.kubelab import OWN, QUICK, Api, MakeStore
from tests.flannel.realapi import RealApi


@pytest.fixture(scope="session")
def real_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealApi]:
    """Kubernetes' own API server, for all tests."""
    try:
        api = RealApi(tmp_path_factory.mktemp("kubernetes"))
    except ToolUnavailable as error:
        pytest.skip(str(error))
    try:
        api.wait_ready()
        yield api
    finally:
        api.close()


@pytest.fixture(params=["small", "real"])
def api(request: pytest.FixtureRequest) -> Iterator[Api]:
    api = SmallApi() if request.param == "small" else request.getfixturevalue("real_api")
    if isinstance(api, RealApi):
        api.delete_all()
    api.put(node_object(1, annotations={}))
    yield api
    if isinstance(api, SmallApi):
        api.close()


@pytest.fixture
def small(api: Api) -> SmallApi:
    """The small API, for tests that look inside it."""
    if not isinstance(api, SmallApi):
        pytest.skip("looks inside the small API")
    return api


@pytest.fixture
def real(api: Api) -> RealApi:
    """Kubernetes' own API, for tests of what only that can do."""
    if not isinstance(api, RealApi):
        pytest.skip("asks what only Kubernetes' own API can answer")
    return api


@pytest.fixture
def proxy(api: Api) -> Iterator[FaultProxy]:
    proxy = FaultProxy(api.port, tls=api.tls)
    yield proxy
    proxy.close()


@pytest.fixture
def make_store(proxy: FaultProxy, tmp_path: Path) -> Iterator[MakeStore]:
    made: list[KubernetesStore] = []

    def make(name: str = "node1", **options: Any) -> tuple[KubernetesStore, Recorder]:
        recorder = Recorder()
        options = {"timing": QUICK, "patience": Patience(1.5, 0.1, 0.4), **options}
        client = KubeClient(find_access(proxy.url, "", {}), timeout=options.pop("timeout", 5.0))
        made.append(KubernetesStore(client, name, str(tmp_path / "net-conf.json"), recorder.log, **options))
        return made[-1], recorder

    yield make
    for store in made:
        store.close()


@pytest.fixture
def following(make_store: MakeStore, conf: NetConf) -> Callable[..., tuple[KubernetesStore, Recorder]]:
    """Return a function that makes a store which has a lease and follows the others'."""

    def follow(**options: Any) -> tuple[KubernetesStore, Recorder]:
        store, recorder = make_store(**options)
        store.acquire(conf, OWN, None)
        store.watch(recorder.post)
        recorder.wait(Snapshot)
        # What a test makes fail is meant to hit what comes after the first watch.
        eventually(lambda: store._watcher and store._watcher._stream is not None, "it watches", 10)
        return store, recorder

    return follow
