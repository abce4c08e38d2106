"""Every parser of flannel that reads what somebody else wrote, with inputs to begin with."""

from __future__ import annotations

import io
import json
import os
import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

from flannel import cli, netconf, subnetenv
from flannel.backends.base import BackendError, Facts, Ignored
from flannel.cni import basics, delegate, plugin
from flannel.daemon import make_backend
from flannel.interface import External
from flannel.kernel import monitor, netlink, nftables, rtnl, wireguard, xfrm
from flannel.kernel.values import Fdb, Link, Neigh, Route, Vxlan
from flannel.lease import Lease
from flannel.rules import iptables, masquerade
from flannel.rules import nftables as nftrules
from flannel.state import Recorded
from flannel.stores import etcd_messages, leasecodec, shorthttp
from flannel.stores.base import StoreError
from flannel.stores.etcd_client import key_value
from flannel.stores.etcd_http import HttpStream, LinkDownError, _error_of
from flannel.stores.kubernetes_config import from_kubeconfig
from flannel.stores.kubernetes_http import Lines, status_error
from flannel.stores.kubernetes_nodes import Keys, overwritten, pod_cidrs, published, read_node
from flannel.stores.kubernetes_yaml import YamlError, read
from flannel.vici import ViciError, decode, encode
from tests.fuzz.fuzzer import Target

NETWORK, OWN = IPv4Network("10.244.0.0/16"), IPv4Network("10.244.1.0/24")
EXTERNAL = External(2, "eth0", 1500, IPv4Address("192.168.50.1"), IPv4Address("192.168.50.1"))
KEYS = Keys("flannel.alpha.coreos.com")


def text(data: bytes) -> str:
    """Bytes as the daemon reads text that it is given."""
    return data.decode("utf-8", "replace")


def in_file(use: Callable[[str], object]) -> Callable[[bytes], object]:
    """A target that reads a file."""
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="fuzz", dir=folder)) / "input"

    def run(data: bytes) -> object:
        path.write_bytes(data)
        return use(str(path))

    return run


# -- configuration -----------------------------------------------------------------------------------------------------

NET_CONFS = tuple(
    json.dumps(one).encode()
    for one in (
        {"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan", "VNI": 1, "Port": 8472, "MTU": 1450, "GBP": True}},
        {"Network": "10.0.0.0/8", "SubnetLen": 20, "SubnetMin": "10.10.0.0", "SubnetMax": "10.99.0.0"},
        {"EnableIPv6": True, "Network": "10.244.0.0/16", "IPv6Network": "fd00::/48", "IPv6SubnetLen": 64,
         "IPv6SubnetMin": "fd00:0:0:1::", "Backend": {"Type": "wireguard", "PSK": "", "Mode": "auto"}},
        {"Network": "10.1.0.0/16", "EnableNFTables": True, "Backend": {"Type": "host-gw"}},
        {"Network": "10.1.0.0/16", "Backend": {"Type": "udp", "Port": 7890}},
        {"Network": "10.1.0.0/16", "Backend": {"Type": "ipip", "DirectRouting": True}},
        {"Network": "10.1.0.0/16", "Backend": {"Type": "extension", "SubnetAddCommand": "true"}},
        {"Network": "10.1.0.0/16", "Backend": {"Type": "ipsec", "PSK": "x" * 100, "UDPEncap": True}},
    )
)  # fmt: skip


def net_conf(data: bytes) -> None:
    """What starts a flanneld, as far as nothing is touched."""
    make_backend(netconf.parse(text(data)), EXTERNAL)


SUBNET_ENV = (
    b"FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n",
    b"FLANNEL_IPV6_NETWORK=fd00::/48\r\nFLANNEL_IPV6_SUBNET=fd00:0:0:1::1/64\nFLANNEL_MTU=1400\nFLANNEL_IPMASQ=false",
)
JOURNAL = (
    b"device flannel.1 020000000001\n+ 10.244.2.0/24 192.168.50.2 eth0\n- 10.244.2.0/24 192.168.50.2 eth0\ndevice\n",
    b"+ fd00::/64 fe80::1 eth0\ndevice flannel-wg \n",
)


