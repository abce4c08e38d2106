"""What each run makes of flannel, and what of net-conf.json is refused."""

from __future__ import annotations

import pytest

from testbed import netconf
from testbed.errors import InputError
from testbed.flannelbuild import default_flannel
from testbed.flanneldargs import parse_flags, without_store
from testbed.flannelfits import check_fits
from testbed.flannelspec import BACKENDS, RULES, normalise, run_of
from testbed.topology import load_topology


@pytest.mark.parametrize(
    ("run", "kind", "device", "port", "mtu", "topology"),
    [
        # Devices, ports and overheads: the check catalogue's table of constants.
        ("vxlan", "vxlan", "flannel.1", 8472, 1450, "racks"),
        ("vxlan_direct", "vxlan", "flannel.1", 8472, 1450, "racks"),
        ("host_gw", "host-gw", None, None, 1500, "flat"),
        ("ipip", "ipip", "flannel.ipip", None, 1480, "racks"),
        ("ipip_direct", "ipip", "flannel.ipip", None, 1480, "racks"),
        ("udp", "udp", "flannel0", 8285, 1472, "racks"),
        ("wireguard", "wireguard", "flannel-wg", 51820, 1420, "racks"),
        ("ipsec", "ipsec", None, None, 1423, "racks"),
        ("dual_stack", "vxlan", "flannel.1", 8472, 1450, "racks"),
    ],
)
def test_every_run(run: str, kind: str, device: str | None, port: int | None, mtu: int, topology: str) -> None:
    flannel = default_flannel(run)
    assert (flannel.backend.type, flannel.tunnel_device, flannel.port) == (kind, device, port)
    assert (flannel.mtu_of(1500), flannel.backend.topology) == (mtu, topology)
    assert str(flannel.network) == "10.244.0.0/16"
    assert flannel.direct == run.endswith("_direct")
    assert (flannel.network6 is not None) == (run == "dual_stack")
    assert run_of(flannel.net_conf) == run
    assert netconf.check(flannel.net_conf) == []


def test_the_nine_runs_in_order() -> None:
    assert " ".join(BACKENDS) == "vxlan vxlan_direct host_gw ipip ipip_direct udp wireguard ipsec dual_stack"


def test_defaults_are_the_stock_manifests() -> None:
    flannel = default_flannel("vxlan")
    assert (flannel.ip_masq, flannel.healthz_port, flannel.bridge) == (True, 8081, "cni0")
    assert (flannel.subnet_file, flannel.vni, flannel.subnet_len) == ("/run/flannel/subnet.env", 1, 24)
    assert flannel.delegate == {"hairpinMode": True, "isDefaultGateway": True}


@pytest.mark.parametrize("name", ["vxlan-direct", "vxlan_direct", " vxlan_direct "])
def test_hyphens_are_accepted(name: str) -> None:
    assert normalise(name) == "vxlan_direct"


def test_an_unknown_run_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="vxlan_direct, host_gw"):
        normalise("vxlna")


def test_overrides_change_what_is_expected() -> None:
    flannel = default_flannel(
        "vxlan", net_conf_overrides={"vni": "4000", "Port": "4789", "Backend.MTU": "1400", "SubnetLen": "26"}
    )
    assert (flannel.tunnel_device, flannel.port, flannel.mtu_of(9000)) == ("flannel.4000", 4789, 1350)
    assert flannel.subnet_len == 26
    assert flannel.net_conf["Backend"] == {"Type": "vxlan", "VNI": 4000, "Port": 4789, "MTU": 1400}


def test_port_zero_leaves_the_kernels_default() -> None:
    assert default_flannel("vxlan", net_conf_overrides={"Port": "0"}).port == 8472


def test_ipsec_in_udp_takes_eight_bytes_more() -> None:
    flannel = default_flannel("ipsec", net_conf_overrides={"UDPEncap": "true"})
    assert (flannel.mtu_of(1500), flannel.port) == (1415, 4500)


