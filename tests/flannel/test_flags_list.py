"""The flags there are, their defaults, and values in Go's notation: flannel-behaviour.md, sections 1.1 to 1.4."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flannel import cli

#: Upstream's table.
DEFAULTS: dict[str, object] = {
    "etcd-endpoints": "http://127.0.0.1:4001,http://127.0.0.1:2379",
    "etcd-prefix": "/coreos.com/network",
    **dict.fromkeys(("etcd-keyfile", "etcd-certfile", "etcd-cafile", "etcd-username", "etcd-password"), ""),
    "iface": (),
    "iface-regex": (),
    "iface-can-reach": "",
    "subnet-file": "/run/flannel/subnet.env",
    "public-ip": "",
    "public-ipv6": "",
    "subnet-lease-renew-margin": 60,
    "ip-masq": False,
    "ip-masq-fully-random-disable": False,
    "kube-subnet-mgr": False,
    "kube-api-url": "",
    "kube-annotation-prefix": "flannel.alpha.coreos.com",
    "kubeconfig-file": "",
    "version": False,
    "healthz-ip": "0.0.0.0",
    "healthz-port": 0,
    "iptables-resync": 5,
    "iptables-forward-rules": True,
    "ip-blackhole-route": False,
    "net-config-path": "/etc/kube-flannel/net-conf.json",
    "set-node-network-unavailable": True,
    "v": 0,
    "vmodule": "",
    "log_backtrace_at": "",
}


def value(options: cli.Options, flag: str) -> object:
    found: object = getattr(options, flag.replace("-", "_"))
    return found


def test_every_flag_has_upstreams_name_and_default() -> None:
    options = cli.parse([], {})
    assert {flag.name: value(options, flag.name) for flag in cli.FLAGS} == DEFAULTS
    assert not any("nft" in flag.name for flag in cli.FLAGS)  # the network configuration chooses nftables


@pytest.mark.parametrize("flag", sorted(DEFAULTS))
def test_every_flag_can_come_from_the_environment_and_is_shown(flag: str) -> None:
    default = DEFAULTS[flag]
    text = "true" if default is False else "false" if default is True else "7" if isinstance(default, int) else "text"
    options = cli.parse([], {"FLANNELD_" + flag.upper().replace("-", "_"): text})
    if flag == "version":
        assert not options.version  # a version is asked for by the command line alone
    else:
        assert value(options, flag) != default
    assert f"{flag}=" in options.describe()
    assert f"  -{flag}" in cli.usage()


@pytest.mark.parametrize("flag", ["logtostderr", "alsologtostderr", "log_dir", "stderrthreshold", "log_file"])
def test_klogs_other_flags_are_unknown(flag: str) -> None:
    with pytest.raises(cli.UsageError, match=f"there is no flag -{flag}"):
        cli.parse([f"--{flag}=true"], {})


@pytest.mark.parametrize("text", ["1", "t", "T", "TRUE", "true", "True"])
def test_what_is_true_in_go(text: str) -> None:
    assert cli.parse([f"--ip-masq={text}"], {}).ip_masq


@pytest.mark.parametrize("text", ["0", "f", "F", "FALSE", "false", "False"])
def test_what_is_false_in_go(text: str) -> None:
    assert not cli.parse([f"--iptables-forward-rules={text}"], {}).iptables_forward_rules


@pytest.mark.parametrize("text", ["", "yes", "on", "tRUE", "2"])
def test_what_is_neither(text: str) -> None:
    with pytest.raises(cli.UsageError, match="ip-masq"):
        cli.parse([f"--ip-masq={text}"], {})


def test_flags_of_both_stores_may_be_given_together() -> None:
    words = ["--kube-subnet-mgr", "--etcd-endpoints=http://127.0.0.1:1", "--etcd-prefix=/x", "--iface=a"]
    cli.check(cli.parse([*words, "--iface-regex=b", "--iface-can-reach=10.0.0.1"], {}))


@pytest.mark.parametrize("margin", ["0", "-1", "1440", "99999"])
def test_a_margin_that_leaves_no_lease_is_refused_with_kubernetes_too(margin: str, tmp_path: Path) -> None:
    words = ["--kube-subnet-mgr", f"--subnet-lease-renew-margin={margin}"]
    argv = [sys.executable, "-IS", str(Path(cli.__file__).parent), *words]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "subnet-lease-renew-margin" in done.stderr
