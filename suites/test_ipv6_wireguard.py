"""V6: wireguard, which carries IPv6 in a device of its own, or both families in one."""

from __future__ import annotations

from ipaddress import IPv6Interface

from testbed.checks import check
from testbed.fixtures import Paths
from testbed.fixtures6 import Facts6, address6, ends6
from testbed.nodes.deploy import Cluster
from testbed.probes.capture import Window
from testbed.probes.flows import Nonce, ping
from testbed.probes.wireguard import read_wireguard

SEPARATE, BY_IPV6 = "separate", "ipv6"


@check("V6-17")
def test_peers_carry_ipv6_by_the_mode_s_device_and_endpoint(
    paths: Paths, cluster: Cluster, facts6: Facts6, window: Window
) -> None:
    """Address, route, the podCIDRs of each peer, its endpoint's family, and nothing in clear. Source: src."""
    path, nonce, control = paths.take("XS"), Nonce.new(), Nonce.new()
    answer = ping(path.source, ends6(path)[1], nonce=nonce, count=3)
    assert answer.lost == 0, answer.output
    plain = ping(path.source_node, path.target_node.spec.ip, nonce=control)
    assert plain.lost == 0, plain.output
    for wire in path.wires:
        window.absent(wire, nonce, control=control)
        for pod in path.pods:
            clear = window.everything(wire, address6(pod).packed)
            assert not clear, f"{wire}: {len(clear)} packets with the address of {pod.name} in them"
    mode, device = cluster.flannel.backend_keys.get("Mode", SEPARATE), str(cluster.flannel.tunnel_device6)
    # The lab's addresses are private ones of both families, which `auto` speaks to by IPv4.
    by_ipv6 = mode in (SEPARATE, BY_IPV6) or not cluster.flannel.ipv4

    def look() -> None:
        leases = facts6.facts.leases()
        for node in cluster.members:
            state, cidr = facts6.node(node.name), cluster.pod_cidr6(node.name)
            assert state.addresses.get(device) == (IPv6Interface((cidr[0], 128)),), f"{node.name}: {state.addresses}"
            routes = [(route.dst, route.dev) for route in state.routes_to(facts6.network)]
            assert routes == [(facts6.network, device)], f"{node.name}: {routes}"
            found = {peer.key: (peer.allowed, peer.endpoint) for peer in read_wireguard(node, device)[1]}
            wanted = {}
            for name, peer in facts6.peers(node.name).items():
                value = leases[name]["value"]
                carried = [str(peer)]
                if mode != SEPARATE and cluster.flannel.ipv4:
                    carried.append(str(cluster.pod_cidr(name)))
                data = value["BackendV6Data" if by_ipv6 else "BackendData"]
                address = f"[{value['PublicIPv6']}]" if by_ipv6 else value["PublicIP"]
                wanted[data["PublicKey"]] = (tuple(sorted(carried)), f"{address}:{data['Port']}")
            assert found == wanted, f"{node.name}: {found}, not {wanted}"

    facts6.eventually(look)
