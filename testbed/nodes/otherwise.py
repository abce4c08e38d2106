"""A node's own flanneld with other arguments or another network configuration for a while."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from testbed.errors import ProductError
from testbed.nodes.madeup import OTHER_PREFIX, etcd_of

if TYPE_CHECKING:
    from testbed.labs.base import Node
    from testbed.nodes.deploy import Cluster

CONF_FILE = "/run/testbed-net-conf.json"


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
    machine.run(["rm", "-f", cluster.flannel.subnet_file])  # that it is there again says that flanneld is ready
    if start is None:
        cluster.start_flanneld(node)
    else:
        start()
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
