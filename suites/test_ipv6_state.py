"""V6: what IPv6 beside IPv4 leaves in the kernel, in the store and in subnet.env."""

from __future__ import annotations

from ipaddress import IPv6Interface, IPv6Network
from itertools import combinations

from testbed.checks import check
from testbed.deadline import Deadline
from testbed.fixtures import Facts, Figures, Paths
from testbed.fixtures6 import Facts6, address6
from testbed.nodes.deploy import Cluster
from testbed.probes.flows import ping
from testbed.probes.iproute6 import read_state6

DAD_SECONDS = 3.0
"""How long the whole of a pod's making may take: each wait for a duplicate address takes 1 to 2 s."""
HEAL_SECONDS = 15.0
EVERYWHERE = IPv6Network((0, 0))


@check("V6-05")
def test_device_has_flannel_s_attributes(cluster: Cluster, facts: Facts, facts6: Facts6) -> None:
    """A vxlan device of its own, local to the node's IPv6 address, with checksums and 20 bytes less. Source: src."""
    flannel = cluster.flannel
    for node in cluster.members:
        device = facts.link(node.name, str(flannel.tunnel_device6))
        wanted = {
            "id": flannel.vni,
            "local6": str(node.spec.ip6),
            "link": node.spec.underlay.name,
            "port": flannel.port,
            "learning": bool(flannel.backend_keys.get("Learning")),
            "udp_zero_csum6_tx": False,
            "udp_zero_csum6_rx": False,
        }
        found = {key: device.data.get(key) for key in wanted}
        assert (device.kind, found) == ("vxlan", wanted), f"{node.name}: {device.name} is a {device.kind} with {found}"
        assert device.up, f"{node.name}: {device.name} is {sorted(device.flags)}"
        assert device.mtu == facts6.mtu(node.name), f"{node.name}: {device.name} has MTU {device.mtu}"
        base = IPv6Interface((cluster.pod_cidr6(node.name)[0], 128))
        own = facts6.node(node.name).addresses.get(device.name)
        assert own == (base,), f"{node.name}: {device.name} has {own}"
        if flannel.ipv4:
            other = facts.link(node.name, str(flannel.tunnel_device))
            assert device.mac != other.mac, f"{node.name}: {device.name} and {other.name} have one MAC"
        else:
            assert facts.node(node.name).link(str(flannel.tunnel_device)) is None, f"{node.name} has a device of IPv4"
        assert not device.addresses, f"{node.name}: {device.name} has {device.addresses}"


@check("V6-06")
def test_routes_neighbours_and_forwarding_entries_lead_to_the_peers(
    cluster: Cluster, facts: Facts, facts6: Facts6
) -> None:
    """One of each for a tunnelled peer, permanent, as its lease says, and no others there. Source: #2536, src."""
    device = str(cluster.flannel.tunnel_device6)

    def look() -> None:
        leases = facts.leases()
        for node in cluster.members:
            state = facts6.node(node.name)
            peers = facts6.tunnelled_peers(node.name)
            macs = {peer: str(leases[peer]["value"]["BackendV6Data"]["VtepMAC"]) for peer in peers}
            routes = sorted((r.dst, r.gateway, "onlink" in r.flags) for r in state.of_device(device))
            assert routes == sorted((cidr, cidr[0], True) for cidr in peers.values()), f"{node.name}: {routes}"
            near = [n for n in state.neighbours if n.dev == device and not n.address.is_multicast]
            neighbours = {(n.address, n.mac, n.state) for n in near}
            wanted = {(cidr[0], macs[peer], frozenset({"PERMANENT"})) for peer, cidr in peers.items()}
            assert neighbours == wanted, f"{node.name}: {neighbours}"
            entries = sorted((e.mac, e.dst, e.state) for e in state.fdb if e.dev == device)
            ends = sorted((macs[peer], facts6.ip(peer), "permanent") for peer in peers)
            assert entries == ends, f"{node.name}: {entries}"

    facts6.eventually(look)


@check("V6-07")
def test_pods_have_both_families(cluster: Cluster, facts: Facts, facts6: Facts6) -> None:
    """An address of the podCIDR, three routes by the bridge's first address, one MTU. Source: cni docs, src."""
    for pod in cluster.pods.values():
        node, cidr = pod.node.name, cluster.pod_cidr6(pod.node.name)
        state = read_state6(pod, fdb=False)
        assert state.addresses.get("eth0") == (IPv6Interface((address6(pod), cidr.prefixlen)),), f"{state.addresses}"
        assert address6(pod) in cidr, f"{pod.name}: {pod.address6} is not in {cidr}"
        found = {(r.dst, r.gateway) for r in state.routes if r.dev == "eth0" and not r.dst.is_link_local}
        found = {(dst, gateway) for dst, gateway in found if not dst.is_multicast}
        wanted = {(EVERYWHERE, cidr[1]), (facts6.network, cidr[1]), (cidr, None)}
        assert found == wanted, f"{pod.name}: {found}"
        bridge = facts6.node(node).addresses.get(cluster.flannel.bridge)
        assert bridge == (IPv6Interface((cidr[1], cidr.prefixlen)),), f"{node}: the bridge has {bridge}"
        inside = facts.pod(pod).link("eth0")
        assert inside is not None
        assert inside.mtu == facts.mtu(node), f"{pod.name}: MTU {inside.mtu}"


