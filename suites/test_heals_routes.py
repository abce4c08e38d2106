"""HGW, DR: routes that somebody or the kernel takes away, and an underlay that takes no stranger's address."""

from __future__ import annotations

from testbed.checks import check, inconclusive
from testbed.fixtures import Facts, Path, Paths
from testbed.nodes.deploy import Cluster
from testbed.probes.capture import Window
from testbed.probes.fabric import port_filter
from testbed.probes.flows import Nonce, ping, pinged, udp_flows

RECHECK_SECONDS = 11.0
FLAP_SECONDS = 15.0
VXLAN_PORT = 8472


@check("HGW-06", disruptive=True)
def test_a_deleted_route_returns(paths: Paths, cluster: Cluster, facts: Facts) -> None:
    """The same as before within 11 s. Source: src."""
    path = paths.take("SS")
    node, cidr = path.source_node, cluster.pod_cidr(path.target_node.name)
    facts.forget()
    before = facts.node(node.name).routes_to(cidr)
    assert before, f"{node.name} has no route to {cidr}"
    node.run(["ip", "route", "delete", str(cidr)])
    facts.forget()

    def returned() -> None:
        assert facts.node(node.name).routes_to(cidr) == before, f"{node.name} has no route to {cidr} again"

    try:
        facts.eventually(returned, seconds=RECHECK_SECONDS)
    finally:
        if not facts.node(node.name).routes_to(cidr):  # so that the rows behind this one can say their own
            via = ["via", str(before[0].gateway), "dev", before[0].dev, *sorted(before[0].flags & {"onlink"})]
            node.run(["ip", "route", "replace", str(cidr), *via])
            facts.forget()
    answer = ping(path.source, path.address)
    assert answer.lost == 0, answer.output


@check("DR-08", disruptive=True)
def test_direct_routes_return_after_a_flap(paths: Paths, facts: Facts) -> None:
    """The kernel drops them with the link; they are back within 15 s. Source: #1070, #1232, #1434, #1759."""
    path = paths.take("SS")
    node, card = path.source_node, path.source_node.spec.underlay.name
    facts.forget()
    wanted = {cidr: facts.node(node.name).routes_to(cidr) for cidr in facts.direct_peers(node.name).values()}
    assert all(wanted.values()), f"{node.name}: {wanted}"
    node.run(["ip", "link", "set", card, "down"])
    facts.forget()
    kept = [str(cidr) for cidr, routes in wanted.items() if facts.node(node.name).routes_to(cidr) == routes]
    node.run(["ip", "link", "set", card, "up"])
    if node.spec.gateway:  # what whoever keeps a node's addresses puts back
        node.run(["ip", "route", "replace", "default", "via", str(node.spec.gateway), "dev", card])
    if kept:
        inconclusive(f"{node.name} kept its routes to {', '.join(kept)} by a link that was down")

    def returned() -> None:
        found = {cidr: facts.node(node.name).routes_to(cidr) for cidr in wanted}
        missing = [str(cidr) for cidr, routes in wanted.items() if found[cidr] != routes]
        assert not missing, f"{node.name} has no direct route to {', '.join(missing)}"

    facts.forget()
    try:
        facts.eventually(returned, seconds=FLAP_SECONDS)
    finally:
        for cidr, (route, *_) in wanted.items():
            if not facts.node(node.name).routes_to(cidr):  # so that the rows behind this one can say their own
                node.run(["ip", "route", "replace", str(cidr), "via", str(route.gateway), "dev", card])
        facts.forget()
    facts.eventually(lambda: pinged(path.source, path.address, wait=1), seconds=FLAP_SECONDS)


@check("HGW-05", direct=True, disruptive=True)
def test_a_port_that_checks_addresses_takes_no_pod_s(
    path: Path, paths: Paths, cluster: Cluster, window: Window
) -> None:  # fmt: skip
    """Where frames from another address than the port's are dropped, only tunnels work. Source: S4, S2."""
    source, target = path.source_node, path.target_node
    plain, control = Nonce.new(), Nonce.new()
    with port_filter(cluster.lab, source.name, "ip", "saddr", "!=", str(source.spec.ip)):
        answer = ping(path.source, path.address, nonce=plain, count=2, wait=1)
        # What a tunnel would send: the same card, from the node's own address.
        port = cluster.flannel.port or VXLAN_PORT
        if cluster.flannel.backend.tunnels:
            far = paths.take("XS")
            tunnelled = ping(far.source, far.address, count=2)
            assert tunnelled.lost == 0, f"encapsulated: {tunnelled.output}"
        udp_flows(source, target.spec.ip, count=1, nonce=control, port=port + 1, wait=0.2)
        if not window.packets(path.target_nic, control):
            inconclusive(f"{path.target_nic}: the node's own packets are dropped too")
    assert window.packets(path.source_nic, plain), f"{path.source_nic}: the pod's packets did not leave the node"
    assert answer.received == 0, f"pods' packets pass a port that takes {source.spec.ip} alone: {answer.output}"
    window.absent(path.target_nic, plain, control=control)
    restored = ping(path.source, path.address)
    assert restored.lost == 0, restored.output
