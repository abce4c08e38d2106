"""Leaves and spines of an image as registries have it: FRR and nothing of ours, so they are wired from outside.

No registry can be had here, so the image is made of Debian's FRR: with neither Python nor `ip`, and started by
a program of the name and the place that FRR's own image has.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.engine.find import find_engine
from testbed.errors import InputError, LabError
from testbed.images import chosen, store
from testbed.images.names import named_images
from testbed.images.packages import LEFT_OUT, Package, closure, installed
from testbed.images.root import Tree, base
from testbed.labs import kinds, state
from testbed.labs.clab import PulledRouter
from testbed.model import LabSpec
from testbed.nodes.deploy import bring_up
from testbed.nodes.restart import restart_node
from testbed.options import RunOptions
from testbed.probes.flows import http_get
from testbed.topology import load_topology
from tests.labs.helpers import unique

PREFIX, NAME = "mirror.example/hub/", "mirror.example/hub/frr:test"

START = r"""#!/bin/bash
source /usr/lib/frr/frrcommon.sh
/usr/lib/frr/watchfrr $(daemon_list)
"""


def take(tree: Tree, package: Package) -> None:
    """Add a package's files, but documentation and our tools."""
    for path in package.files():
        inside = path if path.startswith("/usr/") else f"/usr{path}"
        ours = inside.endswith(("/ip", "/tc", "/bridge")) or "python" in inside
        if path.startswith("/etc/") or LEFT_OUT.search(inside) or ours or not Path(inside).is_file():
            continue
        tree.folder(str(Path(inside).parent).lstrip("/"))
        tree.copy(inside.lstrip("/"), inside)


def frr_image() -> bytes:
    tree = Tree()
    base(tree)
    packages = installed()
    for package in closure(packages, ("frr", "bash", "dash", "coreutils", "sed", "procps", "mawk", "grep")):
        if package.name not in ("iproute2", "python3", "python3-minimal", "perl"):
            take(tree, package)
    tree.file("usr/lib/frr/docker-start", START, 0o755)
    return tree.bytes()


@pytest.fixture
def mirrored(on_engine: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An engine that has the image of a mirror already, as after a pull."""
    if not Path("/usr/lib/frr/watchfrr").exists():
        pytest.skip("there is no Debian FRR to make an image of")
    store.bring_in(find_engine().client, frr_image(), NAME)
    monkeypatch.setattr(chosen, "references", lambda prefix: {"frr": f"{prefix}frr:test"})
    yield
    find_engine().client.images.remove(NAME, force=True)


def test_a_cluster_behind_routers_of_a_pulled_image(mirrored: None) -> None:
    options = RunOptions(backend="vxlan", name=unique("pulled"), topology="racks", lab="clab", image_prefix=PREFIX)
    cluster = bring_up(options)
    try:
        client = find_engine().client
        used = {one.labels["clab-node-name"]: one.image.tags[0] for one in client.containers.list()}  # type: ignore[union-attr]
        assert {name for name, image in used.items() if image == NAME} == {"leaf1", "leaf2", "spine1", "spine2"}
        leaf = cluster.lab.node("leaf1")
        assert isinstance(leaf, PulledRouter)
        own = client.containers.get(
            next(c.id for c in client.containers.list() if str(c.name).endswith("-leaf1")) or ""
        )
        for program in ("python3", "ip"):
            assert own.exec_run(["sh", "-c", f"command -v {program}"]).exit_code != 0, program
        assert b"bgp" in own.exec_run(["vtysh", "-c", "show ip route bgp json"]).output
        assert leaf.read("/etc/frr/frr.conf").startswith(b"! leaf1: leaf of racks")
        assert leaf.run(["ip", "-br", "link"]).stdout.count("node") == 3
        for name in ("leaf1", "worker3"):
            restart_node(cluster, name)
            source, target = cluster.pods["worker1/client"], cluster.pods["worker3/testapp"]
            answer = http_get(source, target.address, wait=10)
            assert (answer.error, answer.pod) == ("", "testapp"), name
        with pytest.raises(LabError, match="cannot be started on a router of a pulled image"):
            cluster.lab.node("leaf1").start(["sleep", "1"], name="sleeper")
    finally:
        cluster.lab.down()


@pytest.fixture
def flat() -> LabSpec:
    return load_topology("flat", unique("prefix"))


def test_the_private_engine_cannot_pull_and_says_so(on_engine: Path, flat: LabSpec) -> None:
    frr = named_images()["frr"]
    with pytest.raises(LabError, match=f"cannot pull {PREFIX}{frr.name}@{frr.digest}\n.*testbed images import"):
        kinds.bring_up("clab", flat, image_prefix=PREFIX)
    assert state.read_record(flat.id) is None


def test_a_prefix_that_is_none(on_engine: Path, flat: LabSpec) -> None:
    with pytest.raises(InputError, match="'http://x' cannot stand before an image"):
        kinds.bring_up("clab", flat, image_prefix="http://x")
    assert state.read_record(flat.id) is None
