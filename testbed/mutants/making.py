"""Making a mutation in a running lab, and putting the lab right again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from testbed.errors import TestbedError
from testbed.fixtures import Facts, Paths
from testbed.model import Role
from testbed.mutants.mutations import Mutation, Replacement
from testbed.nodes.nodefiles import LIBRARY, bundled_library
from testbed.parallel import each

if TYPE_CHECKING:
    from testbed.labs.base import Node, Place
    from testbed.nodes.deploy import Cluster
    from testbed.nodes.pods import Pod

_REPLACING = """

{text}


def _replaced(owner, name):
    original = getattr(owner, name)
    setattr(owner, name, lambda *given, **named: mutant(original, *given, **named))


_replaced({owner}, {name!r})
"""


class Scene:
    """Who is who in a lab, as mutations call them."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.facts = Facts(cluster)
        paths = Paths(cluster)
        remote = paths.remote()
        self.client, self.peer = remote.source_node, remote.target_node
        self.client_pod, self.peer_pod = remote.pods
        self.local_pod = self._pod(self.client.name, "testapp")
        near = next((paths.specs[kind] for kind in ("SS", "PN") if not paths.specs[kind].reason), None)
        self.near = cluster.lab.node(near.target.partition("/")[0]) if near else self.peer
        known = {self.client.name, self.peer.name}
        self.other = next((node for node in cluster.members if node.name not in known), self.near)
        known.add(self.near.name)
        self.unused = next((node for node in cluster.members if node.name not in known), self.other)

    def _pod(self, node: str, name: str) -> Pod:
        return self.cluster.pods[f"{node}/{name}"]

    def places(self, mutation: Mutation) -> Sequence[tuple[Node, Place]]:
        """The machines that a mutation acts on, and where its commands run there."""
        client, peer, lab = self.client, self.peer, self.cluster.lab
        leaf = lab.node(str(client.spec.rack))
        control_plane = lab.node(str(lab.spec.control_plane))
        found: Mapping[str, Sequence[tuple[Node, Place]]] = {
            "client": [(client, client)],
            "peer": [(peer, peer)],
            "leaf": [(leaf, leaf)],
            "control_plane": [(control_plane, control_plane)],
            "everywhere": [(node, node) for node in self.cluster.members],
            "client_pod": [(client, self.client_pod)],
            "local_pod": [(client, self.local_pod)],
            "peer_pod": [(peer, self.peer_pod)],
        }
        return found[mutation.on]

    def words(self, node: Node) -> Mapping[str, str]:
        """What stands in the braces of a mutation's commands on that machine."""
        flannel, spec = self.cluster.flannel, self.cluster.lab.spec
        found = {
            "bridge": flannel.bridge,
            "tunnel": str(flannel.tunnel_device),
            "vni": str(flannel.vni),
            "port": str(flannel.port),
            "network": str(flannel.network),
            "outside": str(spec.outside.ip),
            "underlay": str(spec.mtu),
            "uplink": next(iter(self._uplinks()), ""),
            "pod_ip": str(self.client_pod.address),
            "pod_mac": self.client_pod.mac,
            "local_ip": str(self.local_pod.address),
            "peer_pod_ip": str(self.peer_pod.address),
            "veth": self.facts.host_veth(self.client_pod).name,
            "local_veth": self.facts.host_veth(self.local_pod).name,
            "peer_veth": self.facts.host_veth(self.peer_pod).name,
        }
        for title, one in self._others.items():
            found |= {f"{title}_{key}": value for key, value in self._node(one).items()}
        if node.name in {member.name for member in self.cluster.members}:
            found |= {f"own_{key}": value for key, value in self._node(node).items()}
            found |= {"nic": node.spec.underlay.name, "gateway": str(self.cluster.pod_cidr(node.name)[1])}
            found |= {"mtu": str(self.facts.mtu(node.name)), "router": str(node.spec.gateway)}
            found |= self._keys() if flannel.backend.type == "wireguard" and flannel.ipv4 else {}
            found |= self._words6(node) if flannel.network6 is not None else {}
        return found

    def _uplinks(self) -> list[str]:
        """The interfaces by which the client's leaf reaches spines."""
        spec = self.cluster.lab.spec
        leaf, spines = spec.node(self.client.name).rack, {spine.name for spine in spec.of_role(Role.SPINE)}
        ends = [(link.a, link.b) for link in spec.links] + [(link.b, link.a) for link in spec.links]
        return sorted(near.iface for near, far in ends if near.node == leaf and far.node in spines)

    @property
    def _others(self) -> Mapping[str, Node]:
        """Who else there is, by what mutations call them."""
        found = {"client": self.client, "peer": self.peer, "near": self.near, "other": self.other}
        return found | {"unused": self.unused}

    def _keys(self) -> Mapping[str, str]:
        """The keys by which the nodes are peers of wireguard's."""
        leases = self.cluster.leases()
        keys = {title: leases[one.name]["value"]["BackendData"]["PublicKey"] for title, one in self._others.items()}
        return {f"{title}_key": str(key) for title, key in keys.items()}

    def _words6(self, node: Node) -> Mapping[str, str]:
        """What is known of IPv6, which not every lab has."""
        cluster, device = self.cluster, str(self.cluster.flannel.tunnel_device6)
        own = cluster.pod_cidr6(node.name)
        found = {
            "tunnel6": device,
            "network6": str(cluster.flannel.network6),
            "gateway6": str(own[1]),
            "router6": str(node.spec.gateway6),
            "pod_ip6": str(self.client_pod.address6),
            "peer_pod_ip6": str(self.peer_pod.address6),
            "mtu6": str(cluster.flannel.mtu6_of(node.spec.underlay.mtu)),
            "outside_ip6": str(cluster.lab.spec.outside.ip6),
        }
        for title, one in {"own": node, **self._others}.items():
            cidr = cluster.pod_cidr6(one.name)
            tunnel = self.facts.node(one.name).link(device)
            found |= {f"{title}_cidr6": str(cidr), f"{title}_base6": str(cidr[0]), f"{title}_ip6": str(one.spec.ip6)}
            found |= {f"{title}_mac6": tunnel.mac if tunnel else ""}
        return found

    def _node(self, node: Node) -> Mapping[str, str]:
        cidr, device = self.cluster.pod_cidr(node.name), self.cluster.flannel.tunnel_device
        tunnel = self.facts.node(node.name).link(device) if device else None
        return {
            "ip": str(node.spec.ip),
            "cidr": str(cidr),
            "base": str(cidr[0]),
            "mac": tunnel.mac if tunnel else "",
            "nic_mac": node.spec.underlay.mac,
        }


