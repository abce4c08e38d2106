"""VXD: the device's MAC, which peers know it by."""

from __future__ import annotations

from collections.abc import Callable

from testbed.checks import check
from testbed.fixtures import Facts, Paths
from testbed.nodes.deploy import Cluster
from testbed.nodes.otherwise import restart_flanneld
from testbed.nodes.restart import restart_node
from testbed.probes.flows import pinged

SET_BY_HAND = "3"
"""`addr_assign_type` of a MAC that was given: the one that no policy of udev's or systemd's changes."""
HEAL_SECONDS = 15.0
LOCAL, GROUP = 0x02, 0x01


@check("VXD-07", disruptive=True)
def test_the_mac_outlives_what_happens_to_a_node(paths: Paths, cluster: Cluster, facts: Facts) -> None:
    """A local unicast MAC, given by hand; the same after flanneld, device and node began anew. Source: #1155, #1330."""
    name, device = paths.remote().target_node.name, str(cluster.flannel.tunnel_device)
    facts.forget()
    macs = {node.name: facts.link(node.name, device).mac for node in cluster.members}
    for node, mac in macs.items():
        first = int(mac.partition(":")[0], 16)
        assert first & (LOCAL | GROUP) == LOCAL, f"{node}: {mac} is no local unicast MAC"
    happenings: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        "flanneld was started anew": lambda: restart_flanneld(cluster, name),
        "the device was deleted": lambda: cluster.lab.node(name).run(["ip", "link", "delete", device]),
        "the node was started anew": lambda: restart_node(cluster, name),
    }
    for what, happen in happenings.items():
        happen()
        facts.forget()
        try:
            facts.eventually(lambda: same_mac(cluster, facts, name, macs[name]), seconds=HEAL_SECONDS)
        except AssertionError as error:
            put_right(cluster, facts, name, macs[name])
            raise AssertionError(f"once {what}: {error}") from error
    path = paths.remote()  # the pod there is another one
    facts.eventually(lambda: pinged(path.source, path.address, wait=1), seconds=HEAL_SECONDS)


def same_mac(cluster: Cluster, facts: Facts, node: str, mac: str) -> None:
    """The device has that MAC, given by hand, and its lease says it."""
    device = str(cluster.flannel.tunnel_device)
    found = facts.link(node, device).mac
    assert found == mac, f"{node}: {device} has the MAC {found}, and had {mac}"
    told = facts.leases()[node]["value"]["BackendData"]["VtepMAC"]
    assert told == mac, f"{node}: its lease says {told}, and the device has {mac}"
    kind = cluster.lab.node(node).run(["cat", f"/sys/class/net/{device}/addr_assign_type"]).stdout.strip()
    assert kind == SET_BY_HAND, f"{node}: addr_assign_type of {device} is {kind}"


def put_right(cluster: Cluster, facts: Facts, name: str, mac: str) -> None:
    """Give the device its MAC back, by hand, and let every peer know it, so that the rows behind this one hold."""
    device, node = str(cluster.flannel.tunnel_device), cluster.lab.node(name)
    facts.forget()
    other = facts.link(name, device).mac
    node.run(["ip", "link", "set", "dev", device, "address", mac])
    for member in cluster.members:
        restart_flanneld(cluster, member.name)
        if member.name != name and other != mac:
            entry = ["bridge", "fdb", "delete", other, "dev", device, "dst", str(node.spec.ip)]
            member.run(entry, check=False)
    facts.forget()