@check("V6-08")
def test_subnet_env_and_leases_carry_both_families(cluster: Cluster, facts: Facts, facts6: Facts6) -> None:
    """Disjoint subnets of the right size, the first host in subnet.env, address and MAC in the lease. Source: src."""
    leases = facts.leases()
    device = cluster.flannel.tunnel_device6 if cluster.flannel.backend.type == "vxlan" else None
    cidrs = facts6.pod_cidrs()
    for node, cidr in cidrs.items():
        env = cluster.subnet_env(node)
        assert IPv6Network(env["FLANNEL_IPV6_NETWORK"]) == facts6.network, f"{node}: {env}"
        assert cluster.subnet6(node).ip == cidr[1], f"{node}: {env}"
        assert (cidr.subnet_of(facts6.network), cidr.prefixlen) == (True, cluster.flannel.subnet6_len), (
            f"{node}: {cidr}"
        )
        lease = leases[node]
        leased = lease["key"].rpartition("/")[2].rpartition("&")[2].replace("-", "/")
        assert IPv6Network(leased) == cidr, f"{node}: the lease is {lease['key']}"
        assert lease["value"]["PublicIPv6"] == str(facts6.ip(node)), f"{node}: {lease['value']}"
        if device is not None:
            data = {"VNI": cluster.flannel.vni, "VtepMAC": facts.link(node, device).mac}
            assert lease["value"]["BackendV6Data"] == data, f"{node}: {lease['value']}"
    for (one, first), (other, second) in combinations(cidrs.items(), 2):
        assert not first.overlaps(second), f"{one} and {other} share {first}"


@check("V6-09")
def test_direct_peers_have_plain_routes(cluster: Cluster, facts6: Facts6) -> None:
    """Peers of the node's subnet by their own IPv6 address and the underlay, no others there. Source: S0, src."""

    def look() -> None:
        for node in cluster.members:
            routes = facts6.node(node.name).of_device(node.spec.underlay.name)
            found = {(r.dst, r.gateway) for r in routes if r.dst.subnet_of(facts6.network)}
            peers = facts6.direct_peers(node.name)
            assert found == {(cidr, facts6.ip(peer)) for peer, cidr in peers.items()}, f"{node.name}: {found}"

    facts6.eventually(look)


@check("V6-04")
def test_a_pod_is_made_without_waiting_for_duplicates(
    cluster: Cluster, paths: Paths, facts6: Facts6, figures: Figures
) -> None:
    """ADD with IPv6 ends within 3 s, and the pod's address can be used at once. Source: k8s#54651."""
    path = paths.remote()
    deadline = Deadline(DAD_SECONDS)
    pod = cluster.add_pod(path.source_node.name, "brief")
    took = deadline.elapsed
    figures.add("a pod with IPv6, made", took, "s", DAD_SECONDS)
    try:
        assert not deadline.passed, f"a pod with IPv6 took longer than {DAD_SECONDS:.0f} s"
        answer = ping(pod, address6(path.pods[1]))
        assert answer.lost == 0, answer.output
    finally:
        cluster.delete_pod(pod)
        facts6.forget()


@check("RES-03", disruptive=True)
def test_a_deleted_ipv6_device_comes_back(cluster: Cluster, paths: Paths, facts6: Facts6) -> None:
    """With its address, its peers and its MAC, while IPv4 goes on undisturbed. Source: src."""
    path = paths.take("XS")
    node, device = path.source_node, str(cluster.flannel.tunnel_device6)
    mac = facts6.facts.link(node.name, device).mac
    node.run(["ip", "link", "delete", device])
    facts6.forget()
    try:
        if cluster.flannel.ipv4:
            plain = ping(path.source, path.address, count=20)
            assert plain.lost == 0, f"IPv4: {plain.output}"

        def look() -> None:
            assert facts6.facts.link(node.name, device).mac == mac
            routes = {route.dst for route in facts6.node(node.name).of_device(device)}
            assert routes == set(facts6.tunnelled_peers(node.name).values()), f"{node.name}: {routes}"

        facts6.eventually(look, seconds=HEAL_SECONDS)
        answer = ping(path.source, address6(path.pods[1]), count=2)
        assert answer.lost == 0, answer.output
    finally:
        if facts6.facts.node(node.name).link(device) is None:  # so that the rows behind this one can say their own
            cluster.stop_flanneld(node.name)
            cluster.start_flanneld(node.name)
            cluster.wait_ready([node.name])
            facts6.forget()