def flags(data: bytes) -> None:
    """A command line, one word a line, then after an empty line the environment."""
    words, _, environment = text(data).partition("\n\n")
    pairs = [line.partition("=") for line in environment.splitlines()]
    cli.check(cli.parse(words.split("\n"), {key: value for key, _, value in pairs}))


# -- etcd --------------------------------------------------------------------------------------------------------------

VALUES = (
    b'{"PublicIP":"192.168.50.2","PublicIPv6":null,"BackendType":"vxlan",'
    b'"BackendData":{"VNI":1,"VtepMAC":"02:aa:bb:cc:dd:02"}}',
    b'{"PublicIP":"10.0.0.1","PublicIPv6":"fd00::1","BackendType":"wireguard","BackendData":{"PublicKey":"x"},'
    b'"BackendV6Data":{"PublicKey":"y"}}',
    b'{"PublicIP":"10.0.0.1"}',
)
TUNNEL = Link(7, "flannel.1", 1450, b"\x02\0\0\0\0\x01", 1, "vxlan", None)
FACTS = Facts(EXTERNAL, TUNNEL, {IPv4Address("192.168.50.2"): 2})
BACKENDS = [
    make_backend(netconf.parse(json.dumps({"Network": str(NETWORK), "Backend": backend})), EXTERNAL)
    for backend in (
        {"Type": "vxlan"}, {"Type": "vxlan", "DirectRouting": True}, {"Type": "host-gw"}, {"Type": "ipip"},
    )
]  # fmt: skip


def lease_value(data: bytes) -> None:
    """A value in etcd, as far as what is wanted of the kernel for it; that must be able to be packed."""
    lease = Lease(IPv4Network("10.244.2.0/24"), leasecodec.parse_value(data))
    if leasecodec.why_unusable(lease, NETWORK):
        return
    leasecodec.lease_value(lease.attrs)
    for backend in BACKENDS:
        with suppress(Ignored):
            wanted = backend.wants(lease, FACTS)
            entries: list[Neigh | Fdb] = [*wanted.neighbours, *wanted.fdb]
            for entry in entries:
                rtnl.set_entry(entry)
                assert len(entry.mac) == 6
                assert not entry.mac[0] & 1
            for route in wanted.routes:
                rtnl.set_route(route)
                assert rtnl.network_of(route).subnet_of(NETWORK)  # type: ignore[arg-type]


def lease_key(data: bytes) -> None:
    """A key in etcd; what is read is written as it was."""
    subnets = leasecodec.parse_key(text(data))
    assert leasecodec.parse_key(leasecodec.lease_key(*subnets)) == subnets


def gateway(data: bytes) -> None:
    """An answer of etcd's JSON gateway to any of the calls."""
    decoded = json.loads(data)
    for method in (etcd_messages.RANGE, etcd_messages.TXN, etcd_messages.GRANT, etcd_messages.WATCH):
        with suppress(ValueError):
            etcd_messages.from_json(method.response, decoded)


class Far:
    """A connection whose other end says that."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, _: str) -> io.BytesIO:
        """What it says."""
        return io.BytesIO(self._data)


def http_answer(data: bytes) -> None:
    """An answer by HTTP, read line by line and as a whole; that must be the same."""
    line_by_line: Any = shorthttp.Answer(Far(data))  # type: ignore[arg-type]
    lines = list(iter(line_by_line.readline, b""))
    assert b"".join(lines) == shorthttp.Answer(Far(data)).read()  # type: ignore[arg-type]


class Response:
    """An HTTP response of that body."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)
        self.readline = self._file.readline


