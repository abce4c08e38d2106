"""IPIP: how its packets are found on the wire, what becomes of them at the far end, and what it cannot carry."""

from __future__ import annotations

import json

import pytest

from testbed.checks import check, inconclusive
from testbed.fixtures import Facts, Path, Paths
from testbed.nodes.deploy import Cluster
from testbed.nodes.madeup import etcd_of
from testbed.nodes.nodefiles import FLANNELD
from testbed.nodes.otherwise import restart_flanneld
from testbed.probes.capture import Window
from testbed.probes.fabric import port_filter
from testbed.probes.flows import Nonce, ping
from testbed.probes.recipe import selected

ECHO_REQUEST = 8
OTHER_PREFIX, OTHER_FILE = "/ipip-11/network", "/run/flannel/ipip-11.env"
ADDRESS6, NETWORK6 = "fd00:1::11/64", "fd00:2::/48"
GROUP = "239.1.2.3"
REFUSED_SECONDS = 20.0
LEFT = ("state", "lease")
"""What the bundled flanneld keeps beside its file."""
RAN = 124
"""The exit status of timeout(1) for what was still running."""
BACK_SECONDS = 15.0


@check("IPIP-08")
def test_the_recipe_finds_a_pod_s_packets(paths: Paths, cluster: Cluster, window: Window) -> None:
    """`ip[32:4]` and `ip[36:4]` are the inner addresses, as the outer header has no options. Source: S4."""
    path, nonce, other = paths.take("XS"), Nonce.new(), Nonce.new()
    source, target = path.pods
    second = cluster.pods[f"{path.source_node.name}/testapp"]
    for pod, mark in ((source, nonce), (second, other)):
        answer = ping(pod, target.address, nonce=mark, count=3)
        assert answer.lost == 0, answer.output
    for mark in (nonce, other):
        window.select(path.source_nic, mark, lambda p: p.encapsulated, at_least=6)
    decoded = window.everything(path.source_nic, source.address.packed)
    inner = [p for p in decoded if p.inner and p.inner.ip and source.address in (p.inner.ip.src, p.inner.ip.dst)]
    wanted = [f"{packet.time:.6f}" for packet in inner]
    number = f"0x{source.address.packed.hex()}"
    pcap = window.pcaps()[path.source_nic]
    found = [f"{time:.6f}" for time in selected(path.source_node, pcap, f"ip[32:4]={number} or ip[36:4]={number}")]
    assert len(found) >= 6, f"the recipe selects {len(found)} packets of 3 pings"
    assert found == wanted, f"the recipe selects {len(found)} packets, {len(wanted)} are {source.name}'s in a tunnel"


@check("IPIP-09", encapsulated=True)
def test_the_far_end_hands_packets_to_the_pod(path: Path, cluster: Cluster, facts: Facts, window: Window) -> None:
    """Out of the tunnel, by the podCIDR's route and the bridge's table, to the pod's own veth. Source: S0, S3."""
    target, nonce = path.pods[1], Nonce.new()
    answer = ping(path.source, target.address, nonce=nonce, count=2)
    assert answer.lost == 0, answer.output
    node, bridge = path.target_node.name, cluster.flannel.bridge
    facts.forget()
    state, veth = facts.node(node), facts.host_veth(target).name
    assert [r.dev for r in state.routes_to(cluster.pod_cidr(node))] == [bridge], f"{node}: {state.routes}"
    ways = {e.dev for e in state.fdb if e.mac == target.mac and e.master == bridge}
    assert ways == {veth}, f"{node}: {target.name}'s MAC is behind {ways}, not {veth}"
    ours = facts.link(node, bridge).mac

    def is_request(packet: object) -> bool:
        icmp = getattr(packet, "icmp", None)
        return bool(icmp and icmp.type == ECHO_REQUEST)

    for place in (f"{node}:{cluster.flannel.tunnel_device}", f"{node}:{veth}", f"{target.name}:eth0"):
        seen = window.select(place, nonce, is_request, at_least=2)
        ends = [(p.ip.src, p.ip.dst) for p in seen if p.ip]
        assert ends == [(path.source.address, target.address)] * 2, f"{place}: {seen}"
        frames = [(p.ether.src, p.ether.dst) for p in seen if p.ether]
        assert frames in ([], [(ours, target.mac)] * 2), f"{place}: frames {frames}, not from {ours} to {target.mac}"
        assert frames or place.endswith(str(cluster.flannel.tunnel_device)), f"{place} shows no frames"


