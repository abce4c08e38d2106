"""DEP: what is deployed on the nodes themselves: one flanneld, its lease, the plugins and what the kernel can do."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from testbed.checks import check
from testbed.collecting import kernel_has
from testbed.fixtures import Facts, Path
from testbed.flannelspec import CONFLIST
from testbed.labs.base import Node
from testbed.nodes.cni import CNI_BIN, CniError
from testbed.nodes.deploy import Cluster
from testbed.nodes.madeup import etcd_of
from testbed.nodes.otherwise import restart_flanneld
from testbed.nodes.scratch import scratch_pod
from testbed.probes.cnifiles import read_cni_files
from testbed.probes.flows import ping

PLUGINS = ("bridge", "host-local", "portmap", "loopback")
PROBE = "probe0"
DEVICES = {"vxlan": "vxlan id 99 dstport 0 dev {nic}", "ipip": "ipip remote 192.0.2.1", "wireguard": "wireguard"}
"""What `ip link add` makes of each kind that a backend needs."""
TUN_SECONDS = 10.0


def flannelds(node: Node) -> dict[int, list[str]]:
    """The processes of that name on a node, with their arguments."""
    found = node.run(["pgrep", "-x", "flanneld"], check=False).stdout.split()
    return {int(pid): node.read(f"/proc/{pid}/cmdline").decode().rstrip("\0").split("\0") for pid in found}


@check("DEP-06")
def test_each_node_has_one_flanneld_with_its_arguments(cluster: Cluster) -> None:
    """One process, masquerading as configured, with the store that the lab has. Source: S0, S1, S3, S4."""
    wanted = [*cluster.store.flags(), *cluster.flannel.args]
    for node in cluster.members:
        found = flannelds(node)
        assert len(found) == 1, f"{node.name} has {len(found)} flannelds: {found}"
        (argv,) = found.values()
        missing = [word for word in wanted if word not in argv]
        assert not missing, f"{node.name}: {' '.join(argv)} lacks {' '.join(missing)}"
    if cluster.flannel.source == "built in":
        assert "--ip-masq" in wanted


@check("DEP-09", disruptive=True)
def test_without_a_tun_device_flanneld_says_so_and_ends(cluster: Cluster) -> None:
    """/dev/net/tun is needed, and its want is named at once. Source: S0, S1."""
    node = cluster.members[-1]
    script = 'mount -t tmpfs none /dev/net && exec "$@"'
    argv = ["timeout", f"{TUN_SECONDS:g}", "unshare", "-m", "sh", "-c", script, "sh"]
    cluster.stop_flanneld(node.name)
    try:
        env = {**cluster.flannel.env, **cluster.store.environment(node.name)}
        ended = node.run([*argv, *cluster.flanneld_argv(node.name)], check=False, env=env, timeout=TUN_SECONDS + 20)
    finally:
        restart_flanneld(cluster, node.name)
    said = (ended.stdout + ended.stderr)[-1000:]
    assert ended.rc not in (0, 124), f"flanneld goes on without a tun device (exit {ended.rc})\n{said}"
    assert re.search(r"\btun\b", said), f"the error names no tun device:\n{said}"


@check("DEP-11")
def test_conflist_is_what_flannel_s_manifest_says(cluster: Cluster) -> None:
    """Hairpin and default gateway for the bridge, port mappings behind it, and the bridge is told. Source: S0-S4."""
    conf = cluster.flannel.cni_conf
    for node in cluster.members:
        found: dict[str, Any] = json.loads(node.read(CONFLIST))
        assert found == conf, f"{node.name}: {CONFLIST} holds {found}"
    kinds = [plugin["type"] for plugin in conf["plugins"]]
    if cluster.flannel.source == "built in":
        assert (conf["name"], kinds) == ("cbr0", ["flannel", "portmap"])
    node = cluster.members[-1]
    with scratch_pod(cluster, node.name) as pod:
        told = read_cni_files(node, str(conf["name"])).delegates[pod.container_id]
    said = {key: told.get(key) for key in cluster.flannel.delegate}
    assert said == dict(cluster.flannel.delegate), f"{node.name}: the bridge plugin was told {said}"
    assert cluster.flannel.delegate.get("isDefaultGateway"), "pods have no default route by this conflist"


@check("DEP-15")
def test_leases_are_in_etcd_and_packets_follow_them(path: Path, cluster: Cluster) -> None:
    """A key for each node's subnet: the node's address, the backend and its data. Source: S4, flannel's own tests."""
    etcd = etcd_of(cluster)
    if etcd is None:
        pytest.skip("leases are in the Kubernetes API")
    flannel = cluster.flannel
    kind = "" if flannel.backend.type == "udp" else flannel.backend.type
    for node in cluster.members:
        cidr = str(cluster.pod_cidr(node.name)).replace("/", "-")
        keys = {key: text for key, text in etcd.under("/coreos.com/network/subnets/").items() if cidr in key}
        assert len(keys) == 1, f"{node.name}: {len(keys)} keys of {cidr}"
        value = json.loads(*keys.values())
        found = (value.get("PublicIP"), value.get("BackendType", ""))
        assert found == (str(node.spec.ip), kind), f"{node.name}: the lease says {value}"
        assert bool(value.get("BackendData")) is (kind in ("vxlan", "wireguard")), (
            f"{node.name}: the lease says {value}"
        )
    answer = ping(path.source, path.address, count=2)
    assert answer.lost == 0, answer.output


