"""What a guest kernel can do by its configuration, in the words of the feature probe."""

from __future__ import annotations

from collections.abc import Mapping

#: Feature → the symbols of a kernel's configuration without which it is not there.
SYMBOLS: Mapping[str, tuple[str, ...]] = {
    "user_namespace": ("USER_NS",),
    "nested_user_namespace": ("USER_NS",),
    "namespaces": ("NET_NS", "PID_NS", "UTS_NS", "IPC_NS"),
    "tmpfs": ("TMPFS",),
    "proc": (),
    "sysfs": (),
    "overlay": ("OVERLAY_FS",),
    "veth": ("VETH",),
    "bridge": ("BRIDGE",),
    "multipath": ("IP_ROUTE_MULTIPATH",),
    "hash_policy": ("IP_ROUTE_MULTIPATH",),
    "ipv6": ("IPV6",),
    "packet": ("PACKET",),
    "seccomp": ("SECCOMP_FILTER",),
    "conntrack": ("NF_CT_NETLINK",),
    "iptables_nft": (
        *("NF_TABLES", "NF_TABLES_IPV4", "NFT_COMPAT"),
        *("NETFILTER_XT_TARGET_MASQUERADE", "NETFILTER_XT_MATCH_COMMENT"),
    ),
    "iptables_legacy": ("IP_NF_IPTABLES", "IP_NF_NAT", "NETFILTER_XT_TARGET_MASQUERADE", "NETFILTER_XT_MATCH_COMMENT"),
    "nftables": ("NF_TABLES", "NF_TABLES_INET", "NF_TABLES_IPV4", "NFT_MASQ", "NFT_NAT"),
    "br_netfilter": ("BRIDGE_NETFILTER",),
    "vxlan": ("VXLAN",),
    "tun": ("TUN",),
    "ipip": ("NET_IPIP",),
    "wireguard": ("WIREGUARD",),
    "xfrm": ("XFRM_USER",),
    "esp4": ("INET_ESP", "CRYPTO_GCM"),
    "netem": ("NET_SCH_NETEM",),
    "vrf": ("NET_VRF",),
    "bridge_vlan": ("BRIDGE_VLAN_FILTERING",),
    "dummy": ("DUMMY",),
    "ipset": ("IP_SET",),
}


def lacking_features(config: str) -> tuple[str, ...]:
    """The features that a kernel of that configuration has neither built in nor as a module."""
    there = {line[7:-2] for line in config.splitlines() if line.startswith("CONFIG_") and line.endswith(("=y", "=m"))}
    return tuple(feature for feature, symbols in SYMBOLS.items() if not there.issuperset(symbols))
