"""What flannel is told to do in a lab: backend, net-conf.json, conflist, arguments.  Frozen, no I/O.

Everything that a check expects of flannel (device, port, MTU, Network) is derived here, so that a user's manifest
decides what is deployed and what is expected at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network
from typing import Any

from testbed import netconf
from testbed.errors import InputError
from testbed.flanneldargs import Flags, parse_flags

IPTABLES_NFT, IPTABLES_LEGACY, NFTABLES = "iptables-nft", "iptables-legacy", "nftables"
RULES = (IPTABLES_NFT, IPTABLES_LEGACY, NFTABLES)


SUBNET_FILE = "/run/flannel/subnet.env"
CONFLIST = "/etc/cni/net.d/10-flannel.conflist"

_FEATURES: Mapping[str, tuple[str, ...]] = {
    "vxlan": ("vxlan",),
    "host-gw": (),
    "ipip": ("ipip",),
    "udp": ("tun",),
    "wireguard": ("wireguard",),
    "ipsec": ("esp4", "xfrm"),
}

_OVERHEAD: Mapping[str, int] = {"vxlan": 50, "host-gw": 0, "ipip": 20, "udp": 28, "wireguard": 80, "ipsec": 77}


SPEAK_IPV6 = ("vxlan", "host-gw", "wireguard")
"""The backends that carry IPv6."""

ENCRYPTED: Mapping[str, str] = {"wireguard": "wireguard", "ipsec": "esp"}
"""The backends whose packets on the wire cannot be looked into, and what those packets are called."""

OVERHEAD6: Mapping[str, int] = {"vxlan": 70, "host-gw": 0, "wireguard": 80}
"""Bytes that an IPv6 packet grows by: vxlan's outer header is IPv6 too there, wireguard's figure allows for it."""

UDP_ENCAP_OVERHEAD = 8
"""What ipsec takes in addition where ESP travels in UDP."""

TEST_PSK = "666c616e6e656c2074657374626564207072652d7368617265" * 2
"""ipsec's pre-shared key in a lab: at least 96 characters by flannel's rule, and no secret."""


@dataclass(frozen=True, slots=True)
class Backend:
    """One run: a flannel backend with its variant.

    `overhead` is what an encapsulated packet adds, in bytes: the underlay's MTU less FLANNEL_MTU.
    `kernel_features` are the names that `doctor` probes.  `implemented` tells whether the bundled flanneld has it.
    """

    run: str
    type: str
    topology: str = "racks"
    direct: bool = False
    dual: bool = False
    implemented: bool = False

    @property
    def overhead(self) -> int:
        """Bytes that encapsulation takes from the underlay's MTU."""
        return _OVERHEAD[self.type]

    @property
    def kernel_features(self) -> tuple[str, ...]:
        """What the kernel must have for this backend."""
        return _FEATURES[self.type]

    @property
    def tunnels(self) -> bool:
        """Whether packets between nodes are ever encapsulated."""
        return self.type != "host-gw"

    def tunnel_device(self, net_conf: Mapping[str, Any]) -> str | None:
        """Name of the tunnel device on a node; None where the backend has none."""
        if self.type == "vxlan":
            return f"flannel.{_backend_keys(net_conf).get('VNI', netconf.DEFAULT_VNI)}"
        return {"ipip": "flannel.ipip", "udp": "flannel0", "wireguard": "flannel-wg"}.get(self.type)

    def port(self, net_conf: Mapping[str, Any]) -> int | None:
        """UDP port that encapsulated packets go to; None where the backend uses no UDP."""
        keys = _backend_keys(net_conf)
        if self.type == "vxlan":  # 0 leaves the choice to the kernel, as upstream's default does
            return int(keys.get("Port", 0)) or netconf.DEFAULT_VXLAN_PORT
        if self.type == "udp":
            return int(keys.get("Port", netconf.DEFAULT_UDP_PORT))
        if self.type == "wireguard":
            return int(keys.get("ListenPort", netconf.DEFAULT_WIREGUARD_PORT))
        return 4500 if self.type == "ipsec" and keys.get("UDPEncap") else None


def _backend_keys(net_conf: Mapping[str, Any]) -> Mapping[str, Any]:
    keys = net_conf.get("Backend") or {}
    assert isinstance(keys, Mapping)
    return keys


BACKENDS: Mapping[str, Backend] = {
    backend.run: backend
    for backend in (
        Backend("vxlan", "vxlan", implemented=True),
        Backend("vxlan_direct", "vxlan", direct=True, implemented=True),
        Backend("host_gw", "host-gw", topology="flat", implemented=True),
        Backend("ipip", "ipip", implemented=True),
        Backend("ipip_direct", "ipip", direct=True, implemented=True),
        Backend("udp", "udp", implemented=True),
        Backend("wireguard", "wireguard", implemented=True),
        Backend("ipsec", "ipsec", implemented=True),
        Backend("dual_stack", "vxlan", dual=True, implemented=True),
    )
}
"""Every run by its name, in the order of the documentation."""


def normalise(name: str) -> str:
    """Return a run's name with underscores; hyphens are accepted.

    Raises InputError naming the known ones.
    """
    run = name.strip().replace("-", "_")
    if run in BACKENDS:
        return run
    raise InputError(f"there is no run called {name!r}", hint=f"these are: {', '.join(BACKENDS)}")