@check("DEP-16")
def test_default_interface_is_the_default_route_s(cluster: Cluster, facts: Facts) -> None:
    """The published address and the tunnel's are those by which the node reaches the world. Source: S0."""
    facts.forget()
    device = cluster.flannel.tunnel_device
    if any(word.startswith(("--iface", "--public-ip")) for word in cluster.flannel.args):
        pytest.skip("flanneld is told its interface")
    for node in cluster.members:
        answer = json.loads(node.run(["ip", "-j", "route", "get", str(cluster.lab.spec.outside.ip)]).stdout)
        source = answer[0]["prefsrc"]
        cidr = str(cluster.pod_cidr(node.name)).replace("/", "-")
        published = [one["value"]["PublicIP"] for one in cluster.leases().values() if cidr in one["key"]]
        assert published == [source], f"{node.name}: {published} is published, {source} is the default route's"
        local = facts.link(node.name, device).data.get("local") if device else None
        assert local in (None, source), f"{node.name}: {device} is local to {local}, {source} is the default route's"


@check("DEP-19")
def test_kernel_features_are_what_the_kernel_says(cluster: Cluster) -> None:
    """What was found out before the run is what nodes can make, and what rows are skipped by. Source: S2, S4."""
    for node in cluster.members:
        for kind, words in DEVICES.items():
            argv = ["ip", "link", "add", PROBE, "type", *words.format(nic=node.spec.underlay.name).split()]
            done = node.run(argv, check=False)
            if done.ok:
                node.run(["ip", "link", "delete", PROBE])
            assert done.ok == kernel_has(kind), (
                f"{node.name}: {kind} was probed otherwise: {done.stderr.strip() or 'ok'}"
            )
    missing = [name for name in cluster.flannel.backend.kernel_features if not kernel_has(name)]
    assert not missing, f"this run goes on without {missing}"


@check("DEP-21")
def test_helper_plugins_are_there_and_run(cluster: Cluster) -> None:
    """bridge, host-local, portmap and loopback answer, and speak the conflist's version. Source: S1."""
    version = cluster.flannel.cni_conf["cniVersion"]
    for node in cluster.members:
        for name in PLUGINS:
            done = node.run([f"{CNI_BIN}/{name}"], check=False, env={"CNI_COMMAND": "VERSION"}, stdin="{}")
            if not done.ok:
                raise CniError(node.name, "VERSION", name, done.rc, (done.stderr or done.stdout).strip()[-300:])
            spoken = json.loads(done.stdout)["supportedVersions"]
            assert version in spoken, f"{node.name}: {name} speaks {spoken}, not {version}"
