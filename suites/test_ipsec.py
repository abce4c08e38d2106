"""IPS: the policies, the associations, what is on the wire, and what is refused."""

from __future__ import annotations

import json

import pytest

from testbed.checks import check
from testbed.deadline import Deadline
from testbed.fixtures import Facts, Paths
from testbed.flannelspec import TEST_PSK
from testbed.nodes.deploy import Cluster
from testbed.nodes.madeup import etcd_of, other_backend
from testbed.nodes.nodefiles import FLANNELD
from testbed.probes.capture import Window
from testbed.probes.encrypted import ESP, encrypted
from testbed.probes.flows import Nonce, ping
from testbed.probes.xfrm import Policy, read_associations, read_policies

REQID = 11
#: charon needs so long at most to agree on keys with every peer, on a slow machine.
AGREED_SECONDS = 30.0
OTHER_PREFIX, OTHER_FILE = "/ips-03/network", "/run/flannel/ips-03.env"
REFUSED_SECONDS = 20.0
LEFT = ("state", "lease")
"""What the bundled flanneld keeps beside its file."""


@check("IPS-01")
def test_three_policies_a_peer_and_associations_both_ways(cluster: Cluster, facts: Facts) -> None:
    """Out, in and forward: tunnel mode, ESP, flannel's reqid; keys agreed on in both directions. Source: src."""
    spec = cluster.lab.spec

    def look() -> None:
        for node in cluster.members:
            own, here = cluster.pod_cidr(node.name), node.spec.ip
            wanted, ways = set(), set()
            for peer, cidr in facts.peers(node.name).items():
                there = spec.node(peer).ip
                wanted.add(Policy("out", own, cidr, here, there, "esp", REQID, "tunnel"))
                wanted |= {Policy(way, cidr, own, there, here, "esp", REQID, "tunnel") for way in ("in", "fwd")}
                ways |= {(here, there), (there, here)}
            found = read_policies(node)
            assert set(found) == wanted, f"{node.name}: {found}"
            assert len(found) == len(wanted), f"{node.name}: {found}"
            states = read_associations(node)
            udp = bool(cluster.flannel.backend_keys.get("UDPEncap"))
            assert {(s.protocol, s.reqid, s.mode, s.encap) for s in states} <= {("esp", REQID, "tunnel", udp)}
            assert {(s.near, s.far) for s in states} == ways, f"{node.name}: {states}"

    facts.eventually(look, seconds=AGREED_SECONDS)


@check("IPS-02")
def test_only_esp_on_the_wire(paths: Paths, cluster: Cluster, facts: Facts, window: Window) -> None:
    """All that two nodes send each other for their pods is ESP, or in UDP where that is asked for. Source: src."""
    path = paths.take("XS")
    between = {path.source_node.spec.ip, path.target_node.spec.ip}
    nonce, control = Nonce.new(), Nonce.new()
    answer = ping(path.source, path.address, nonce=nonce, count=5)
    assert answer.lost == 0, answer.output
    ping(path.source_node, path.target_node.spec.ip, nonce=control)
    for wire in path.wires:
        window.absent(wire, nonce, control=control)
        carried = encrypted(cluster, path, window, wire)
        assert len(carried) >= 10, f"{wire}: {len(carried)} encrypted packets for 5 pings"
        assert {frozenset({p.ip.src, p.ip.dst}) for p in carried if p.ip} == {frozenset(between)}
        protocols = {p.ip.proto for p in carried if p.ip}
        assert protocols == {17 if cluster.flannel.port else ESP}, f"{wire}: protocols {protocols}"
    for node in (path.source_node, path.target_node):
        mtu = cluster.subnet_env(node.name)["FLANNEL_MTU"]
        assert mtu == str(facts.mtu(node.name)), f"{node.name}: FLANNEL_MTU is {mtu}"


@check("IPS-03")
def test_a_short_key_is_refused(cluster: Cluster) -> None:
    """flanneld ends, and says why without the key. Source: src."""
    etcd, node = etcd_of(cluster), cluster.members[-1]
    if etcd is None:
        pytest.skip("a second configuration needs etcd")
    short = TEST_PSK[:95]
    conf = {**cluster.flannel.net_conf, "Backend": {"Type": "ipsec", "PSK": short}}
    try:
        etcd.put(f"{OTHER_PREFIX}/config", json.dumps(conf))
        argv = [FLANNELD, f"--etcd-endpoints={etcd.endpoint}", f"--etcd-prefix={OTHER_PREFIX}"]
        deadline = Deadline(REFUSED_SECONDS)
        done = node.run(
            ["timeout", f"{REFUSED_SECONDS:.0f}", *argv, f"--subnet-file={OTHER_FILE}"],
            check=False, timeout=REFUSED_SECONDS + 10,
        )  # fmt: skip
        assert not deadline.passed, f"it runs with a key of {len(short)} characters"
        assert done.rc == 1, f"exit status {done.rc}: {done.stderr[-300:]}"
        assert "password is too short" in done.stderr, done.stderr[-500:]
        assert short not in done.stderr
        assert not etcd.under(f"{OTHER_PREFIX}/subnets/")
    finally:
        node.run(["rm", "-f", OTHER_FILE, *(f"{OTHER_FILE}.{kind}" for kind in LEFT)])
        for key in etcd.under(f"{OTHER_PREFIX}/"):
            etcd.delete(key)


@check("IPS-04", disruptive=True)
def test_no_policy_is_left_for_another_backend_s_packets(cluster: Cluster, facts: Facts) -> None:
    """A node that goes over to vxlan has neither policies nor associations; on its way back it has all. k3s#2808."""
    etcd, node = etcd_of(cluster), cluster.members[-1]
    if etcd is None:
        pytest.skip("a second configuration needs etcd")
    before = set(read_policies(node))
    assert before, f"{node.name} has no policies"

    def left() -> None:
        assert not read_policies(node), f"{node.name}: {read_policies(node)}"
        assert not read_associations(node), f"{node.name}: {read_associations(node)}"

    def back() -> None:
        facts.forget()
        assert set(read_policies(node)) == before, f"{node.name}: {read_policies(node)}"
        ways = {(one.near, one.far) for one in read_associations(node)}
        assert ways == {(policy.near, policy.far) for policy in before}, f"{node.name}: {ways}"
        assert facts.node(node.name).link("flannel.1") is None, f"{node.name}: flannel.1 is still there"

    try:
        with other_backend(cluster, etcd, node.name, {"Type": "vxlan", "VNI": 1}):
            facts.eventually(left)
        facts.eventually(back, seconds=AGREED_SECONDS)
    finally:  # where it is left, only this check is to suffer from it
        node.run(["ip", "link", "delete", "flannel.1"], check=False)
