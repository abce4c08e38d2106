"""Any JSON for a node: read, or refused with ValueError, and never anything else."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from flannel.lease import Lease
from flannel.netconf import parse
from flannel.stores.kubernetes_nodes import Keys, is_managed, pod_cidrs, published, read_node, wanted_annotations
from flannel.stores.kubernetes_nodes import overwritten as overwrite
from flannel.stores.leasecodec import overlap, why_unusable

KEYS = Keys("flannel.alpha.coreos.com")
CONF = parse(
    '{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48", "Backend": {"Type": "vxlan"}}'
)

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
CIDRS = st.sampled_from(
    ["10.244.2.0/24", "10.244.2.0/33", "10.244.2.1/24", "fd00:10:244:2::/64", "fd00::%1/64", "", "/"]
)
MAC = '{"VNI": 1, "VtepMAC": "02:00:00:00:00:02"}'
TEXTS = st.sampled_from(["true", "vxlan", "host-gw", MAC, "null", "{", "192.0.2.2", "::1", "10.244.2.2", "2001:db8::2"])
NAMES = [value for value in vars(KEYS).values() if isinstance(value, str)]
NODES = st.fixed_dictionaries(
    {
        "metadata": JUNK
        | st.fixed_dictionaries(
            {"name": st.just("x") | JUNK, "annotations": JUNK | st.dictionaries(st.sampled_from(NAMES), TEXTS | JUNK)}
        ),
        "spec": JUNK | st.fixed_dictionaries({"podCIDR": CIDRS | JUNK, "podCIDRs": JUNK | st.lists(CIDRS, max_size=3)}),
    }
)


@given(JUNK | NODES)
@settings(max_examples=500, deadline=None)
def test_no_node_does_harm(value: Any) -> None:
    with contextlib.suppress(ValueError):
        node = read_node(value)
        is_managed(node, KEYS)
        attrs, (v4, v6) = published(node, KEYS), pod_cidrs(node)
        addresses, faults = overwrite(node, KEYS, attrs)
        assert all(fault.isprintable() for fault in faults)
        for text in wanted_annotations(attrs, addresses, KEYS).values():
            assert isinstance(text, str)
        if v4 is not None:
            why = why_unusable(Lease(v4, attrs, subnet6=v6), CONF.network, CONF.ipv6_network)
            assert why.isprintable()
            if not why:
                assert overlap(v4, CONF.network)


def test_a_good_node_is_good() -> None:
    annotations = {
        KEYS.managed: "true",
        KEYS.backend_type: "vxlan",
        KEYS.backend_data: MAC,
        KEYS.public_ip: "192.0.2.2",
    }
    node = read_node(
        {"metadata": {"name": "x", "annotations": annotations}, "spec": {"podCIDRs": ["10.244.2.0/24"], "podCIDR": 7}}
    )
    attrs, cidrs = published(node, KEYS), pod_cidrs(node)
    assert is_managed(node, KEYS)
    assert cidrs.v4 is not None
    assert why_unusable(Lease(cidrs.v4, attrs), CONF.network) == ""
    assert wanted_annotations(attrs, overwrite(node, KEYS, attrs)[0], KEYS)[KEYS.backend_data] == json.dumps(
        json.loads(MAC), separators=(",", ":")
    )
