"""flannel ships alone: as a wheel that pulls nothing, and as a folder that runs where no Python is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.flannel.conftest import PREFIX, free_ports
from tests.flannel.corelab import Node

HERE = Path(__file__).parents[2]
PATIENCE = 60.0  # seconds, on a machine that is busy with other tests


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `nox -s bundle` makes."""
    if find_spec("PyInstaller") is None or not all(map(shutil.which, ("objdump", "cc", "ldd"))):
        pytest.skip("PyInstaller, objdump, or a C compiler is missing, so there is nobody to make the bundle")
    folder = tmp_path_factory.mktemp("bundle")
    where = ["--distpath", str(folder / "dist"), "--workpath", str(folder / "build")]
    argv = [sys.executable, "-m", "PyInstaller", "--noconfirm", "--log-level=ERROR", *where]
    done = subprocess.run(
        [*argv, str(HERE / "tools/bundle/flannel.spec")], capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "dist/flannel"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.close()


def empty_root(node: Node, bundle: Path) -> None:
    """/run/root in the node: the bundle, /proc, and empty folders; not even a C library."""
    for name in ("proc", "run", "opt/flannel"):
        node.run("mkdir", "-p", f"/run/root/{name}")
    node.run("mount", "--bind", str(bundle), "/run/root/opt/flannel")
    node.run("mount", "-t", "proc", "proc", "/run/root/proc")


def in_root(*words: str) -> list[str]:
    return ["chroot", "/run/root", *words]


def test_in_an_empty_root_both_programs_say_their_version(node: Node, bundle: Path) -> None:
    empty_root(node, bundle)
    outside = node.run("find", "/run/root", "-xdev", "-type", "f", "-not", "-path", "/run/root/opt/flannel/*")
    assert outside == ""
    said = node.run("sh", "-c", '"$@" 2>&1', "sh", *in_root("/opt/flannel/flanneld", "--version"))
    assert said == "0.1.0\n"
    answer = node.run("env", "CNI_COMMAND=VERSION", *in_root("/opt/flannel/flannel"))
    assert "1.1.0" in json.loads(answer)["supportedVersions"]


class Served:
    """A real etcd in the node, and the bundled flanneld in the empty root."""

    def __init__(self, node: Node, folder: Path, backend: str) -> None:
        if shutil.which("etcd") is None:
            pytest.skip("etcd is missing (Debian and Ubuntu: etcd-server)")
        client, peers = free_ports(2)
        url = f"http://127.0.0.1:{client}"
        self._node, self._log = node, folder / "flanneld.log"
        self._control = ("env", "ETCDCTL_API=3", "etcdctl", "--endpoints", url)
        listen = ("--listen-client-urls", url, "--advertise-client-urls", url)
        argv = ("etcd", "--data-dir", "/run/etcd", *listen, "--listen-peer-urls", f"http://127.0.0.1:{peers}")
        self._etcd = node.spawn(*argv, output=folder / "etcd.log")
        conf = json.dumps({"Network": "10.244.0.0/16", "Backend": {"Type": backend}})
        self.put("config", conf)
        flags = (f"--etcd-endpoints={url}", "--iptables-forward-rules=false")
        self.daemon = node.spawn(*in_root("/opt/flannel/flanneld", *flags), output=self._log)
        self.until(lambda: self.runs() or self.daemon.poll() is not None, "flanneld runs")

    def runs(self, times: int = 1) -> bool:
        return self.log.count("Running backend.") == times

    def until(self, holds: Callable[[], bool], what: str) -> None:
        """Wait for it; if it does not come, show what flanneld and etcd have said."""
        deadline = time.monotonic() + PATIENCE
        while not holds():
            if time.monotonic() > deadline:
                pytest.fail(f"not within {PATIENCE:.0f} s: {what}\n{self.log}\n{self.etcdctl('get', '--prefix', '/')}")
            time.sleep(0.05)

    def put(self, name: str, value: str) -> None:
        """Write a key. On a busy machine etcdctl gives up after 5 s, and says so by its exit status alone."""
        self.until(lambda: "OK" in self.etcdctl("put", f"{PREFIX}/{name}", value), f"etcd takes {name}")

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def etcdctl(self, *words: str) -> str:
        return self._node.run(*self._control, *words, check=False)

    def close(self) -> None:
        for process in (self.daemon, self._etcd):
            process.kill()
            process.wait()


def test_in_an_empty_root_flanneld_serves_a_node(node: Node, bundle: Path, tmp_path: Path) -> None:
    """With a real etcd, a peer, and a kernel that shows what was programmed."""
    empty_root(node, bundle)
    served = Served(node, tmp_path, "vxlan")
    assert "FLANNEL_MTU=1450" in node.run("cat", "/run/root/run/flannel/subnet.env"), served.log
    value = {"PublicIP": "192.168.50.2", "BackendType": "vxlan", "BackendData": {"VtepMAC": "02:aa:bb:cc:dd:02"}}
    served.put("subnets/10.244.2.0-24", json.dumps(value))
    served.until(lambda: any(one.startswith("10.244.2.0/24 via") for one in node.routes()), "the peer's route")
    assert node.fdb() == ["02:aa:bb:cc:dd:02 dst 192.168.50.2"]
    assert "unexpected" not in served.log
    served.close()


def test_in_an_empty_root_flanneld_can_start_itself_anew(node: Node, bundle: Path, tmp_path: Path) -> None:
    """What a backend does that cannot take up another address while it runs."""
    empty_root(node, bundle)
    served = Served(node, tmp_path, "alloc")
    before = node.run("cat", "/run/root/run/flannel/subnet.env")
    node.ip("addr flush dev eth0")
    node.ip("addr add 192.168.50.99/24 dev eth0")
    node.ip("route replace default via 192.168.50.254")
    served.until(lambda: served.runs(2), "it runs again")
    assert "Using interface with name eth0 and address 192.168.50.99" in served.log
    assert node.run("cat", "/run/root/run/flannel/subnet.env") == before
    assert served.daemon.poll() is None
    served.close()


def test_every_module_is_in_the_folder(bundle: Path) -> None:
    """Backends and stores are imported by name, so that one that was left out would be missed in use only."""
    readers: Any = import_module("PyInstaller.archive.readers")
    held = set(readers.CArchiveReader(str(bundle / "programs/flanneld")).open_embedded_archive("PYZ.pyz").toc)
    names = {".".join(path.relative_to(HERE).with_suffix("").parts) for path in (HERE / "flannel").rglob("*.py")}
    assert {name.removesuffix(".__init__") for name in names if not name.endswith("__main__")} <= held
    assert not any(name.partition(".")[0] in ("testbed", "pytest", "grpc") for name in held)


def test_a_program_that_it_starts_finds_its_own_libraries(bundle: Path, tmp_path: Path) -> None:
    """The delegate of the CNI plugin, with the environment that the runtime gave."""
    (tmp_path / "cni").mkdir()
    delegate = tmp_path / "cni/bridge"
    delegate.write_text('#!/bin/sh\nenv >"$0.env"\necho {}\n')
    delegate.chmod(0o755)
    (tmp_path / "subnet.env").write_text(
        "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
    )
    given = {
        "CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c1", "CNI_NETNS": "/var/run/netns/x", "CNI_IFNAME": "eth0",
        "CNI_PATH": str(tmp_path / "cni"), "CNI_NETNS_OVERRIDE": "1", "PATH": "/usr/bin:/bin",
    }  # fmt: skip
    conf = {
        "cniVersion": "1.0.0", "name": "cbr0", "type": "flannel", "subnetFile": str(tmp_path / "subnet.env"),
        "dataDir": str(tmp_path / "data"),
    }  # fmt: skip
    done = subprocess.run(
        [bundle / "flannel"], input=json.dumps(conf), env=given, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "{}\n"), done.stderr
    seen = {line.partition("=")[0] for line in (tmp_path / "cni/bridge.env").read_text().splitlines()}
    assert seen - {"PWD", "_", "SHLVL", "OLDPWD"} == set(given)


def test_by_a_link_of_its_name_it_is_mk_docker_opts(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "subnet.env").write_text("FLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n")
    words = ["-c", "-f", str(tmp_path / "subnet.env"), "-d", str(tmp_path / "docker.env")]
    done = subprocess.run([bundle / "mk-docker-opts", *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "docker.env").read_text().startswith('DOCKER_OPTS=" --bip=10.244.1.1/24 --ip-masq=false')


# -- the wheel ---------------------------------------------------------------------------------------------------------


def test_installed_into_an_empty_environment_both_programs_run(tmp_path: Path) -> None:
    """`pip install ./flannel` pulls no library at all."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    folder = tmp_path / "wheel"
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*wheel, str(HERE / "flannel")], check=True, capture_output=True)
    # Without an index, so that anything that it needed would be missed.
    argv = [sys.executable, "-m", "pip", "--python", str(venv / "bin/python"), "install", "-q", "--no-index"]
    subprocess.run([*argv, *map(str, folder.glob("*.whl"))], check=True, capture_output=True)
    [site] = venv.glob("lib/python*/site-packages")
    assert sorted(path.name.partition("-")[0] for path in site.iterdir()) == ["flannel", "flannel"]

    def run(*words: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words, cwd="/", env={"PATH": "/usr/bin:/bin", **env}, capture_output=True, text=True, check=False
        )  # fmt: skip

    assert run(venv / "bin/flanneld", "--version").stderr == "0.1.0\n"
    assert run(venv / "bin/python", "-m", "flannel", "--version").stderr == "0.1.0\n"
    assert "FLANNEL_SUBNET is missing" in run(venv / "bin/mk-docker-opts", "-f", "/dev/null").stderr
    assert '"1.1.0"' in run(venv / "bin/flannel", CNI_COMMAND="VERSION").stdout
    started = run(venv / "bin/flanneld", "--etcd-endpoints=ftp://x")
    assert started.returncode == 1
    assert "etcd endpoint 'ftp://x'" in started.stderr