@check("IPIP-11")
def test_nothing_but_unicast_of_ipv4(paths: Paths, cluster: Cluster, window: Window) -> None:
    """IPv6 in the configuration is refused, and says why; a pod's multicast stays on its node. Source: S0, S4."""
    etcd, node, path = etcd_of(cluster), cluster.members[-1], paths.take("XS")
    if etcd is None:
        pytest.skip("a second configuration needs etcd")
    nonce, control = Nonce.new(), Nonce.new()
    path.source.run(["ping", "-n", "-c", "2", "-i", "0.05", "-W", "1", "-t", "8", "-p", nonce.hex, GROUP], check=False)
    assert window.packets(f"{path.source.name}:eth0", nonce, at_least=2), "the pod sent nothing to the group"
    answer = ping(path.source, path.address, nonce=control)
    assert answer.lost == 0, answer.output
    for place in (path.source_nic, path.target_nic, f"{path.target.name}:eth0"):
        window.absent(place, nonce, control=control)
    conf = {**cluster.flannel.net_conf, "EnableIPv6": True, "IPv6Network": NETWORK6}
    nic = node.spec.underlay.name
    argv = [FLANNELD, f"--etcd-endpoints={etcd.endpoint}", f"--etcd-prefix={OTHER_PREFIX}", f"--iface={nic}"]
    argv += [f"--subnet-file={OTHER_FILE}", "--iptables-forward-rules=false"]
    argv = ["timeout", f"{REFUSED_SECONDS:.0f}", *argv]
    try:
        node.run(["ip", "-6", "address", "add", ADDRESS6, "dev", nic, "nodad"])
        etcd.put(f"{OTHER_PREFIX}/config", json.dumps(conf))
        done = node.run(argv, check=False, timeout=REFUSED_SECONDS + 10)
        if done.rc == RAN:  # and has put its own address on the device
            restart_flanneld(cluster, node.name)
    finally:
        node.run(["ip", "-6", "address", "delete", ADDRESS6, "dev", nic], check=False)
        node.run(["rm", "-f", OTHER_FILE, *(f"{OTHER_FILE}.{kind}" for kind in LEFT)])
        for key in etcd.under(f"{OTHER_PREFIX}/"):
            etcd.delete(key)
    assert done.rc == 1, f"exit status {done.rc} with IPv6 in the configuration: {done.stderr[-300:]}"
    last = done.stderr.strip().splitlines()[-1]
    assert "ipip" in last, f"it ends without a word about ipip: {last}"
    assert "IPv4" in last or "IPv6" in last, f"it ends without a word about IPv6: {last}"


@check("IPIP-13", disruptive=True)
def test_a_fabric_that_drops_the_tunnel_is_told_from_a_fault_of_pods(
    paths: Paths, facts: Facts, cluster: Cluster, window: Window
) -> None:
    """Protocol 4 leaves and never arrives, where the nodes' other packets do. Source: kops#17832, calico#2700."""
    path, nonce, control = paths.take("XS"), Nonce.new(), Nonce.new()
    here, there = path.source_node.spec.ip, path.target_node.spec.ip
    with port_filter(cluster.lab, path.source_node.name, "ip", "protocol", "4"):
        answer = ping(path.source, path.address, nonce=nonce, count=3, wait=1)
        plain = ping(path.source_node, there, nonce=control)
        left = window.select(path.source_nic, nonce, lambda p: p.encapsulated, at_least=3)
    assert [(p.ip.src, p.ip.dst, p.ip.proto) for p in left if p.ip] == [(here, there, 4)] * 3, f"what left: {left}"
    if plain.lost:
        inconclusive(f"other packets do not pass either: {plain.output}")
    window.absent(path.target_nic, nonce, control=control)
    assert answer.received == 0, answer.output

    def well() -> None:
        again = ping(path.source, path.address, wait=1)
        assert again.lost == 0, again.output

    facts.eventually(well, seconds=BACK_SECONDS)
