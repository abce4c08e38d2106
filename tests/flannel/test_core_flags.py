"""The command line and FLANNELD_*: flannel-behaviour.md, sections 1.1 to 1.3."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flannel import cli, launcher

FLANNEL = Path(cli.__file__).parent


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["-iface=eth1"], "iface", ("eth1",)),
        (["--iface", "eth1", "--iface", "eth2"], "iface", ("eth1", "eth2")),
        (["--ip-masq"], "ip_masq", True),
        (["-ip-masq=F"], "ip_masq", False),
        (["--iptables-forward-rules=false"], "iptables_forward_rules", False),
        (["--healthz-port", "0x10"], "healthz_port", 16),
        (["--healthz-port=0o17"], "healthz_port", 15),
        (["--healthz-port=017"], "healthz_port", 15),
        (["--public-ip="], "public_ip", ""),
        (["--etcd-prefix", "-x"], "etcd_prefix", "-x"),
        (["-v=4"], "v", 4),
        ([], "subnet_file", "/run/flannel/subnet.env"),
        ([], "etcd_endpoints", "http://127.0.0.1:4001,http://127.0.0.1:2379"),
    ],
)
def test_go_flag_syntax(words: list[str], name: str, value: object) -> None:
    assert getattr(cli.parse(words, {}), name) == value


def test_a_bool_never_takes_the_next_word_and_the_rest_is_told() -> None:
    options = cli.parse(["--ip-masq", "false", "--iface=eth1"], {})
    assert options.ip_masq
    assert options.iface == ()
    assert options.ignored == ("false", "--iface=eth1")


def test_two_dashes_end_the_flags() -> None:
    assert cli.parse(["--", "--ip-masq"], {}).ip_masq is False


@pytest.mark.parametrize(
    "words", [["--nope"], ["--ip-masq=perhaps"], ["--healthz-port=x"], ["--iface"], ["---v"], ["--=x"]]
)
def test_wrong_usage_is_an_error_that_names_the_flag(words: list[str]) -> None:
    with pytest.raises(cli.UsageError) as caught:
        cli.parse(words, {})
    assert words[0].lstrip("-").partition("=")[0] in str(caught.value)


def test_the_environment_fills_in_what_the_command_line_leaves() -> None:
    environment = {
        "FLANNELD_IFACE": "eth0,eth1", "FLANNELD_IP_MASQ": "true", "FLANNELD_HEALTHZ_PORT": "1",
        "FLANNELD_PUBLIC_IP": "",
    }  # fmt: skip
    options = cli.parse(["--healthz-port=2"], environment)
    assert options.iface == ("eth0,eth1",)
    assert options.ip_masq
    assert options.healthz_port == 2


def test_a_bad_environment_value_is_an_error() -> None:
    with pytest.raises(cli.UsageError, match="FLANNELD_HEALTHZ_PORT"):
        cli.parse([], {"FLANNELD_HEALTHZ_PORT": "many"})


@pytest.mark.parametrize(
    "words",
    [
        ["--subnet-lease-renew-margin=0"],
        ["--subnet-lease-renew-margin=1440"],
        ["--healthz-port=65536"],
    ],
)
def test_what_cannot_be_served_is_refused(words: list[str]) -> None:
    with pytest.raises(cli.UsageError) as caught:
        cli.check(cli.parse(words, {}))
    assert words[0].partition("=")[0].lstrip("-") in str(caught.value)


def test_the_password_is_not_shown() -> None:
    shown = cli.parse(["--etcd-password=geheim"], {}).describe()
    assert "geheim" not in shown
    assert "etcd-password='***'" in shown


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["-version"], 0, "0.1.0"),
        (["-h"], 0, "-etcd-endpoints"),
        (["--help"], 0, "-etcd-endpoints"),
        (["--nope"], 2, "no flag -nope"),
        (["--kube-subnet-mgr"], 1, "KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT"),
    ],
)
def test_exit_status_from_any_folder(words: list[str], code: int, said: str, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-IS", str(FLANNEL), *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (code, "")
    assert said in ended.stderr


def test_launchers_run_a_copied_package(tmp_path: Path) -> None:
    script = tmp_path / "flanneld"
    script.write_text(launcher.launchers(sys.executable, str(FLANNEL.parent))["flanneld"])
    script.chmod(0o755)
    ended = subprocess.run([script, "--version"], cwd="/", capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "0.1.0\n")


@pytest.mark.parametrize("python", ["python3", "/with space/python3", "/" + "x" * 200])
def test_a_launcher_refuses_what_a_shebang_cannot_hold(python: str) -> None:
    with pytest.raises(ValueError, match="interpreter"):
        launcher.launchers(python, "/opt")
