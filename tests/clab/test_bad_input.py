"""What is known to go wrong before a lab of containers is made: one error that names the cure, and nothing is there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.engine import find, private
from testbed.engine.find import find_engine
from testbed.errors import InputError, LabError
from testbed.flannelbuild import default_flannel
from testbed.flannelfits import check_fits
from testbed.labs import clab, kinds, state
from testbed.model import LabSpec
from testbed.topology import load_topology
from tests.labs.helpers import unique

CHECKOUT = Path(__file__).parents[2]
USER, GROUP = 54325, 54326
"""Of an ordinary user, and of the group that owns the engine's socket."""


@pytest.fixture
def flat() -> LabSpec:
    return load_topology("flat", unique("input"))


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "testbed", *words], capture_output=True, text=True, check=False)


def test_containers_and_a_guest_kernel_do_not_go_together(tmp_path: Path) -> None:
    done = command("run", "vxlan", "--", "--lab", "clab", "--kernel", "guest", "--reports", str(tmp_path / "r"))
    assert done.returncode == 3
    assert "containers run on this machine's kernel, not in a guest of it\n  hint: --kernel host" in done.stderr
    assert not (tmp_path / "r").exists()


def test_a_name_that_no_device_can_have(tmp_path: Path) -> None:
    topology = tmp_path / "long.yml"
    text = (CHECKOUT / "topologies/flat.yml").read_text()
    topology.write_text(text.replace("worker3", "worker3withalongname"))
    done = command("up", str(topology), "--lab", "clab", "--name", unique("long"))
    assert done.returncode == 3
    assert "long.yml:" in done.stderr
    assert (
        "'worker3withalongname' is no name\n  hint: small letters and digits, a letter first, up to 12" in done.stderr
    )


@pytest.mark.parametrize(
    ("backend", "vni", "name"),
    [("vxlan", "10000000", "flannel.10000000"), ("dual_stack", "10000", "flannel-v6.10000")],
)
def test_a_vni_that_makes_a_devices_name_too_long(backend: str, vni: str, name: str, flat: LabSpec) -> None:
    with pytest.raises(InputError, match=f"{name} has 16 characters, and a device's name at most 15\n.*shorter VNI"):
        check_fits(default_flannel(backend, net_conf_overrides={"VNI": vni}), flat)
    check_fits(default_flannel(backend, net_conf_overrides={"VNI": vni[:-1]}), flat)


def test_a_subnet_that_the_engine_uses_already_is_nobodys_business(on_engine: Path, flat: LabSpec) -> None:
    import docker.types

    subnet = str(flat.cluster_nodes[0].underlay.address.network)  # type: ignore[union-attr]
    pool = docker.types.IPAMPool(subnet=subnet)
    network = find_engine().client.networks.create("taken", ipam=docker.types.IPAMConfig(pool_configs=[pool]))
    try:
        lab = kinds.bring_up("clab", flat)
        address = str(flat.cluster_nodes[1].ip)
        assert lab.node(flat.cluster_nodes[0].name).run(["ping", "-c", "1", "-W", "5", address]).ok
        lab.down()
    finally:
        network.remove()


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """State of the test's own, whose path is short enough for sockets."""
    if os.geteuid() != 0 or shutil.which("dockerd") is None:
        pytest.skip("a Docker engine is started by root only, and with dockerd")
    with tempfile.TemporaryDirectory(prefix="testbed-small-") as folder:
        monkeypatch.setenv("TESTBED_STATE", str(Path(folder, "s")))
        monkeypatch.setenv("TESTBED_ENGINE_DATA", str(Path(folder, "data")))
        monkeypatch.delenv("DOCKER_HOST", raising=False)
        Path(folder, "data").mkdir()
        yield Path(folder)


def engine_up_on(size: str) -> subprocess.CompletedProcess[str]:
    """Start an engine that has a disk of that size for its images."""
    small = 'mount -t tmpfs -o size="$1" none "$TESTBED_ENGINE_DATA" && shift && exec "$@"'
    argv = ["unshare", "-m", "sh", "-c", small, "sh", size, sys.executable, "-m", "testbed", "engine", "up"]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def test_a_disk_too_small_for_an_engine(place: Path) -> None:
    done = engine_up_on("8m")
    assert done.returncode == 2, done.stderr
    assert "no room for an engine: 8 MB are left of the disk\n  hint: TESTBED_ENGINE_DATA names" in done.stderr
    assert private.running() is None


