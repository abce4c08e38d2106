"""The ways that packets take: every interface in its order, and what chose it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest

from testbed.deadline import Deadline
from testbed.nodes.deploy import Cluster
from testbed.trace.follow import Wish, trace
from testbed.trace.layout import of_cluster, of_record
from testbed.trace.model import Hop, Trace


def way(hops: Sequence[Hop]) -> list[str]:
    """The hops in words, with veths and the one spine that was chosen by a common name."""
    found = []
    for hop in hops:
        interface = "veth" if hop.kind == "veth" else hop.interface
        found.append(f"{hop.place}:{interface} {hop.way}".replace("spine1", "spine*").replace("spine2", "spine*"))
    return [word.replace(":swp1 out", ":swp* out").replace(":swp2 out", ":swp* out")
            .replace(":swp1 in", ":swp* in").replace(":swp2 in", ":swp* in") for word in found]  # fmt: skip


def followed(cluster: Cluster, source: str, target: str, wish: Wish | None = None) -> Trace:
    """A trace that is delivered, as every one is on a lab that is well; a busy machine may take its time."""
    found = Deadline(20).poll(
        lambda: found if (found := trace(of_cluster(cluster), source, target, wish)).delivered else None
    )
    assert found is not None, trace(of_cluster(cluster), source, target, wish).to_json()
    return found


LEAVING = ["worker1/client:eth0 out", "worker1:veth in", "worker1:cni0 in"]
ENTERING = ["worker3:cni0 out", "worker3:veth out", "worker3/testapp:eth0 in"]
ACROSS = ["leaf1:node2 in", "leaf1:br0 in", "leaf1:swp* out", "spine*:swp* in", "spine*:swp* out", "leaf2:swp* in",
          "leaf2:br0 out", "leaf2:node1 out"]  # fmt: skip
TUNNELLED = ["worker1:flannel.1 out", "worker1:eth0 out", *ACROSS, "worker3:eth0 in", "worker3:flannel.1 in"]


def test_through_the_tunnel(vxlan: Cluster) -> None:
    found = followed(vxlan, "worker1/client", "worker3/testapp")
    assert way(found.request) == [*LEAVING, *TUNNELLED, *ENTERING]
    assert len(found.answer) == len(found.request)
    assert not found.strays
    assert not found.errors
    by_place = {hop.where: hop for hop in found.request}
    tunnel, nic = by_place["worker1:flannel.1"], by_place["worker1:eth0"]
    vtep = str(vxlan.lab.spec.node("worker3").ip)
    cidr = vxlan.pod_cidr("worker3")
    assert tunnel.route
    assert tunnel.route["text"] == f"{cidr} via {cidr[0]} dev flannel.1 onlink"
    assert tunnel.neighbour
    assert tunnel.neighbour["mac"] == tunnel.frame.dst if tunnel.frame else False
    assert tunnel.fdb
    assert tunnel.fdb["dst"] == vtep
    assert nic.outer
    assert (nic.outer.src, nic.outer.dst) == (str(vxlan.lab.spec.node("worker1").ip), vtep)
    assert nic.encapsulation == {"kind": "vxlan", "port": vxlan.flannel.port, "vni": 1}
    assert nic.route
    assert nic.route["text"].startswith("default via")
    ttls = [hop.packet.ttl for hop in found.request if hop.packet]
    assert (ttls[0], ttls[-1]) == (64, 62)
    assert [hop.outer.ttl for hop in found.request if hop.outer][-1] == 61
    assert found.seconds is not None
    assert 0 < found.seconds < 1


def test_on_the_same_node(vxlan: Cluster) -> None:
    found = followed(vxlan, "worker1/client", "worker1/testapp")
    assert way(found.request) == ["worker1/client:eth0 out", "worker1:veth in", "worker1:veth out",
                                  "worker1/testapp:eth0 in"]  # fmt: skip


def test_from_a_pod_to_a_node(vxlan: Cluster) -> None:
    found = followed(vxlan, "worker1/client", "worker3")
    assert way(found.request) == [*LEAVING, "worker1:eth0 out", *ACROSS, "worker3:eth0 in"]
    nic = next(hop for hop in found.request if hop.where == "worker1:eth0")
    assert nic.nat
    assert (nic.nat["kind"], nic.nat["after"]) == ("source", str(vxlan.lab.spec.node("worker1").ip))


@pytest.mark.parametrize("protocol", ["icmp", "udp", "tcp"])
def test_outside_with_its_translation(vxlan: Cluster, protocol: str) -> None:
    found = followed(vxlan, "worker1/client", "outside", Wish(protocol=protocol))
    changed = [hop for hop in found.request if hop.nat]
    assert [hop.where for hop in changed] == ["worker1:eth0"]
    nat = changed[0].nat
    assert nat
    own = str(vxlan.pods["worker1/client"].address)
    assert nat["before"].partition(":")[0] == own
    assert nat["after"].partition(":")[0] == str(vxlan.lab.spec.node("worker1").ip)
    assert "MASQUERADE" in nat["rule"]
    assert f"src={own}" in nat["conntrack"]
    back = [hop.nat for hop in found.answer if hop.nat]
    assert [one["after"].partition(":")[0] for one in back if one] == [own]


def test_what_is_too_large_goes_in_pieces(vxlan: Cluster) -> None:
    found = followed(vxlan, "worker1/client", "worker3/testapp", Wish(size=12000))
    assert found.request[0].pieces == 2
    assert found.request[-1].pieces == 2


def test_to_a_neighbour_without_a_tunnel(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster("host_gw")
    target = next(name for name in cluster.pods if name.endswith("/testapp") and not name.startswith("worker1"))
    node = target.partition("/")[0]
    found = followed(cluster, "worker1/client", target)
    words = way(found.request)
    assert words[:4] == [*LEAVING, "worker1:eth0 out"]
    assert words[-4:] == [f"{node}:eth0 in", f"{node}:cni0 out", f"{node}:veth out", f"{target}:eth0 in"]
    assert not any(hop.encapsulation for hop in found.request)
    nic = next(hop for hop in found.request if hop.where == "worker1:eth0")
    assert nic.route
    assert nic.route["text"] == f"{cluster.pod_cidr(node)} via {cluster.lab.spec.node(node).ip} dev eth0"


def test_by_flanneld_itself(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster("udp")
    found = followed(cluster, "worker1/client", "worker3/testapp")
    words = way(found.request)
    assert words[3:5] == ["worker1:flannel0 out", "worker1:eth0 out"]
    assert words[-5:-3] == ["worker3:eth0 in", "worker3:flannel0 in"]
    assert {hop.encapsulation["kind"] for hop in found.request if hop.encapsulation} == {"udp"}
    for node, missing in (("worker1", "worker1:eth0"), ("worker3", "worker3:flannel0")):
        cluster.signal_flanneld(node, "STOP")
        try:
            lost = trace(of_cluster(cluster), "worker1/client", "worker3/testapp")
        finally:
            cluster.signal_flanneld(node, "CONT")
        assert lost.missing
        assert lost.missing.cause.code == "flanneld_gone", lost.missing
        assert f"{lost.missing.place}:{lost.missing.interface}" == missing
        assert "is stopped" in lost.missing.cause.text


# --- as a command


def command(vxlan: Cluster, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "testbed", "trace", "--name", vxlan.lab.spec.id, *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120)


def test_the_command_tells_json(vxlan: Cluster) -> None:
    done = command(vxlan, "--json", "--proto", "udp", "worker1/client", "worker3/testapp")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["schema"], told["delivered"], told["missing"]) == (1, True, None)
    assert set(told["packet"]) == {"protocol", "size", "dont_fragment", "nonce", "source_address", "target_address"}
    assert told["request"]["delivered"]
    keys = {"machine", "place", "interface", "way", "kind", "at", "length", "pieces", "frame", "outer", "encapsulation",
            "inner_frame", "packet", "matched", "error", "route", "neighbour", "fdb", "nat"}  # fmt: skip
    assert {key for hop in told["request"]["hops"] + told["answer"]["hops"] for key in hop} == keys


def test_the_command_shows_a_table(vxlan: Cluster) -> None:
    done = command(vxlan, "worker1/client", "worker3/testapp")
    assert done.returncode == 0, done.stderr
    for said in ("→ worker1:flannel.1", "fdb ", "neighbour ", "route ", "VNI 1", "delivered, and answered"):
        assert said in done.stdout, done.stdout


def test_a_packet_that_is_lost_is_code_1(vxlan: Cluster) -> None:
    done = command(vxlan, "--size", "20000", "--df", "worker1/client", "worker3/testapp")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "mtu: it may not be fragmented" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("worker1/nobody", "worker3"), "has no worker1/nobody"),
        (("worker1", "worker1"), "both ends are the same"),
        (("--size", "3", "worker1", "worker3"), "16 to 65000"),
        (("--proto", "sctp", "worker1", "worker3"), "sctp"),
    ],
)
def test_wrong_words_are_code_3(vxlan: Cluster, words: tuple[str, ...], said: str) -> None:
    done = command(vxlan, *words)
    assert done.returncode == 3
    assert said in done.stderr


def test_both_layouts_of_a_lab_are_one(vxlan: Cluster) -> None:
    ours, theirs = of_cluster(vxlan), of_record(vxlan.lab)
    assert (ours.run, ours.rules, ours.bridge, ours.tunnels, ours.port, dict(ours.pods)) == (
        theirs.run, theirs.rules, theirs.bridge, theirs.tunnels, theirs.port, dict(theirs.pods)
    )  # fmt: skip
