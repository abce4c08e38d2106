"""A node as the Kubernetes API has it: what flannel reads in it, and what it writes into it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, NamedTuple

from flannel.lease import LeaseAttrs, Network
from flannel.log import quoted
from flannel.stores.base import StoreError
from flannel.stores.leasecodec import parse_address

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
        self._prefix = full
        self.managed = full + "kube-subnet-manager"
        self.backend_type = full + "backend-type"
        self.backend_data = full + "backend-data"
        self.public_ip = full + "public-ip"
        self.public_ip_overwrite = full + "public-ip-overwrite"
        self.node_public_ip = full + "node-public-ip"
        self.backend_data6 = full + "backend-v6-data"
        self.public_ip6 = full + "public-ipv6"
        self.public_ip6_overwrite = full + "public-ipv6-overwrite"
        self.node_public_ip6 = full + "node-public-ipv6"

    def strange(self, names: Iterable[str]) -> list[str]:
        """Those of flannel's names that nobody reads: misspelt ones, or a later flannel's."""
        known = vars(self).values()
        return sorted(name for name in names if name.startswith(self._prefix) and name not in known)


class Cidrs(NamedTuple):
    """A node's podCIDRs, one of each IP version; None where it has none (yet)."""

    v4: IPv4Network | None
    v6: IPv6Network | None


class Addresses(NamedTuple):
    """The addresses that peers are to use. Without a `v4` there is IPv6 alone."""

    v4: IPv4Address | None
    v6: IPv6Address | None


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


def pod_cidrs(node: Node) -> Cidrs:
    """The node's podCIDRs. Raises ValueError for one that cannot be read."""
    cidrs = node.spec.get("podCIDRs") or [node.spec.get("podCIDR") or ""]
    if not isinstance(cidrs, list) or len(cidrs) > 2 or not all(isinstance(text, str) for text in cidrs):
        raise ValueError(f"its podCIDRs are not one or two networks: {quoted(cidrs)}")
    v4, v6 = None, None
    for text in filter(None, cidrs):
        if ":" in text:
            v6 = v6 or _network6(text)
        else:
            v4 = v4 or _network(text)
    return Cidrs(v4, v6)


def _network(text: str) -> IPv4Network:
    address, slash, length = text.partition("/")
    try:
        if slash and length.isascii() and length.isdigit() and len(length) < 3:
            return IPv4Network((parse_address(address), int(length)))
    except ValueError:
        pass
    raise ValueError(f"its podCIDR is no network: {quoted(text)}")


def _network6(text: str) -> IPv6Network:
    address, slash, length = text.partition("/")
    try:
        if slash and length.isascii() and length.isdigit() and len(length) < 4:
            return IPv6Network((parse_address6(address), int(length)))
    except ValueError:
        pass
    raise ValueError(f"its podCIDR is no network: {quoted(text)}")


def parse_address6(text: str) -> IPv6Address:
    """Read an IPv6 address without a zone. Raises ValueError."""
    if "%" in text:
        raise ValueError("an address with a zone")
    return IPv6Address(text)


def is_managed(node: Node, keys: Keys) -> bool:
    """Whether a flanneld has said that it serves this node."""
    return node.annotations.get(keys.managed) == "true"


def counted(cidrs: Cidrs, version: int, dual: bool) -> tuple[Network | None, IPv6Network | None]:
    """Those podCIDRs that count in a network of that IP version, or of both."""
    return (cidrs.v6, None) if version == 6 else (cidrs.v4, cidrs.v6 if dual else None)


def published(node: Node, keys: Keys, version: int = 4) -> LeaseAttrs:
    """What the node's flanneld has published: of both IP versions, or, for `version` 6, of IPv6 alone.

    Raises ValueError that names the fault.
    """
    annotations = node.annotations
    if version == 6:
        address6, data6 = _published6(annotations, keys)
        if address6 is None:
            raise ValueError("it has no public-ipv6 annotation")
        return LeaseAttrs(address6, annotations.get(keys.backend_type, ""), data6)
    text = annotations.get(keys.public_ip)
    if text is None:
        raise ValueError("it has no public-ip annotation")
    try:
        address = parse_address(text)
    except ValueError:
        raise ValueError(f"its public-ip annotation is no IPv4 address: {quoted(text)}") from None
    data, backend_type = _json(annotations, keys.backend_data), annotations.get(keys.backend_type, "")
    return LeaseAttrs(address, backend_type, data, *_published6(annotations, keys))


def _published6(annotations: Mapping[str, str], keys: Keys) -> tuple[IPv6Address | None, Any]:
    text = annotations.get(keys.public_ip6, "")
    if not text:
        return None, None
    try:
        address = parse_address6(text)
    except ValueError:
        raise ValueError(f"its public-ipv6 annotation is no IPv6 address: {quoted(text)}") from None
    return address, _json(annotations, keys.backend_data6)


def _json(annotations: Mapping[str, str], key: str) -> Any:
    text = annotations.get(key) or "null"
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"its {key.rpartition('/')[2]} annotation is not JSON: {quoted(text)}") from None


def overwritten(node: Node, keys: Keys, attrs: LeaseAttrs) -> tuple[Addresses, list[str]]:
    """The addresses that peers are to use: an operator's, else the node's own; and what is wrong with the former."""
    first, faults = attrs.public_ip, []
    v4, v6 = (first, attrs.public_ip6) if isinstance(first, IPv4Address) else (None, first)
    text = node.annotations.get(keys.public_ip_overwrite, "")
    try:
        v4 = parse_address(text) if text and v4 is not None else v4
    except ValueError:
        faults.append(f"the annotation {keys.public_ip_overwrite} is no IPv4 address: {quoted(text)}; publishing {v4}")
    text = node.annotations.get(keys.public_ip6_overwrite, "")
    try:
        v6 = parse_address6(text) if text and v6 is not None else v6
    except ValueError:
        faults.append(f"the annotation {keys.public_ip6_overwrite} is no IPv6 address: {quoted(text)}; publishing {v6}")
    return Addresses(v4, v6), faults


def wanted_annotations(attrs: LeaseAttrs, addresses: Addresses, keys: Keys) -> dict[str, str]:
    """What a node is annotated with."""
    wanted = {keys.managed: "true", keys.backend_type: attrs.backend_type}
    if addresses.v4 is None:
        data = _text(attrs.backend_type, attrs.backend_data)
        return wanted | {keys.backend_data6: data, keys.public_ip6: str(addresses.v6)}
    wanted |= {
        keys.backend_data: _text(attrs.backend_type, attrs.backend_data),
        keys.public_ip: str(addresses.v4),
    }
    # The others' data are the same for both versions, and upstream publishes no IPv6 of theirs.
    has_data = attrs.backend_type in ("vxlan", "wireguard") and attrs.backend_data6 is not None
    if addresses.v6 is not None and (has_data or attrs.backend_type in ("host-gw", "extension")):
        wanted[keys.backend_data6] = json.dumps(attrs.backend_data6, separators=(",", ":"))
        wanted[keys.public_ip6] = str(addresses.v6)
    return wanted


def _text(backend_type: str, data: Any) -> str:
    """A backend's data as the annotation has them. An extension's are a text, or nothing at all."""
    if backend_type == "extension" and data is None:
        return ""
    return json.dumps(data, separators=(",", ":"))


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
