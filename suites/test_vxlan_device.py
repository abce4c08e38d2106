"""VXD: the vxlan device."""

from __future__ import annotations

from ipaddress import IPv4Interface

from testbed.checks import check
from testbed.fixtures import Facts
from testbed.nodes.deploy import Cluster
from testbed.probes.iproute import udp_sockets

CHECKSUMS = {"udp_csum": True, "udp_zero_csum6_tx": False, "udp_zero_csum6_rx": False}
"""What Linux gives a device since 4.6 where nobody says anything, as no flannel does; before that it was noudpcsum."""


@check("VXD-01")
def test_device_has_flannel_s_attributes(cluster: Cluster, facts: Facts) -> None:
    """VNI, local address, parent, ports, learning and ageing of the device. Source: S0, S2."""
    flannel = cluster.flannel
    for node in cluster.members:
        device = facts.link(node.name, f"flannel.{flannel.vni}")
        assert device.kind == "vxlan", f"{node.name}: {device.name} is a {device.kind or 'plain device'}"
        found = {
            key: device.data.get(key) for key in ("id", "local", "link", "port_range", "port", "learning", "ageing")
        }
        wanted = {
            "id": flannel.vni,
            "local": str(node.spec.ip),
            "link": node.spec.underlay.name,
            "port_range": {"low": 0, "high": 0},
            "port": flannel.port,
            "learning": bool(flannel.backend_keys.get("Learning")),
            "ageing": 300,
        }
        assert found == wanted, f"{node.name}: {device.name} has {found}"


@check("VXD-02")
def test_device_has_upstream_s_checksum_flags(cluster: Cluster, facts: Facts) -> None:
    """UDP checksums on for IPv4, and none of the IPv6 exceptions. Source: S2, measured with 0.28.9."""
    for node in cluster.members:
        data = facts.link(node.name, str(cluster.flannel.tunnel_device)).data
        found = {key: data.get(key) for key in CHECKSUMS}
        assert found == CHECKSUMS, f"{node.name}: {found}"


@check("VXD-03")
def test_device_has_the_subnet_s_base_address(cluster: Cluster, facts: Facts) -> None:
    """The podCIDR's base address as /32, global; the device up, without a queue. Source: S0, S2."""
    for node, cidr in facts.pod_cidrs().items():
        device = facts.link(node, str(cluster.flannel.tunnel_device))
        assert device.addresses == (IPv4Interface((cidr[0], 32)),), f"{node}: {device.addresses}"
        assert device.scopes == ("global",), f"{node}: {device.scopes}"
        assert device.up, f"{node}: {sorted(device.flags)}"
        assert (device.qdisc, device.state) == ("noqueue", "UNKNOWN"), f"{node}: {device.qdisc}, {device.state}"


@check("VXD-04")
def test_device_leaves_room_for_the_headers(cluster: Cluster, facts: Facts) -> None:
    """The device's MTU is the underlay's less 50 bytes. Source: S0, S2, S4, #841."""
    for node in cluster.members:
        device = facts.link(node.name, str(cluster.flannel.tunnel_device))
        assert device.mtu == facts.mtu(node.name), f"{node.name}: {device.name} has MTU {device.mtu}"


@check("VXD-05")
def test_the_port_is_the_kernel_s(cluster: Cluster) -> None:
    """A UDP socket on the Port that no process holds: packets are encapsulated by the kernel. Source: S4, S0."""
    port = cluster.flannel.port
    for node in cluster.members:
        sockets = [socket for socket in udp_sockets(node) if socket.port == port]
        assert sockets, f"{node.name}: no socket on UDP port {port}"
        owners = [owner for socket in sockets for owner in socket.owners]
        assert not owners, f"{node.name}: UDP port {port} is held by {owners}"
