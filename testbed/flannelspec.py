"""What flannel is told to do in a lab: backend, net-conf.json, conflist, arguments.  Frozen, no I/O.

Everything that a check expects of flannel (device, port, MTU, Network) is derived here, so that a user's manifest
decides what is deployed and what is expected at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network
from typing import Any

from testbed import netconf
from testbed.errors import Fault, InputError
from testbed.flanneldargs import Flags, parse_flags
from testbed.model import LabSpec, NodeSpec

IPTABLES_NFT, IPTABLES_LEGACY, NFTABLES = "iptables-nft", "iptables-legacy", "nftables"
RULES = (IPTABLES_NFT, IPTABLES_LEGACY, NFTABLES)

DEFAULT_NETWORK = "10.244.0.0/16"
DEFAULT_NETWORK6 = "fd00:10:244::/56"
MAX_DEVICE = 15
"""Longest name of a network device, in characters."""

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

IPV4_KEYS = ("Network", "SubnetLen", "SubnetMin", "SubnetMax")

SPEAK_IPV6 = ("vxlan", "host-gw", "wireguard")
"""The backends that carry IPv6."""

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


def default_cni_conf() -> dict[str, Any]:
    """The conflist of flannel's stock manifest."""
    return {
        "name": "cbr0",
        "cniVersion": "0.3.1",
        "plugins": [
            {"type": "flannel", "delegate": {"hairpinMode": True, "isDefaultGateway": True}},
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ],
    }


DEFAULT_ARGS = ("--ip-masq", "--healthz-port=8081")
DEFAULT_ENV: Mapping[str, str] = {"EVENT_QUEUE_DEPTH": "5000"}


def _default_net_conf(backend: Backend, rules: str) -> dict[str, Any]:
    keys: dict[str, Any] = {"Type": backend.type}
    if backend.direct:
        keys["DirectRouting"] = True
    if backend.type == "ipsec":
        keys["PSK"] = TEST_PSK
    conf: dict[str, Any] = {"Network": DEFAULT_NETWORK, "EnableNFTables": rules == NFTABLES}
    if backend.dual:
        conf |= {"EnableIPv6": True, "IPv6Network": DEFAULT_NETWORK6}
    return conf | {"Backend": keys}


def default_flannel(
    run_name: str, *, net_conf_overrides: Mapping[str, str] | None = None, rules: str | None = None
) -> FlannelSpec:
    """Return the flannel of a run without a manifest.

    `net_conf_overrides` are the `--net-conf KEY=VALUE` of the command line; `rules` is `--rules`, by default what
    they say.  Raises InputError with every fault.
    """
    backend = BACKENDS[normalise(run_name)]
    if rules is not None:
        check_rules_name(rules)
    return build(
        backend,
        _default_net_conf(backend, rules or IPTABLES_NFT),
        cni_conf=default_cni_conf(),
        args=DEFAULT_ARGS,
        env=DEFAULT_ENV,
        rules=rules,
        overrides=net_conf_overrides or {},
    )


def check_rules_name(rules: str) -> None:
    """Raise InputError where `rules` is none of `RULES`."""
    if rules not in RULES:
        raise InputError(f"there are no rules called {rules!r}", where="--rules", hint=f"these are: {', '.join(RULES)}")


def build(
    backend: Backend,
    net_conf: Mapping[str, Any],
    *,
    cni_conf: Mapping[str, Any],
    args: Iterable[str],
    env: Mapping[str, str],
    rules: str | None = None,
    overrides: Mapping[str, str] | None = None,
    source: str = "built in",
    notes: Iterable[str] = (),
    warnings: Iterable[str] = (),
) -> FlannelSpec:
    """Put a FlannelSpec together from a net-conf.json that was found valid, and the command line's overrides.

    Without `rules` they are what EnableNFTables then says: nftables, or iptables in its nft flavour.  Raises InputError
    where an override is wrong, makes the configuration another run's, or contradicts `rules`.
    """
    faults: list[Fault] = []
    conf = netconf.override(net_conf, overrides or {}, faults)
    if conf.get("EnableIPv4") is False:  # upstream makes IPv4's rules for a Network that nobody uses
        conf = {key: value for key, value in conf.items() if key not in IPV4_KEYS}
    faults += [Fault("--net-conf", 0, p.key, p.what, p.hint) for p in netconf.check(conf)] if not faults else []
    if not faults:
        other = run_of(conf)
        if other != backend.run:
            hint = f"run {other} instead" if other else "leave that key as it is"
            faults.append(Fault("--net-conf", 0, "Backend", f"this is no longer {backend.run}'s configuration", hint))
        if rules is not None and bool(conf.get("EnableNFTables")) != (rules == NFTABLES):
            what = f"contradicts --rules {rules}"
            faults.append(Fault("--net-conf", 0, "EnableNFTables", what, "say it once, by --rules"))
    if faults:
        raise InputError(faults=faults)
    network = IPv4Network(conf.get("Network", DEFAULT_NETWORK), strict=False)
    rules = rules or (NFTABLES if conf.get("EnableNFTables") else IPTABLES_NFT)
    return FlannelSpec(
        backend,
        network,
        conf,
        cni_conf,
        tuple(args),
        dict(env),
        rules=rules,
        source=source,
        notes=tuple(notes),
        warnings=tuple(warnings),
    )


def _networks_of(machine: NodeSpec) -> Iterator[IPv4Network | IPv6Network]:
    """Every network that a machine of the lab has an address in."""
    yield from (i.address.network for i in machine.ifaces if i.address)
    yield from (i.address6.network for i in machine.ifaces if i.address6)
    for address in (machine.loopback, machine.bridge_address, machine.loopback6, machine.bridge_address6):
        if address is not None:
            yield address.network


def check_fits(flannel: FlannelSpec, lab: LabSpec) -> None:
    """Raise InputError where flannel's Network cannot work on that lab, or where a kernel takes no device of that name.

    It has to leave the lab's own addresses alone, and to hold a subnet for each node.
    """
    problems = [
        (f"{name} has {len(name)} characters, and a device's name at most {MAX_DEVICE}", "choose a shorter VNI or name")
        for name in (flannel.bridge, flannel.tunnel_device, flannel.tunnel_device6)
        if name and len(name) > MAX_DEVICE
    ]
    networks: list[tuple[str, IPv4Network | IPv6Network, int]] = []
    if flannel.ipv4:
        networks.append(("", flannel.network, flannel.subnet_len))
    if flannel.network6 is not None:
        networks.append(("IPv6", flannel.network6, flannel.subnet6_len))
    for family, network, length in networks:
        for machine in lab.nodes:
            if any(network.version == other.version and network.overlaps(other) for other in _networks_of(machine)):
                what = f"{network} overlaps the addresses of {machine.name}"
                problems.append((what, f"choose another {family}Network"))
                break
        # The first subnet of the Network is left out by flannel.
        room = (1 << (length - network.prefixlen)) - 1
        if room < len(lab.cluster_nodes):
            what = f"{network} has {room} subnets of /{length}, for {len(lab.cluster_nodes)} nodes"
            problems.append((what, f"give a wider {family}Network, or a longer {family}SubnetLen, by --net-conf"))
    mtu = flannel.mtu_of(lab.mtu)
    if mtu > lab.mtu - flannel.backend.overhead:
        problems.append((f"Backend.MTU leaves pods {mtu} bytes, more than the lab's MTU of {lab.mtu} can carry", ""))
    if problems:
        raise InputError(faults=[Fault("net-conf.json", 0, "", what, hint) for what, hint in problems])