@pytest.mark.parametrize(
    ("run", "overrides", "what"),
    [
        ("vxlan", {"VNI": "x"}, "'x' is not a number from 1 to 16777215"),
        ("vxlan", {"VNI": "16777216"}, "is not a number from 1"),
        ("vxlan", {"VNI": "true"}, "is not a number from 1"),
        ("vxlan", {"Port": "65536"}, "is not a number from 0 to 65535"),
        ("vxlan", {"Prt": "1"}, "did you mean Port?"),
        ("udp", {"VNI": "1"}, "udp has no such key"),
        ("vxlan", {"Learning": "yes"}, "'yes' is not true or false"),
        ("vxlan", {"Type": "udp"}, "name another run"),
        ("vxlan", {"DirectRouting": "true"}, "run vxlan_direct instead"),
        ("ipip_direct", {"DirectRouting": "false"}, "run ipip instead"),
        ("vxlan", {"EnableIPv6": "true", "IPv6Network": "fd00::/48"}, "run dual_stack instead"),
        ("vxlan", {"Network": "10.244.0.0"}, "is not an IPv4 network"),
        ("vxlan", {"Network": "fd00::/64"}, "is not an IPv4 network"),
        ("vxlan", {"SubnetLen": "17"}, "at least four"),
        ("vxlan", {"SubnetLen": "31"}, "is not a number from 1 to 30"),
        ("vxlan", {"SubnetMin": "10.245.0.0"}, "is not in the Network"),
        ("vxlan", {"SubnetMin": "10.244.1.1"}, "does not start a subnet"),
        ("vxlan", {"SubnetMin": "10.244.9.0", "SubnetMax": "10.244.8.0"}, "lies behind SubnetMax"),
        ("ipsec", {"PSK": "short"}, "at least 96"),
        ("wireguard", {"Mode": "both"}, "separate, auto"),
        ("vxlan", {"EnableIPv4": "false"}, "neither IPv4 nor IPv6"),
    ],
)
def test_overrides_that_are_refused(run: str, overrides: dict[str, str], what: str) -> None:
    with pytest.raises(InputError) as error:
        default_flannel(run, net_conf_overrides=overrides)
    assert what in str(error.value)


def test_every_wrong_override_is_told_at_once() -> None:
    with pytest.raises(InputError) as error:
        default_flannel("vxlan", net_conf_overrides={"VNI": "x", "Port": "y", "Nope": "1"})
    assert [fault.key for fault in error.value.faults] == ["VNI", "Port", "Nope"]


@pytest.mark.parametrize("rules", RULES)
def test_rules_decide_on_nftables(rules: str) -> None:
    flannel = default_flannel("vxlan", rules=rules)
    assert flannel.net_conf["EnableNFTables"] == (rules == "nftables")


def test_without_rules_net_conf_decides_on_them_and_may_not_contradict_any() -> None:
    assert default_flannel("vxlan").rules == "iptables-nft"
    assert default_flannel("vxlan", net_conf_overrides={"EnableNFTables": "true"}).rules == "nftables"
    for rules, word in (("iptables-legacy", "true"), ("iptables-nft", "true"), ("nftables", "false")):
        with pytest.raises(InputError, match=f"EnableNFTables: contradicts --rules {rules}"):
            default_flannel("vxlan", net_conf_overrides={"EnableNFTables": word}, rules=rules)


def test_unknown_rules() -> None:
    with pytest.raises(InputError, match="iptables-nft, iptables-legacy, nftables"):
        default_flannel("vxlan", rules="ipfw")


@pytest.mark.parametrize(
    ("network", "expected"), [("10.3.0.0/16", 24), ("10.3.0.0/22", 24), ("10.3.0.0/23", 25), ("10.3.0.0/28", 30)]
)
def test_subnet_length_by_flannels_rule(network: str, expected: int) -> None:
    assert default_flannel("vxlan", net_conf_overrides={"Network": network}).subnet_len == expected


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        ({"Network": "10.0.0.0/16"}, "overlaps the addresses of master1"),
        ({"Network": "172.31.0.0/16"}, "overlaps the addresses of"),
        ({"Network": "10.244.0.0/22"}, "has 3 subnets of /24, for 4 nodes"),
        ({"MTU": "9200"}, "more than the lab's MTU"),
    ],
)
def test_flannel_that_does_not_fit_the_lab(overrides: dict[str, str], what: str) -> None:
    lab = load_topology("racks", "t1")
    check_fits(default_flannel("vxlan"), lab)
    with pytest.raises(InputError) as error:
        check_fits(default_flannel("vxlan", net_conf_overrides=overrides), lab)
    assert what in str(error.value)


def test_flags_as_go_reads_them() -> None:
    flags = parse_flags(
        ["-ip-masq", "--iface", "eth0", "--iface=eth1", "--ip-masq=false", "rest", "--v=5"],
        {"FLANNELD_HEALTHZ_PORT": "8081", "FLANNELD_IFACE": "eth9"},
    )
    assert flags.all("iface") == ["eth0", "eth1"]  # the command line wins over the environment
    assert (flags.boolean("ip-masq", default=True), flags.last("healthz-port")) == (False, "8081")
    assert flags.rest == ("rest", "--v=5")


def test_a_boolean_takes_no_word() -> None:
    flags = parse_flags(["--ip-masq", "false"])
    assert (flags.boolean("ip-masq", default=False), flags.rest) == (True, ("false",))


def test_store_flags_are_taken_out_with_their_values() -> None:
    flags = parse_flags(["--ip-masq", "--etcd-prefix", "/x", "--kube-subnet-mgr", "--v", "2"])
    assert without_store(flags) == (("--ip-masq", "--v", "2"), ("--etcd-prefix", "--kube-subnet-mgr"))