@pytest.fixture
def small_engine(place: Path) -> Iterator[private.PrivateEngine]:
    """An engine with 80 MB of disk, which is enough to start it and an image or two."""
    done = engine_up_on("80m")
    found = private.running()
    assert found, done.stderr
    yield found
    private.stop()


def test_a_disk_too_small_for_a_lab_or_an_image(small_engine: private.PrivateEngine, flat: LabSpec) -> None:
    with pytest.raises(LabError, match=r"the engine has \d\d MB of disk left, and the lab takes \d{3}\n.*ENGINE_DATA"):
        kinds.bring_up("clab", flat)
    assert state.read_record(flat.id) is None
    assert not find_engine().client.images.list()
    done = command("images", "build", "full")
    if "not installed here" not in done.stderr:
        assert done.returncode == 2
        assert "cannot be made: " in done.stderr
        assert "no space left on device" in done.stderr
        assert "http" not in done.stderr
        assert "hint: is there room where the engine keeps its images?" in done.stderr


def as_user(groups: list[int], *words: str, home: Path, socket: Path) -> subprocess.CompletedProcess[str]:
    """Run a command as an ordinary user of these groups, with that socket as the engine's."""
    who = f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups"
    prefix = ["setpriv", "--reuid", str(USER), "--regid", str(USER), who, "--inh-caps=-all"]
    argv = [*prefix, sys.executable, "-m", "testbed", *words]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(CHECKOUT), "HOME": str(home)}
    env |= {"TESTBED_STATE": str(home / "s"), "DOCKER_HOST": f"unix://{socket}"}
    return subprocess.run(argv, env=env, capture_output=True, text=True, check=False, cwd="/", timeout=120)


@pytest.fixture
def group_socket(on_engine: Path, tmp_path: Path) -> Iterator[Path]:
    """The engine's socket as Debian has it: a group may use it, by another name where everybody can come to it."""
    own = private.running()
    assert own
    (tmp_path / "home").mkdir()
    os.chown(tmp_path / "home", USER, USER)
    for folder in (tmp_path, *tmp_path.parents):  # pytest's own are private, and one more with workers
        if folder == Path(tempfile.gettempdir()):
            break
        folder.chmod(folder.stat().st_mode | 0o011)
    was, path = own.socket.stat(), on_engine.parent / f"{unique('socket')}.sock"
    os.link(own.socket, path)
    try:
        os.chown(path, 0, GROUP)
        path.chmod(0o660)
        yield path
    finally:
        path.unlink()
        os.chown(own.socket, was.st_uid, was.st_gid)
        own.socket.chmod(was.st_mode & 0o777)


def test_a_user_outside_of_the_sockets_group_and_one_in_it(group_socket: Path, tmp_path: Path) -> None:
    home, name = tmp_path / "home", unique("user")
    stranger = as_user([], "up", "flat", "--lab", "clab", "--name", name, home=home, socket=group_socket)
    assert stranger.returncode == 2, stranger.stderr
    assert f"no rights to the Docker engine's socket {group_socket}\n  hint: sudo, or be a mem" in stranger.stderr
    member = as_user([GROUP], "images", "list", "--json", home=home, socket=group_socket)
    assert '"engine": true' in member.stdout, member.stderr
    refused = as_user([GROUP], "up", "flat", "--lab", "clab", "--name", name, home=home, socket=group_socket)
    assert refused.returncode == 2
    assert "labs of containers are made by root only" in refused.stderr
    assert "hint: sudo; the embedded lab (`--lab netns`) needs no root" in refused.stderr
    assert not list((home / "s").glob("*"))
    assert not find_engine().client.containers.list(all=True)


def test_room_is_seen_as_the_engine_sees_it(on_engine: Path, monkeypatch: pytest.MonkeyPatch, flat: LabSpec) -> None:
    assert (find_engine().room or 0) > 1 << 20
    monkeypatch.setenv(find.FAR, "1")
    assert find_engine().room is None
    clab._check_room(find_engine(), flat)
