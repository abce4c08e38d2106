"""The Kubernetes store that flanneld's flags and environment name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

from flannel.stores.base import Log, StoreError
from flannel.stores.kubernetes import KubernetesStore
from flannel.stores.kubernetes_config import find_access
from flannel.stores.kubernetes_http import KubeClient
from flannel.stores.kubernetes_nodes import Keys


class KubeFlags(NamedTuple):
    """The flags of flanneld that concern this store."""

    url: str
    kubeconfig: str
    prefix: str
    conf_path: str
    set_condition: bool


def open_store(flags: KubeFlags, environment: Mapping[str, str], log: Log) -> KubernetesStore:
    """The store that flags and environment name. Raises StoreError; asks the API only where NODE_NAME is not set."""
    depth = environment.get("EVENT_QUEUE_DEPTH", "")
    try:
        int(depth or "0")
    except ValueError:
        raise StoreError(f"EVENT_QUEUE_DEPTH is {depth!r}, not a number") from None
    Keys(flags.prefix)
    client = KubeClient(find_access(flags.url, flags.kubeconfig, environment))
    name = environment.get("NODE_NAME", "") or _name_by_pod(client, environment)
    return KubernetesStore(
        client, name, flags.conf_path, log, prefix=flags.prefix, set_condition=flags.set_condition
    )  # fmt: skip


def _name_by_pod(client: KubeClient, environment: Mapping[str, str]) -> str:
    """Ask the API which node this pod runs on. Raises StoreError."""
    pod, namespace = environment.get("POD_NAME", ""), environment.get("POD_NAMESPACE", "")
    if not pod or not namespace:
        raise StoreError("which node is this? Neither NODE_NAME nor both of POD_NAME and POD_NAMESPACE are set")
    answer: Any = client.get(f"/api/v1/namespaces/{quote(namespace, safe='')}/pods/{quote(pod, safe='')}")
    spec = answer.get("spec")
    name = spec.get("nodeName") if isinstance(spec, dict) else None
    if not isinstance(name, str) or not name:
        raise StoreError(f"the pod {namespace}/{pod} has no node's name")
    return name
