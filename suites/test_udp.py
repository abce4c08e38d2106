"""UDP: the backend that copies packets through flanneld."""

from __future__ import annotations

from ipaddress import IPv4Interface

from testbed.checks import check
from testbed.deadline import Deadline
from testbed.fixtures import Facts, Path
from testbed.nodes.deploy import Cluster
from testbed.probes.capture import Window
from testbed.probes.flows import Nonce, ping
from testbed.probes.iproute import route_get, udp_sockets

QUEUE = 500
RESTORED_SECONDS = 5.0


@check("UDP-01")
def test_device_is_a_bare_tun(cluster: Cluster, facts: Facts) -> None:
    """Point to point, no ARP, no MAC; a tun without packet information; the subnet's base address. Source: S0, S1."""
    for node, cidr in facts.pod_cidrs().items():
        device = facts.link(node, str(cluster.flannel.tunnel_device))
        assert {"POINTOPOINT", "NOARP", "UP"} <= device.flags, f"{node}: {sorted(device.flags)}"
        assert device.mac == "", f"{node}: {device.name} has the MAC {device.mac}"
        found = {key: device.data.get(key) for key in ("type", "pi")}
        assert found == {"type": "tun", "pi": False}, f"{node}: {found}"
        assert device.queue == QUEUE, f"{node}: qlen {device.queue}"
        assert device.addresses == (IPv4Interface((cidr[0], 32)),), f"{node}: {device.addresses}"


@check("UDP-02")
def test_one_mtu_from_the_device_to_the_pod(cluster: Cluster, facts: Facts) -> None:
    """The underlay's MTU less 28 on the device, the bridge, the veths and in the pods. Source: S1."""
    for pod in cluster.pods.values():
        node = pod.node.name
        wanted = cluster.lab.spec.node(node).underlay.mtu - cluster.flannel.backend.overhead
        device = facts.link(node, str(cluster.flannel.tunnel_device)).mtu
        assert (device, *facts.mtus(pod)) == (wanted,) * 4, f"{pod.name}: {device}, {facts.mtus(pod)}"


@check("UDP-03")
def test_own_subnet_beats_the_network_s_route(cluster: Cluster, facts: Facts) -> None:
    """The Network by the device, the podCIDR by the bridge, the longer prefix first. Source: S0, S1."""
    network, device = cluster.flannel.network, str(cluster.flannel.tunnel_device)
    for node in cluster.members:
        cidr = cluster.pod_cidr(node.name)
        found = {(r.dst, r.dev) for r in facts.node(node.name).routes if r.dst.subnet_of(network)}
        assert found == {(network, device), (cidr, cluster.flannel.bridge)}, f"{node.name}: {found}"
        remote = next(iter(facts.peers(node.name).values()))[2]
        local, away = route_get(node, cidr[2], remote)
        assert (local.dst if local else None) == cidr, f"{node.name}: {cidr[2]} by {local}"
        assert (away.dst if away else None) == network, f"{node.name}: {remote} by {away}"


@check("UDP-04")
def test_flanneld_owns_the_socket(cluster: Cluster) -> None:
    """A UDP socket on the node's address and the Port, held by flanneld and nobody else. Source: S0, S1."""
    for node in cluster.members:
        sockets = [socket for socket in udp_sockets(node) if socket.port == cluster.flannel.port]
        assert len(sockets) == 1, f"{node.name}: {sockets}"
        assert sockets[0].address == str(node.spec.ip), f"{node.name}: bound to {sockets[0].address}"
        pids = {pid for _, pid in sockets[0].owners}
        names = {name for name, _ in sockets[0].owners}
        assert cluster.flanneld_pid(node.name) in pids, f"{node.name}: held by {sockets[0].owners}"
        assert names == {"flanneld"}, f"{node.name}: held by {names}"


@check("UDP-05")
def test_outer_headers_are_node_to_node_by_one_port(path: Path, cluster: Cluster, facts: Facts, window: Window) -> None:
    """Source port and destination port are the Port, the addresses the nodes', the MACs the NICs'. Source: S0, S1."""
    nonce = Nonce.new()
    answer = ping(path.source, path.address, nonce=nonce, count=2)
    assert answer.lost == 0, answer.output
    source, target, port = path.source_node.spec, path.target_node.spec, cluster.flannel.port
    seen = window.packets(path.source_nic, nonce, at_least=4)
    found = [(p.ip.src, p.ip.dst, p.udp.sport, p.udp.dport) for p in seen if p.ip and p.udp]
    assert found == [(source.ip, target.ip, port, port), (target.ip, source.ip, port, port)] * 2
    hop = facts.next_hop_mac(path)
    sent = [(p.ether.src, p.ether.dst) for p in seen if p.ether and p.ip and p.ip.src == source.ip]
    assert sent == [(source.underlay.mac, hop)] * 2


@check("UDP-08")
def test_flanneld_takes_two_hops(path: Path) -> None:
    """A reply from another node has TTL 60: two kernels and two flannelds. Source: S1."""
    answer = ping(path.source, path.address, count=2)
    wanted = 64 if path.kind == "SN" else 60
    assert answer.ttls == (wanted, wanted), answer.output


@check("UDP-09")
def test_a_stopped_flanneld_stops_its_packets(path: Path, cluster: Cluster) -> None:
    """Packets between nodes go through flanneld, those of one node do not. Source: S0, S4."""
    node = path.source_node.name
    before = ping(path.source, path.address)
    assert before.received == 1, before.output
    cluster.signal_flanneld(node, "STOP")
    try:
        stopped = ping(path.source, path.address, count=3, wait=1)
    finally:
        cluster.signal_flanneld(node, "CONT")
    assert stopped.received == (3 if path.kind == "SN" else 0), stopped.output
    restored = Deadline(RESTORED_SECONDS).poll(lambda: ping(path.source, path.address, wait=1).received == 1)
    assert restored, f"no answer within {RESTORED_SECONDS:.0f} s of SIGCONT"


@check("UDP-11")
def test_packets_are_not_encrypted(path: Path, cluster: Cluster, window: Window) -> None:
    """What the pod sent can be read in the outer packet, whatever else was written about it. Source: S1."""
    source, target = path.pods
    nonce = Nonce.new()
    answer = ping(source, target.address, nonce=nonce)
    assert answer.lost == 0, answer.output
    seen = window.packets(path.source_nic, nonce, at_least=2)
    assert len(seen) == 2, f"{len(seen)} packets with the nonce on the wire"
    for packet in seen:
        assert packet.udp, f"not UDP: {packet}"
        assert packet.udp.dport == cluster.flannel.port
        assert nonce.value in packet.payload
        assert packet.inner, f"no bare IP packet in UDP: {packet}"
        assert packet.inner.ip, f"no bare IP packet in UDP: {packet}"
        assert {packet.inner.ip.src, packet.inner.ip.dst} == {source.address, target.address}