def etcd_watch(data: bytes) -> None:
    """What etcd's watch sends."""
    sock: Any = socket.socket(socket.AF_UNIX)
    with sock:
        response: Any = Response(data)
        try:
            for answer in HttpStream(etcd_messages.WATCH, sock, response):
                for event in answer.get("events", []):
                    key_value(event.get("kv", {}))
        except LinkDownError as error:
            if str(error) != "etcd ended the watch":
                raise


_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
HTTP = (
    _HEAD + b"Content-Length: 6\r\n\r\n{}\n{}\n",
    _HEAD + b"Transfer-Encoding: chunked\r\n\r\n4\r\n{}\n{\r\n2\r\n}\n\r\n0\r\n\r\n",
    b"HTTP/1.0 400 Bad Request\r\n\r\nno",
)
GATEWAY = (
    b'{"header":{"revision":"7"},"kvs":[{"key":"L2E=","create_revision":"2","mod_revision":"3","version":"1",'
    b'"value":"e30=","lease":"1234"}],"more":true,"count":"1"}',
    b'{"header":{},"succeeded":true,"responses":[{"response_range":{"kvs":[]}}]}',
    b'{"header":{},"created":true,"compact_revision":"5","events":[{"type":"DELETE","kv":{"key":"L2E="}},'
    b'{"kv":{"key":"L2E="}}]}',
    b'{"ID":"123","TTL":"86400"}',
)
ETCD_LINES = (
    b'{"result":{"header":{"revision":"7"},"created":true}}\n',
    b'{"result":{"header":{"revision":"8"},"events":[{"kv":{"key":"L2E=","mod_revision":"8","value":"e30="}}]}}\n',
    b'{"error":{"grpc_code":11,"message":"compacted"}}\n',
)
PROTOBUF = (b"\x0a\x06\x08\x01\x10\x02\x18\x03\x12\x0c\x0a\x02/a\x10\x02\x18\x03\x2a\x02{}\x18\x01\x20\x01",)


def protobuf(data: bytes) -> None:
    """An answer of etcd's gRPC to any of the calls."""
    from flannel.stores.etcd_grpc import from_protobuf

    for method in (etcd_messages.RANGE, etcd_messages.TXN, etcd_messages.GRANT, etcd_messages.WATCH):
        with suppress(ValueError):
            from_protobuf(method.response, data)


# -- Kubernetes --------------------------------------------------------------------------------------------------------

_ANNOTATIONS = {
    KEYS.managed: "true",
    KEYS.backend_type: "vxlan",
    KEYS.backend_data: '{"VNI":1,"VtepMAC":"02:aa:bb:cc:dd:02"}',
    KEYS.public_ip: "192.168.50.2",
    KEYS.public_ip6: "fd00::2",
    KEYS.public_ip_overwrite: "192.168.50.9",
}
_NODE = {
    "metadata": {"name": "node2", "creationTimestamp": "2024-01-01T00:00:00Z", "annotations": _ANNOTATIONS},
    "spec": {"podCIDR": "10.244.2.0/24", "podCIDRs": ["10.244.2.0/24", "fd00:0:0:2::/64"]},
}
NODES = (json.dumps(_NODE).encode(), json.dumps({"metadata": {"name": "x"}}).encode())
WATCH_LINES = (
    json.dumps({"type": "ADDED", "object": _NODE}).encode() + b"\n",
    b'{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"9"}}}\n'
    b'{"type":"ERROR","object":{"code":410,"message":"gone"}}\n',
)


def node(data: bytes) -> None:
    """A Node object."""
    found = read_node(json.loads(data))
    for look in (pod_cidrs, lambda one: overwritten(one, KEYS, published(one, KEYS))):
        with suppress(ValueError):
            look(found)
    KEYS.strange(found.annotations)


def watch(data: bytes) -> None:
    """What the API's watch sends."""
    sock: Any = socket.socket(socket.AF_UNIX)
    with sock:
        response: Any = Response(data)
        for event in Lines(None, response, sock, 1.0):  # type: ignore[arg-type]
            value = event.get("object")
            if event.get("type") == "ERROR":
                str(status_error(value if isinstance(value, dict) else {}, 500, "the watch"))
            else:
                with suppress(ValueError):
                    read_node(value)


