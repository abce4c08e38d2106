"""LSE: leases and subnet.env."""

from __future__ import annotations

import json
from itertools import combinations

from testbed.checks import check
from testbed.fixtures import Facts
from testbed.nodes.deploy import Cluster

ANNOTATIONS = ("kube-subnet-manager", "backend-type", "backend-data", "public-ip")


@check("LSE-01")
def test_subnet_env_has_exactly_its_keys(cluster: Cluster) -> None:
    """Network, subnet, MTU and masquerading, and nothing else. Source: S4, S2."""
    for node in cluster.members:
        env = cluster.subnet_env(node.name)
        wanted = {"FLANNEL_NETWORK", "FLANNEL_SUBNET", "FLANNEL_MTU", "FLANNEL_IPMASQ"}
        if cluster.flannel.network6 is not None:
            wanted |= {"FLANNEL_IPV6_NETWORK", "FLANNEL_IPV6_SUBNET"}
        assert set(env) == wanted, f"{node.name}: {sorted(env)}"
        network = env["FLANNEL_NETWORK"]
        assert network == str(cluster.flannel.network), f"{node.name}: FLANNEL_NETWORK is {network}"
        assert env["FLANNEL_IPMASQ"] == str(cluster.flannel.ip_masq).lower(), node.name


@check("LSE-02")
def test_subnet_is_the_first_host_of_the_lease(cluster: Cluster) -> None:
    """FLANNEL_SUBNET is the podCIDR's first host address with its mask. Source: S4."""
    leases = cluster.leases()
    for node in cluster.members:
        subnet = cluster.subnet(node.name)
        assert subnet.ip == subnet.network[1], f"{node.name}: {subnet} is not the first host address"
        leased = leases[node.name]["key"].rpartition("/")[2].partition("&")[0].replace("-", "/")
        assert str(subnet.network) == leased, f"{node.name}: the lease is {leased}"


@check("LSE-03")
def test_pod_cidrs_are_disjoint_parts_of_the_network(facts: Facts) -> None:
    """Every podCIDR is a subnet of the Network of the configured size; none overlap. Source: S2, S4, #752, #621."""
    flannel = facts.cluster.flannel
    cidrs = facts.pod_cidrs()
    for node, cidr in cidrs.items():
        assert cidr.subnet_of(flannel.network), f"{node}: {cidr} is outside {flannel.network}"
        assert cidr.prefixlen == flannel.subnet_len, f"{node}: {cidr}"
    for (one, first), (other, second) in combinations(cidrs.items(), 2):
        assert not first.overlaps(second), f"{one} and {other} share {first}"


@check("LSE-04")
def test_annotations_say_how_a_node_is_reached(cluster: Cluster, facts: Facts) -> None:
    """Managed by flannel, the configured type (none for udp), the tunnel's own address. Source: S4, src."""
    backend = cluster.flannel.backend.type
    device = cluster.flannel.tunnel_device
    nodes = cluster.kubernetes.nodes()
    for node in cluster.members:
        found = nodes[node.name]["metadata"]["annotations"]
        said = {key: found.get(f"flannel.alpha.coreos.com/{key}") for key in ANNOTATIONS}
        wanted = {
            "kube-subnet-manager": "true",
            "backend-type": "" if backend == "udp" else backend,
            "public-ip": str(node.spec.ip),
        }
        assert {key: said[key] for key in wanted} == wanted, f"{node.name}: {said}"
        data = json.loads(said["backend-data"] or "0")
        assert isinstance(data, dict) if backend in ("vxlan", "wireguard") else data is None, f"{node.name}: {said}"
        if device and backend in ("vxlan", "ipip"):
            local = facts.link(node.name, device).data["local"]
            assert local == said["public-ip"], f"{node.name}: {device} is local to {local}, the annotation says {said}"


@check("LSE-07")
def test_network_unavailable_is_cleared(cluster: Cluster, facts: Facts) -> None:
    """Every node's NetworkUnavailable condition is False, by flannel. Source: src."""

    def cleared() -> None:
        for name, node in cluster.kubernetes.nodes().items():
            found = [one for one in node["status"]["conditions"] if one["type"] == "NetworkUnavailable"]
            said = [(one["status"], one["reason"]) for one in found]
            assert said == [("False", "FlannelIsUp")], f"{name}: {said}"

    facts.eventually(cleared)


@check("LSE-05")
def test_lease_carries_the_devices_mac(cluster: Cluster, facts: Facts) -> None:
    """The lease's VNI and VtepMAC are the vxlan device's own, each MAC unique. Source: S4, #1155, #1795."""
    device = str(cluster.flannel.tunnel_device)
    macs = {}
    for name, lease in cluster.leases().items():
        data = lease["value"]["BackendData"]
        assert data["VNI"] == cluster.flannel.vni, f"{name}: {data}"
        macs[name] = data["VtepMAC"]
        assert data["VtepMAC"] == facts.link(name, device).mac, f"{name}: the lease and {device} differ"
    assert set(macs) == {node.name for node in cluster.members}
    assert len(set(macs.values())) == len(macs), f"one MAC twice: {macs}"
