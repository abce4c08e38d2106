"""Ten nodes that start at the same moment, and just as many subnets."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from testbed.deadline import Deadline
from testbed.nodes.etcd import PREFIX
from testbed.nodes.store import EtcdLeases
from testbed.parallel import each
from tests.heals.heallab import FULL, HealLab

ROUNDS = 10 if FULL else 2
NODES = ["master1", *(f"worker{number}" for number in range(1, 10))]
TOPOLOGY = f"""
description: ten nodes in one subnet
mtu: 1500
spines: 0
outside: 203.0.113.8
control_plane: master1
racks:
  - leaf: leaf1
    subnet: 10.0.0.0/24
    nodes: [{", ".join(NODES)}]
"""
STARTS_WITHIN = 20.0


def signal_etcd(lab: HealLab, name: str) -> None:
    """Send etcd a signal."""
    lab.sh('kill -s "$1" "$(cat /run/etcd.pid)"', name, node=lab.cluster.lab.spec.control_plane)


def asks(lab: HealLab, name: str) -> bool:
    """Whether a node's flanneld has a connection to etcd, or waits for one."""
    return ":2379" in lab.sh("ss -Htn state established state syn-sent dport = :2379", node=name, check=False)


def test_ten_nodes_share_ten_subnets_and_none_gives_up(make_lab: Callable[..., HealLab], tmp_path: Path) -> None:
    path = tmp_path / "ten.yml"
    path.write_text(TOPOLOGY)
    lab = make_lab("host_gw", topology=str(path))
    assert len(lab.names) == 10
    store = lab.cluster.store
    assert isinstance(store, EtcdLeases)
    narrow = {**lab.flannel.net_conf, "SubnetLen": 24, "SubnetMin": "10.244.1.0", "SubnetMax": "10.244.10.0"}
    raced = 0
    for number in range(ROUNDS):
        each(lambda name: lab.cluster.stop_flanneld(name), lab.names)
        for key in store.etcd.under(f"{PREFIX}/subnets/"):
            store.etcd.delete(key)
        store.etcd.put(f"{PREFIX}/config", json.dumps(narrow))
        each(lambda name: lab.sh("rm -rf /run/flannel; : >/var/log/flanneld.log", node=name), lab.names)
        # They all wait for etcd's first answer, and go on at the same moment.
        signal_etcd(lab, "STOP")
        each(lab.cluster.start_flanneld, lab.names)
        waiting = Deadline(STARTS_WITHIN).poll(lambda: all(asks(lab, name) for name in lab.names) or None)
        signal_etcd(lab, "CONT")
        assert waiting, "not all of them came to ask etcd"
        began = time.monotonic()
        found = Deadline(STARTS_WITHIN).poll(lambda: len(store.etcd.under(f"{PREFIX}/subnets/")) == 10 or None)
        gone = [name for name in lab.names if lab.cluster.flanneld_pid(name) is None]
        assert not gone, f"{gone} gave up\n{lab.log(gone[0])}"
        assert found, store.etcd.under(f"{PREFIX}/subnets/").keys()
        lab.cluster.wait_ready(lab.names)
        subnets = {name: str(lab.cluster.pod_cidr(name)) for name in lab.names}
        assert sorted(subnets.values()) == sorted(f"10.244.{one}.0/24" for one in range(1, 11)), subnets
        leases = store.leases()
        assert {name: leases[name]["key"].rpartition("/")[2].replace("-", "/") for name in lab.names} == subnets
        lab.eventually(
            f"race {number + 1}: ten nodes, ten subnets, until all have routes to all",
            lambda: all(len(lab.peers_routes(name)) >= 9 for name in lab.names),
            STARTS_WITHIN - (time.monotonic() - began),
        )
        raced += sum("was taken by another node" in lab.sh("cat /var/log/flanneld.log", node=one) for one in lab.names)
    assert raced, "nobody lost a race: they did not start at the same moment"
