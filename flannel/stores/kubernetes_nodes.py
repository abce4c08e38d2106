"""A node as the Kubernetes API has it: what flannel reads in it, and what it writes into it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network
from typing import Any, NamedTuple

from flannel.lease import LeaseAttrs
from flannel.stores.base import StoreError
from flannel.stores.leasecodec import parse_address, quoted

_PREFIX = re.compile(r"(?:[a-z0-9_-]+\.)+[a-z0-9_-]+/(?:[a-z0-9_.-]+-)?", re.ASCII)
_NETWORK_UNAVAILABLE = "NetworkUnavailable"


class Keys:
    """The names of flannel's annotations. Raises StoreError for a prefix that cannot be one."""

    def __init__(self, prefix: str) -> None:
        full = prefix if "/" in prefix else prefix + "/"
        if full[-1:] not in ("/", "-"):
            full += "-"
        if not _PREFIX.fullmatch(full):
            raise StoreError(
                f"-kube-annotation-prefix is {prefix!r}: it must be a domain name in lower case with a dot in it, or "
                "DOMAIN/NAME, such as flannel.alpha.coreos.com"
            )
        self.managed = full + "kube-subnet-manager"
        self.backend_type = full + "backend-type"
        self.backend_data = full + "backend-data"
        self.public_ip = full + "public-ip"
        self.public_ip_overwrite = full + "public-ip-overwrite"
        self.node_public_ip = full + "node-public-ip"


class Node(NamedTuple):
    """What counts of a node. `created` is its creation time as the API writes it, which sorts by time."""

    name: str
    created: str
    annotations: Mapping[str, str]
    spec: Mapping[str, Any]


def read_node(value: Any) -> Node:
    """Read a Node object, however odd it is. Raises ValueError where it has not even a name."""
    metadata = value.get("metadata") if isinstance(value, dict) else None
    name = metadata.get("name") if isinstance(metadata, dict) else None
    if not isinstance(metadata, dict) or not isinstance(name, str) or not name:
        raise ValueError("a node without a name")
    annotations, spec, created = metadata.get("annotations"), value.get("spec"), metadata.get("creationTimestamp")
    texts = (
        {key: text for key, text in annotations.items() if isinstance(text, str)}
        if isinstance(annotations, dict)
        else {}
    )
    return Node(name, created if isinstance(created, str) else "", texts, spec if isinstance(spec, dict) else {})


def pod_cidr(node: Node) -> IPv4Network | None:
    """The node's IPv4 podCIDR, None where it has none yet. Raises ValueError for one that cannot be read."""
    cidrs = node.spec.get("podCIDRs") or [node.spec.get("podCIDR") or ""]
    if not isinstance(cidrs, list) or len(cidrs) > 2 or not all(isinstance(text, str) for text in cidrs):
        raise ValueError(f"its podCIDRs are not one or two networks: {quoted(cidrs)}")
    found = None
    for text in cidrs:
        if text and ":" not in text:
            found = found or _network(text)
    return found


def _network(text: str) -> IPv4Network:
    address, slash, length = text.partition("/")
    try:
        if slash and length.isascii() and length.isdigit() and len(length) < 3:
            return IPv4Network((parse_address(address), int(length)))
    except ValueError:
        pass
    raise ValueError(f"its podCIDR is no network: {quoted(text)}")


def is_managed(node: Node, keys: Keys) -> bool:
    """Whether a flanneld has said that it serves this node."""
    return node.annotations.get(keys.managed) == "true"


def published(node: Node, keys: Keys) -> LeaseAttrs:
    """What the node's flanneld has published. Raises ValueError that names the fault."""
    annotations = node.annotations
    text = annotations.get(keys.public_ip)
    if text is None:
        raise ValueError("it has no public-ip annotation")
    try:
        address = parse_address(text)
    except ValueError:
        raise ValueError(f"its public-ip annotation is no IPv4 address: {quoted(text)}") from None
    data = annotations.get(keys.backend_data) or "null"
    try:
        decoded = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError(f"its backend-data annotation is not JSON: {quoted(data)}") from None
    return LeaseAttrs(address, annotations.get(keys.backend_type, ""), decoded)


def overwritten(node: Node, keys: Keys) -> IPv4Address | None:
    """The address that an operator wants peers to use. Raises ValueError where the annotation holds none."""
    text = node.annotations.get(keys.public_ip_overwrite, "")
    try:
        return parse_address(text) if text else None
    except ValueError:
        raise ValueError(f"the annotation {keys.public_ip_overwrite} is no IPv4 address: {quoted(text)}") from None


def wanted_annotations(attrs: LeaseAttrs, address: IPv4Address, keys: Keys) -> dict[str, str]:
    """What a node is annotated with."""
    return {
        keys.managed: "true",
        keys.backend_type: attrs.backend_type,
        keys.backend_data: json.dumps(attrs.backend_data, separators=(",", ":")),
        keys.public_ip: str(address),
    }


def annotations_patch(changed: Mapping[str, str]) -> dict[str, Any]:
    """The strategic merge patch that sets annotations, and nothing else."""
    return {"metadata": {"annotations": dict(changed)}}


def network_available_patch(now: str) -> dict[str, Any]:
    """The strategic merge patch that says that the node has a network; `now` in RFC 3339."""
    condition = {
        "type": _NETWORK_UNAVAILABLE,
        "status": "False",
        "reason": "FlannelIsUp",
        "message": "Flannel is running on this node",
        "lastTransitionTime": now,
        "lastHeartbeatTime": now,
    }
    return {"status": {"conditions": [condition]}}