def run_of(net_conf: Mapping[str, Any]) -> str | None:
    """Name of the run that a net-conf.json belongs to; None where no run has that backend.

    vxlan with IPv6 is a run of its own; other backends, and DirectRouting, stay what they are with IPv6.
    """
    keys = _backend_keys(net_conf)
    kind, direct = keys.get("Type"), bool(keys.get("DirectRouting"))
    if net_conf.get("EnableIPv6") and kind not in SPEAK_IPV6:
        return None
    dual = bool(net_conf.get("EnableIPv6")) and kind == "vxlan" and not direct
    for backend in BACKENDS.values():
        variant = kind in ("vxlan", "ipip") and direct
        if backend.type == kind and backend.direct == variant and backend.dual == dual:
            return backend.run
    return None


@dataclass(frozen=True, slots=True)
class FlannelSpec:
    """How flannel is deployed in a lab, and so what the checks expect.

    `args` and `env` are flanneld's, without what chooses its store: the lab has a store of its own.
    `notes` are remarks for the user, such as what of a manifest was replaced; `warnings` what of it a cluster would
    mind and a lab does not.
    """

    backend: Backend
    network: IPv4Network
    net_conf: Mapping[str, Any]
    cni_conf: Mapping[str, Any]
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    store: str = "etcd"
    rules: str = IPTABLES_NFT
    source: str = "built in"
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def mtu_of(self, underlay_mtu: int) -> int:
        """FLANNEL_MTU where the underlay's interface has that MTU; a configured Backend.MTU takes its place."""
        keys = self.backend_keys
        base = int(keys.get("MTU") or underlay_mtu) if self.backend.type in ("vxlan", "wireguard") else underlay_mtu
        encap = UDP_ENCAP_OVERHEAD if self.backend.type == "ipsec" and keys.get("UDPEncap") else 0
        return base - self.backend.overhead - encap

    @property
    def backend_keys(self) -> Mapping[str, Any]:
        """The `Backend` object of net-conf.json."""
        return _backend_keys(self.net_conf)

    @property
    def ipv4(self) -> bool:
        """Whether pods have IPv4. Without it `network` and all that follows from it mean nothing."""
        return bool(self.net_conf.get("EnableIPv4", True))

    @property
    def network6(self) -> IPv6Network | None:
        """The IPv6 Network where pods have IPv6, else None."""
        return IPv6Network(self.net_conf["IPv6Network"], strict=False) if self.net_conf.get("EnableIPv6") else None

    def mtu6_of(self, underlay_mtu: int) -> int:
        """The largest IPv6 packet that passes between nodes. FLANNEL_MTU, which pods have, may be 20 bytes more."""
        return self.mtu_of(underlay_mtu) + self.backend.overhead - OVERHEAD6[self.backend.type]

    @property
    def tunnel_device6(self) -> str | None:
        """Name of the tunnel device for IPv6 on a node; None where there is none, or no IPv6."""
        if self.network6 is None:
            return None
        if self.backend.type == "vxlan":
            return f"flannel-v6.{self.vni}"
        if self.backend.type == "wireguard":
            return "flannel-wg-v6" if self.backend_keys.get("Mode", "separate") == "separate" else "flannel-wg"
        return None

    @property
    def subnet6_len(self) -> int:
        """Prefix length of a node's IPv6 subnet. Only to be asked for where there is IPv6."""
        assert self.network6 is not None
        return netconf.subnet_len(self.network6, self.net_conf.get("IPv6SubnetLen"))

    @property
    def subnet_len(self) -> int:
        """Prefix length of a node's subnet, by flannel's rule where none is given."""
        return netconf.subnet_len(self.network, self.net_conf.get("SubnetLen"))

    @property
    def vni(self) -> int | None:
        """VXLAN network identifier; None for another backend."""
        return int(self.backend_keys.get("VNI", netconf.DEFAULT_VNI)) if self.backend.type == "vxlan" else None

    @property
    def port(self) -> int | None:
        """UDP port of encapsulated packets; None where the backend uses no UDP."""
        return self.backend.port(self.net_conf)

    @property
    def tunnel_device(self) -> str | None:
        """Name of the tunnel device on a node; None where the backend has none."""
        return self.backend.tunnel_device(self.net_conf)

    @property
    def direct(self) -> bool:
        """Whether nodes of one subnet are reached without encapsulation."""
        return bool(self.backend_keys.get("DirectRouting"))

    @property
    def flags(self) -> Flags:
        """flanneld's flags as it will see them, arguments before environment."""
        return parse_flags(self.args, self.env)

    @property
    def ip_masq(self) -> bool:
        """Whether flanneld installs masquerade rules."""
        return self.flags.boolean("ip-masq", default=False)

    @property
    def subnet_file(self) -> str:
        """Path of subnet.env on a node."""
        return self.flags.last("subnet-file") or SUBNET_FILE

    @property
    def healthz_port(self) -> int | None:
        """TCP port of the health endpoints; None where they are off."""
        return int(self.flags.last("healthz-port") or "0", 0) or None

    @property
    def delegate(self) -> Mapping[str, Any]:
        """What the conflist tells the flannel plugin to hand to the bridge plugin."""
        for plugin in self.cni_conf["plugins"]:
            if plugin.get("type") == "flannel":
                delegate = plugin.get("delegate", {})
                assert isinstance(delegate, Mapping)
                return delegate
        return {}

    @property
    def bridge(self) -> str:
        """Name of the pods' bridge on a node."""
        return str(self.delegate.get("bridge", "cni0"))
