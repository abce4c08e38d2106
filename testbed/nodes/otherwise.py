"""A node's own flanneld, or every node's, with other arguments or another network configuration for a while."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from testbed.deadline import Deadline
from testbed.errors import ProductError
from testbed.nodes.etcd import PREFIX
from testbed.nodes.madeup import OTHER_PREFIX, etcd_of
from testbed.parallel import each
from testbed.probes.health import http_status

if TYPE_CHECKING:
    from testbed.labs.base import Node
    from testbed.nodes.deploy import Cluster

CONF_FILE = "/run/testbed-net-conf.json"
READY_SECONDS = 30.0
PODS_CONF = "/etc/kube-flannel/net-conf.json"
"""Where flanneld finds its configuration with the Kubernetes store."""


@contextmanager
def flanneld_as(
    cluster: Cluster,
    node: str,
    *args: str,
    net_conf: Mapping[str, Any] | None = None,
    meanwhile: Callable[[Node], object] | None = None,
) -> Iterator[None]:
    """A node's flanneld with these arguments behind its own, and another net-conf.json if one is given.

    It is ready when the block begins.  `meanwhile` is called while none runs.  What ran before runs again at the end,
    whatever happened, and is ready then.  Raises ProductError where either does not get ready.
    """
    machine = cluster.lab.node(node)
    argv = [*cluster.flanneld_argv(node), *(_conf_flags(cluster, node, net_conf) if net_conf else ()), *args]
    env = {**cluster.flannel.env, **cluster.store.environment(node)}
    try:
        restart_flanneld(cluster, node, lambda: machine.start(argv, name="flanneld", env=env), meanwhile)
        yield
    finally:
        restart_flanneld(cluster, node)
        if net_conf and (etcd := etcd_of(cluster)):
            for key in etcd.under(f"{OTHER_PREFIX}/"):
                etcd.delete(key)


def reconfigure(cluster: Cluster, net_conf: Mapping[str, Any]) -> None:
    """Give every node another net-conf.json and restart its flanneld, as an operator does; they are ready at the end.

    Whoever calls it gives the cluster's own one back. Raises ProductError where a flanneld does not get ready.
    """
    etcd, names = etcd_of(cluster), [node.name for node in cluster.members]
    if etcd is not None:
        etcd.put(f"{PREFIX}/config", json.dumps(net_conf))
    else:
        for name in names:
            cluster.lab.node(name).write(PODS_CONF, json.dumps(net_conf))
    each(lambda name: restart_flanneld(cluster, name), names)


def restart_flanneld(
    cluster: Cluster,
    node: str,
    start: Callable[[], object] | None = None,
    meanwhile: Callable[[Node], object] | None = None,
    *,
    signal: str = "TERM",
) -> None:
    """End a node's flanneld, whatever state it is in, start it anew and wait until it is ready. Raises ProductError."""
    machine = cluster.lab.node(node)
    if cluster.flanneld_pid(node) is not None:
        try:
            cluster.stop_flanneld(node, signal)
        except ProductError:
            cluster.stop_flanneld(node, "KILL")
    if meanwhile is not None:
        meanwhile(machine)
    port = cluster.flannel.healthz_port
    if not port:  # that subnet.env is there again says as much, but a node that has moved needs it to keep its subnet
        machine.run(["rm", "-f", cluster.flannel.subnet_file])
    if start is None:
        cluster.start_flanneld(node)
    else:
        start()
    await_ready(cluster, node)


def await_ready(cluster: Cluster, node: str) -> None:
    """Wait until a node's flanneld that was just started says that it is ready. Raises ProductError."""
    machine, port = cluster.lab.node(node), cluster.flannel.healthz_port
    if port and not Deadline(READY_SECONDS).poll(lambda: http_status(machine, port, "/readyz") == 200):
        log = cluster.flanneld_log(node)
        raise ProductError(f"flanneld is not ready within {READY_SECONDS:.0f} s\n{log}", where=node)
    cluster.wait_ready([node])


def _conf_flags(cluster: Cluster, node: str, net_conf: Mapping[str, Any]) -> list[str]:
    """The flags by which a flanneld finds another configuration, with everybody's leases as they are."""
    etcd = etcd_of(cluster)
    if etcd is None:
        cluster.lab.node(node).write(CONF_FILE, json.dumps(net_conf))
        return [f"--net-config-path={CONF_FILE}"]
    etcd.put(f"{OTHER_PREFIX}/config", json.dumps(net_conf))
    for lease in cluster.leases().values():
        name = str(lease["key"]).rpartition("/")[2]
        etcd.put(f"{OTHER_PREFIX}/subnets/{name}", json.dumps(lease["value"]))
    return [f"--etcd-prefix={OTHER_PREFIX}"]