@contextmanager
def made(mutation: Mutation, cluster: Cluster) -> Iterator[None]:
    """Have a mutation in the lab for as long as the block lasts. Raises TestbedError where it cannot be made."""
    scene = Scene(cluster)
    with ExitStack() as undoing:
        undoing.callback(_forget_paths, cluster)
        if mutation.held:
            undoing.callback(_signal, cluster, "CONT")
            _signal(cluster, "STOP")
        if mutation.down:
            node = cluster.lab.spec.node(scene.client.name)
            undoing.enter_context(cluster.lab.fault(mutation.down.format(client=node.name, leaf=node.rack), down=True))
        places = scene.places(mutation)
        commands = [(place, _filled(mutation.undo, scene.words(node))) for node, place in places]
        doing = [(place, _filled(mutation.do, scene.words(node))) for node, place in places]
        undoing.callback(_run_all, commands, check=mutation.replace is None)
        if mutation.replace is not None:
            nodes = [node for node, _ in places]
            undoing.callback(_replace, cluster, nodes, mutation.replace, undo=True)
            _replace(cluster, nodes, mutation.replace)
        _run_all(doing)
        yield


def _forget_paths(cluster: Cluster) -> None:
    """Let machines and pods forget a smaller MTU, or another router, that they were told of for a way: they go by that
    for ten minutes, longer than the mutation lasts."""

    def forget(place: Place) -> None:
        for family in ("-4", "-6"):
            place.run(["ip", family, "route", "flush", "cache"], check=False)

    each(forget, [*cluster.lab.nodes.values(), *cluster.pods.values()])


def _filled(commands: Sequence[Sequence[str]], words: Mapping[str, str]) -> list[list[str]]:
    return [[re.sub(r"\{(\w+)\}", lambda found: words[found[1]], word) for word in argv] for argv in commands]


def _run_all(commands: Sequence[tuple[Place, Sequence[Sequence[str]]]], *, check: bool = True) -> None:
    """Run every command; where some fail, the rest is run all the same, and the first failure is raised."""
    failed: list[TestbedError] = []
    for place, argvs in commands:
        for argv in argvs:
            try:
                place.run(argv, check=check)
            except TestbedError as error:
                failed.append(error)
    if failed:
        raise failed[0]


def _signal(cluster: Cluster, name: str) -> None:
    for node in cluster.members:
        with suppress(TestbedError):
            cluster.signal_flanneld(node.name, name)


def _replace(cluster: Cluster, nodes: Sequence[Node], replacement: Replacement, *, undo: bool = False) -> None:
    """Put a function in another's place on these nodes, or take it back, and start their flannelds anew."""
    inside = "/".join(replacement.module.split(".")[1:])
    library = bundled_library()
    source = library[f"{inside}.py"].decode()
    compiled = {path: data for path, data in library.items() if _is_compiled(path, inside)}
    if not undo:
        owner, _, name = replacement.function.rpartition(".")
        owner = owner or "sys.modules[__name__]"
        source += "\n\nimport sys" + _REPLACING.format(text=replacement.text, owner=owner, name=name)

    def change(known: Node) -> None:
        node = cluster.lab.node(known.name)  # it may have started anew since
        cluster.stop_flanneld(node.name)
        node.write(f"{LIBRARY}/flannel/{inside}.py", source)
        for path, data in compiled.items():
            if undo:
                node.write(f"{LIBRARY}/flannel/{path}", data)
            else:
                node.run(["rm", "-f", f"{LIBRARY}/flannel/{path}"])
        node.run(["rm", "-f", cluster.flannel.subnet_file])  # that it is there again says that flanneld is ready
        cluster.start_flanneld(node.name)

    each(change, nodes)
    cluster.wait_ready([node.name for node in nodes])


def _is_compiled(path: str, inside: str) -> bool:
    folder, _, name = inside.rpartition("/")
    start = f"{folder}/__pycache__/{name}." if folder else f"__pycache__/{name}."
    return path.startswith(start) and path.endswith(".pyc")