KUBECONFIG = (
    b"apiVersion: v1\nkind: Config\nclusters:\n- name: c\n  cluster:\n    server: https://10.0.0.1:6443\n"
    b"    certificate-authority-data: TUlJ\nusers:\n- name: u\n  user: {\"token\": \"t\"}\ncontexts:\n"
    b"- name: x\n  context:\n    cluster: c\n    user: u\ncurrent-context: x\n",
    b'# a\n---\nkey: "quoted \\n" # comment\nlist:\n  - - a\n    - b\n  - |\n    text\n     more\n'
    b"null: ~\n'it''s': true\n",
    b'{"clusters": [], "current-context": "x"}',
)  # fmt: skip


# -- CNI ---------------------------------------------------------------------------------------------------------------

CNI = (
    b'{"cniVersion":"1.1.0","name":"cbr0","type":"flannel","delegate":{"hairpinMode":true,"isDefaultGateway":true},'
    b'"subnetFile":"/x","dataDir":"/y","runtimeConfig":{},"prevResult":{"ips":[{"address":"10.244.1.5/24",'
    b'"gateway":"10.244.1.1"}],"routes":[{"dst":"0.0.0.0/0"}]},"ipam":{"type":"host-local","routes":[]}}',
    b'{"cniVersion":"0.3.1","name":"cbr0","type":"flannel","delegate":{"type":"bridge","name":"x","ipMasq":false}}',
)


def cni_config(data: bytes) -> None:
    """A network configuration on the plugin's standard input, as far as that of its delegate."""
    env = basics.parse_subnet_env(SUBNET_ENV[0].decode())
    for command in ("ADD", "CHECK"):
        with suppress(basics.CniError):
            conf = plugin.read_config(command, data)
            if isinstance(conf.get("prevResult"), dict):
                basics.encode(plugin.with_gateways(conf["prevResult"]))
            basics.encode(delegate.delegate_config(conf, env))
    delegate.decode_saved(data)


def cni_environment(data: bytes) -> None:
    """CNI_* variables, one a line; they cannot hold a zero byte."""
    plugin_variables = (b"CNI_COMMAND", b"CNI_CONTAINERID", b"CNI_NETNS", b"CNI_IFNAME", b"CNI_PATH")
    lines = data.replace(b"\0", b"").split(b"\n")
    before = {name: value for name, value in os.environ.items() if name.startswith("CNI_")}
    try:
        for line in lines:
            name, _, value = line.partition(b"=")
            if name in plugin_variables:
                os.environb[name] = value
        plugin.check_environment(os.environ.get("CNI_COMMAND", ""))
    finally:
        for variable in [one for one in os.environ if one.startswith("CNI_")]:
            del os.environ[variable]
        os.environ.update(before)


# -- the kernel and other programs -------------------------------------------------------------------------------------


def notification(data: bytes) -> None:
    """What the kernel tells on rtnetlink; the first byte chooses the kind."""
    kinds = (rtnl.NEWLINK, rtnl.NEWADDR, rtnl.NEWROUTE, rtnl.NEWNEIGH, rtnl.DELLINK)
    monitor.decode(kinds[data[0] % len(kinds)] if data else rtnl.NEWLINK, data[1:])
    for kind, flags_, _, payload in netlink.messages(data):
        monitor.decode(kind, payload)
        netlink.verdict(flags_, payload)


