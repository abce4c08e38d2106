"""Writes a lab for other tools: FRR configurations, containerlab, kind, Kubernetes manifests.  Pure.

What was rendered is parsed back and compared with the model before anyone sees it.
"""

from __future__ import annotations

from testbed.model import BRIDGE, LabSpec, NodeSpec, Role
from testbed.templates import render

MAX_PATHS = 64
"""Equal-cost paths that a router keeps; what the largest fabric has spines."""


def render_frr(spec: NodeSpec, lab: LabSpec) -> dict[str, str]:
    """FRR's files of one router, by name in /etc/frr.

    `frr.conf` serves both ways of starting FRR: read by `vtysh -b`, and given to zebra and bgpd with `-f`.
    """
    if not spec.routes or spec.loopback is None:
        raise ValueError(f"{spec.name} does not route")
    # A session that both ends open at once is torn down and tried again seconds later, so one end waits: the spines,
    # and whoever the outside host hangs on.
    ports = [
        {"name": iface.name, "passive": spec.role is Role.SPINE or iface.name.startswith("out")}
        for iface in spec.ifaces
        if iface.bridge is None and iface.address is None
    ]
    networks = [spec.loopback.network]
    if spec.bridge_address is not None:
        networks.append(spec.bridge_address.network)
    config = render(
        "topologies",
        "frr.conf.j2",
        router=spec,
        lab=lab,
        ports=ports,
        networks=networks,
        bridge=BRIDGE,
        paths=MAX_PATHS,
    )
    return {
        "daemons": render("topologies", "daemons.j2"),
        "frr.conf": config,
        "vtysh.conf": render("topologies", "vtysh.conf.j2"),
    }
