"""mk-docker-opts: the Docker daemon's options that follow from subnet.env."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flannel import launcher, mkdockeropts
from tests.flannel.corelab import PYTHON, Node

PACKAGE = Path(mkdockeropts.__file__).parent
SUBNET_ENV = "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.74.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ={}\n"
BIP, MASQ, MTU = "--bip=10.1.74.1/24", "--ip-masq=true", "--mtu=1472"
SINGLE = f'DOCKER_OPT_BIP="{BIP}"\nDOCKER_OPT_IPMASQ="{MASQ}"\nDOCKER_OPT_MTU="{MTU}"\n'


class Files:
    """subnet.env, and where Docker's options go."""

    def __init__(self, folder: Path) -> None:
        self.flannel, self.docker = folder / "subnet.env", folder / "out/docker_opts.env"
        self.flannel.write_text(SUBNET_ENV.format("false"))

    def run(self, *words: str, **environment: str) -> int:
        return mkdockeropts.main(["-f", str(self.flannel), "-d", str(self.docker), *words], environment)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], f'{SINGLE}DOCKER_OPTS=" {BIP} {MASQ} {MTU}"\n'),
        (["-i"], SINGLE),
        (["-c"], f'DOCKER_OPTS=" {BIP} {MASQ} {MTU}"\n'),
        (["-i", "-c"], f'{SINGLE}DOCKER_OPTS=" {BIP} {MASQ} {MTU}"\n'),
        (["-k", "CUSTOM_KEY"], f'{SINGLE}CUSTOM_KEY=" {BIP} {MASQ} {MTU}"\n'),
        (["-m"], f'DOCKER_OPT_BIP="{BIP}"\nDOCKER_OPT_MTU="{MTU}"\nDOCKER_OPTS=" {BIP} {MTU}"\n'),
    ],
)
def test_the_output_is_upstreams(files: Files, words: list[str], text: str) -> None:
    assert files.run(*words) == 0
    assert files.docker.read_text() == text
    assert files.docker.stat().st_mode & 0o777 == 0o644


def test_docker_masquerades_where_flannel_does_not(files: Files) -> None:
    files.flannel.write_text(SUBNET_ENV.format("true"))
    assert files.run("-i") == 0
    assert 'DOCKER_OPT_IPMASQ="--ip-masq=false"' in files.docker.read_text()


def test_options_of_the_environment_are_kept(files: Files) -> None:
    assert files.run(DOCKER_OPT_DEBUG="--debug", DOCKER_OPTS="--log-level=warn") == 0
    text = files.docker.read_text()
    assert 'DOCKER_OPT_DEBUG="--debug"' in text
    assert f'DOCKER_OPTS="--log-level=warn  {BIP} --debug {MASQ} {MTU}"' in text


def test_options_of_the_environment_may_hold_any_letters(files: Files) -> None:
    assert files.run("-i", DOCKER_OPT_LABEL="--label=gr\u00fcn\udcff") == 0
    assert b'DOCKER_OPT_LABEL="--label=gr\xc3\xbcn\xff"' in files.docker.read_bytes()


def test_a_pipe_is_written_to_and_not_replaced(files: Files) -> None:
    os.mkfifo(files.flannel.with_name("pipe"))
    files.docker = files.flannel.with_name("pipe")
    with os.fdopen(os.open(files.docker, os.O_RDONLY | os.O_NONBLOCK)) as reader:
        assert files.run("-i") == 0
        assert reader.read() == SINGLE
    assert files.docker.is_fifo()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (SUBNET_ENV.format("perhaps"), "neither true nor false"),
        ("", "FLANNEL_SUBNET is missing"),
        ("FLANNEL_SUBNET=10.1.74.1/24\nFLANNEL_IPMASQ=true\n", "FLANNEL_MTU is missing"),
        ('FLANNEL_SUBNET=10.1.74.1/24\nFLANNEL_MTU=1";rm\nFLANNEL_IPMASQ=true\n', "FLANNEL_MTU"),
    ],
)
def test_a_value_that_cannot_be_used_leaves_the_file_alone(
    files: Files, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files.run()
    before = files.docker.read_text()
    files.flannel.write_text(text)
    assert files.run() == 1
    assert said in capsys.readouterr().err
    assert files.docker.read_text() == before


@pytest.mark.parametrize("words", [["-x"], ["-h"], ["more"], ["-k", "A B"], ["-f"]])
def test_wrong_usage(files: Files, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert files.run(*words) == 1
    assert capsys.readouterr().err
    assert not files.docker.exists()


def test_files_that_are_not_there(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    files.flannel.unlink()
    assert files.run() == 1
    assert str(files.flannel) in capsys.readouterr().err
    assert files.run("-f", "/dev/null", "-d", "/proc/nowhere/file") == 1


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.close()


def test_a_subnet_that_is_routed_elsewhere_is_told_of(node: Node, tmp_path: Path) -> None:
    (tmp_path / "subnet.env").write_text(SUBNET_ENV.format("true"))
    argv = [PYTHON, "-IS", str(PACKAGE), "mk-docker-opts", "-f", str(tmp_path / "subnet.env"), "-d", "/run/opts"]
    script = 'if "$@" 2>&1; then echo held; else echo "exit $?"; fi'
    assert node.run("sh", "-c", script, "sh", *argv).splitlines() == ["held"]
    node.ip("route add 10.1.74.0/24 via 192.168.50.9")
    assert "routed elsewhere: 10.1.74.0/24 via 192.168.50.9\nexit 1" in node.run("sh", "-c", script, "sh", *argv)


@pytest.mark.parametrize("form", ["word", "name"])
def test_it_is_called_by_its_name(files: Files, form: str, tmp_path: Path) -> None:
    script = tmp_path / ("flanneld" if form == "word" else "mk-docker-opts")
    script.write_text(launcher.launchers(sys.executable, str(PACKAGE.parent))["flanneld"])
    script.chmod(0o755)
    words = ["mk-docker-opts"] if form == "word" else []
    # With these a flanneld that was started by mistake would end at once.
    env = {**os.environ, "FLANNELD_ETCD_ENDPOINTS": "ftp://nobody"}
    argv = [str(script), *words, "-i", "-f", str(files.flannel), "-d", str(files.docker)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert files.docker.read_text() == SINGLE