NOTIFICATIONS = (
    b"\0" + rtnl.new_vxlan("flannel.1", Vxlan(1, 2, 3, 8472, False, True), 1450, b"\x02\0\0\0\0\1").body,
    b"\1" + rtnl.new_address(3, 0x0AF40100, 32).body,
    b"\2" + rtnl.set_route(Route(0x0AF40200, 24, 0x0AF40200, 3, True)).body,
    b"\3" + rtnl.set_entry(Neigh(3, 0x0AF40200, b"\x02\0\0\0\0\1")).body,
    b"\3" + rtnl.set_entry(Fdb(3, b"\x02\0\0\0\0\1", 1 << 100, 6)).body,
)
IPTABLES = (
    b"# Generated\n*nat\n:POSTROUTING ACCEPT [1:2]\n:FLANNEL-POSTRTG - [0:0]\n"
    b'-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG\n'
    b'-A FLANNEL-POSTRTG -s 10.244.1.0/24 -d 10.244.0.0/16 -m comment --comment "flanneld masq" -j RETURN\nCOMMIT\n',
)
NFT = (
    b'table ip flannel-ipv4 {\n\tcomment "rules for flannel-ipv4"\n\n\tchain postrtg {\n\t\tcomment "chain"\n'
    b"\t\ttype nat hook postrouting priority srcnat; policy accept;\n\t\tmeta mark & 0x00004000 == 0x00004000 return\n"
    b"\t}\n}\n",
    b"add rule ip flannel-ipv4 postrtg handle 5 ip saddr 10.0.0.0/8 return\n",
)


def iptables_save(data: bytes) -> None:
    """What iptables-save prints; what is made of it must be lines."""
    tables = masquerade.read_tables(text(data))
    for group in (masquerade.masquerade(NETWORK, OWN, True), masquerade.forward(NETWORK)):
        for lines in (
            masquerade.repair(tables, group, keep_foreign=True),
            masquerade.repair(tables, group, keep_foreign=False),
            masquerade.removal(tables, group, group.rules),
        ):
            assert all("\n" not in line for line in lines)
            masquerade.payload({group.table: lines})


def nft_list(data: bytes) -> None:
    """What nft prints."""
    chain = nftrules.masquerade(NETWORK, OWN, True)
    seen = nftrules.read_table(text(data)).get(chain.name)
    rules = nftrules.with_foreign(chain.rules, seen.rules if seen else ())
    if rules is not None:
        nftrules.statements(4, [chain._replace(rules=rules)])
    nftrules.read_echo(text(data), 4, "postrtg")


def nft_notification(data: bytes) -> None:
    """What the kernel tells of rules."""
    for kind, _, _, payload in netlink.messages(data):
        nftables.concerns(kind, payload, {(b"nat", b"POSTROUTING")}, {b"nat"})
    nftables.concerns(data[0] if data else 0, data[1:], {(b"nat", b"POSTROUTING")}, {b"nat"})


def wireguard_dump(data: bytes) -> None:
    """What the kernel says of a WireGuard device."""
    wireguard.read_device([data])


def xfrm_dump(data: bytes) -> None:
    """What the kernel says of IPsec."""
    xfrm.parse_policy(data)
    xfrm.parse_association(data)
    xfrm.parse_change(data[0] if data else 0, data[1:])


def datagram(data: bytes) -> None:
    """A datagram of the udp backend, from a peer and from a pod."""
    from flannel.backends import udpoffload, udpproxy

    udpproxy.unreachable(data, b"\x0a\xf4\x01\0") if len(data) >= 20 else None
    joiner = udpoffload.Joiner(int(OWN.network_address), int(OWN.netmask))
    for size in (max(1, len(data) // 3), max(1, len(data)), 1):
        joiner.pieces(bytearray(data) + bytearray(1 << 12), len(data), size)
    header, packet = bytearray(data[:10].ljust(10, b"\0")), bytearray(data[10:])
    if len(packet) >= udpoffload.SMALLEST and packet[0] >> 4 == 4:
        length = len(packet)
        packet += bytes(1 << 12)
        if header[1] != udpoffload.WHOLE:
            udpoffload.cut(header, packet, length)
        else:
            udpoffload.finish_checksum(header, packet, length)


_PEER = netlink.attribute(1, b"k" * 32) + netlink.attribute(
    4, wireguard.pack_endpoint((IPv4Address("10.0.0.1"), 51820))
)
_TCP = bytes.fromhex("45000028000140004006000a0af402050af40105") + bytes.fromhex("0050c000000000010000000250100200")
#: A parser's own refusals of what is no JSON to begin with.
_JSON = (ValueError, RecursionError)

TARGETS = (
    Target("net-conf", net_conf, NET_CONFS, (netconf.NetConfError, BackendError), (b"Backend", b"SubnetLen", b"Type")),
    Target("subnet.env of an earlier run", in_file(subnetenv.read), SUBNET_ENV),
    Target("subnet.env for the plugin", lambda data: basics.parse_subnet_env(text(data)), SUBNET_ENV, (ValueError,)),
    Target("journal", in_file(Recorded), JOURNAL),
    Target("flags", flags, (b"-v=3\n--iface\neth0\n--ip-masq\n\nFLANNELD_PUBLIC_IP=1.2.3.4",), (cli.UsageError,)),
    Target("etcd key", lease_key, (b"10.244.2.0-24", b"10.5.34.0-24&fd00:10:5:34::-64"), (ValueError,)),
    Target("etcd value", lease_value, VALUES, (ValueError,), (b"PublicIP", b"VtepMAC", b"BackendData")),
    Target("etcd JSON gateway", gateway, GATEWAY, _JSON, (b"kvs", b"header", b"events", b"key")),
    Target(
        "HTTP", http_answer, HTTP, (shorthttp.BadAnswerError,), (b"Transfer-Encoding: chunked", b"Content-Length: 5")
    ),
    Target("etcd watch", etcd_watch, ETCD_LINES, (StoreError,), (b'{"result":', b'{"error":{"grpc_code":', b"\n")),
    Target("etcd gRPC", protobuf, PROTOBUF),
    Target("etcd error", lambda data: _error_of(400, "text", data), (b'{"code":14,"message":"no leader"}',)),
    Target("node", node, NODES, _JSON, (b"podCIDRs", b"annotations", b"metadata")),
    Target("API watch", watch, WATCH_LINES, (StoreError,), (b"ERROR", b"retryAfterSeconds", b'"details":')),
    Target("YAML", lambda data: read(text(data)), KUBECONFIG, (YamlError,), (b"- ", b": ", b"|", b"'", b'"')),
    Target("kubeconfig", in_file(from_kubeconfig), KUBECONFIG, (StoreError,), (b"server", b"token", b"exec")),
    Target("CNI configuration", cni_config, CNI, (), (b"delegate", b"prevResult", b"name")),
    Target(
        "CNI environment", cni_environment,
        (b"CNI_COMMAND=ADD\nCNI_CONTAINERID=abc\nCNI_NETNS=/run/netns/x\nCNI_IFNAME=eth0\nCNI_PATH=/opt/cni/bin",),
        (basics.CniError,), (b"CNI_COMMAND=DEL", b"CNI_IFNAME="),
    ),
    Target("VICI", decode, (encode({"a": "b", "s": {"l": ["1", "2"], "n": {"x": ""}}}),), (ViciError,)),
    Target("rtnetlink", notification, NOTIFICATIONS),
    Target("nftables notification", nft_notification, (b"\6" + b"\2\0\0\0" + netlink.attribute(1, b"nat\0"),)),
    Target("WireGuard", wireguard_dump, (b"\0\1\0\0" + netlink.attribute(8, netlink.attribute(0, _PEER)),)),
    Target("xfrm", xfrm_dump, (b"\0" * 400, bytes(range(256)))),
    Target("datagram", datagram, (_TCP + b"x" * 40, bytes(10) + _TCP)),
    Target("iptables-save", iptables_save, IPTABLES, (), (b"-A ", b"FLANNEL-POSTRTG", b"*nat", b":")),
    Target("nft", nft_list, NFT, (), (b"chain postrtg {", b"}", b"type nat hook")),
    Target("iptables --version", lambda data: iptables.flavour_of(text(data)), (b"iptables v1.8.9 (nf_tables)",)),
)  # fmt: skip
