"""The network configuration: flannel-behaviour.md, section 2."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flannel.netconf import NetConfError, backend_bool, backend_int, parse, unread_keys


def conf(**keys: Any) -> str:
    return json.dumps({"Network": "10.3.0.0/16", **keys})


@pytest.mark.parametrize(
    ("text", "low", "high", "length"),
    [
        ('{"network":"10.3.0.0/16"}', "10.3.1.0", "10.3.255.0", 24),  # 2.15
        ('{"Network":"10.1.2.3/16"}', "10.1.1.0", "10.1.255.0", 24),  # 2.3: masked
        ('{"Network":"10.3.0.0/22"}', "10.3.1.0", "10.3.3.0", 24),  # 2.9: up to /22
        ('{"Network":"10.3.0.0/23"}', "10.3.0.128", "10.3.1.128", 25),  # 2.9: 23 to 28
        ('{"Network":"10.3.0.0/28"}', "10.3.0.4", "10.3.0.12", 30),
        (conf(SubnetLen=26), "10.3.0.64", "10.3.255.192", 26),
        (conf(SubnetMin="10.3.16.0", SubnetMax="10.3.31.0"), "10.3.16.0", "10.3.31.0", 24),
        (conf(SubnetMin=None, EnableIPv4=None), "10.3.1.0", "10.3.255.0", 24),  # 2.1: null leaves the default
    ],
)
def test_subnets_follow_from_the_network(text: str, low: str, high: str, length: int) -> None:
    read = parse(text)
    assert (str(read.subnet_min), str(read.subnet_max), read.subnet_len) == (low, high, length)


def test_an_ipv6_network_has_its_own_subnets() -> None:
    read = parse('{"enableIPv6":true,"ipv6Network":"fc00::/48","enableIPv4":false}')  # 2.15
    # With IPv6 alone it is the only network that there is.
    assert (str(read.subnet_min), str(read.subnet_max)) == ("fc00:0:0:1::", "fc00:0:0:ffff::")
    assert (read.subnet_len, read.network.version, read.ipv6_network) == (64, 6, None)
    read = parse('{"enableIPv6":true,"ipv6Network":"fc00::/48","network":"10.3.0.0/16"}')
    assert (str(read.ipv6_subnet_min), str(read.ipv6_subnet_max)) == ("fc00:0:0:1::", "fc00:0:0:ffff::")
    assert (read.ipv6_subnet_len, str(read.network)) == (64, "10.3.0.0/16")


def both(**keys: Any) -> str:
    return conf(EnableIPv6=True, IPv6Network="fc00::/48", **keys)


def test_ipv6_bounds_are_kept() -> None:
    read = parse(both(IPv6SubnetLen=56, IPv6SubnetMin="fc00:0:0:1000::", IPv6SubnetMax="fc00:0:0:2000::"))
    assert (str(read.ipv6_subnet_min), str(read.ipv6_subnet_max)) == ("fc00:0:0:1000::", "fc00:0:0:2000::")
    for bad in ("fd00::", "fc00:0:0:1::", "10.3.1.0"):
        with pytest.raises(NetConfError, match="IPv6SubnetMin"):
            parse(both(IPv6SubnetLen=56, IPv6SubnetMin=bad))


@pytest.mark.parametrize(
    ("network", "length"), [("fc00::/48", 64), ("fc00::/62", 64), ("fc00::/63", 65), ("fc00::/124", 126)]
)
def test_the_length_of_ipv6_subnets_follows_from_the_network(network: str, length: int) -> None:
    assert parse(conf(EnableIPv6=True, IPv6Network=network)).ipv6_subnet_len == length


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "JSON"),
        ("[]", "object"),
        ("{}", "Network is missing"),  # 2.7
        ('{"Network":"0.0.0.0/0"}', "0.0.0.0/0"),
        ('{"Network":"fc00::/48"}', "fc00::/48"),  # 2.3
        ('{"Network":"10.3.0.0"}', "10.3.0.0"),
        ('{"Network":"10.3.0.0/255.255.0.0"}', "255.255.0.0"),
        ('{"Network":"10.3.0.0/29"}', "10.3.0.0/29"),  # 2.9
        ('{"Network":7}', "7"),
        (conf(SubnetLen=31), "SubnetLen is 31"),  # 2.8
        (conf(SubnetLen=17), "SubnetLen is 17"),
        (conf(SubnetLen="24"), "SubnetLen is '24'"),
        (conf(SubnetLen=True), "SubnetLen is True"),
        (conf(SubnetMin="10.4.0.0"), "SubnetMin is 10.4.0.0"),  # 2.10
        (conf(SubnetMax="10.4.0.0"), "SubnetMax is 10.4.0.0"),  # 2.11
        (conf(SubnetMin="10.3.1.1"), "SubnetMin is 10.3.1.1"),  # 2.12
        (conf(SubnetMin="10.3.9.0", SubnetMax="10.3.8.0"), "SubnetMin is 10.3.9.0"),
        (conf(SubnetMin="10.3.9.0/24"), "SubnetMin"),
        (conf(EnableIPv4="yes"), "EnableIPv4 is 'yes'"),
        (conf(EnableIPv4=False), "no address family"),  # 1.4.3
        (conf(EnableIPv6=True), "IPv6Network is missing"),  # 2.13
        (conf(EnableIPv6=True, IPv6Network="10.4.0.0/16"), "10.4.0.0/16"),
        (conf(EnableIPv6=True, IPv6Network="fc00::/48", IPv6SubnetLen=49), "IPv6SubnetLen is 49"),
        (conf(EnableIPv6=True, IPv6Network="fc00::/48", IPv6SubnetLen=127), "IPv6SubnetLen is 127"),
        (conf(EnableIPv6=True, IPv6Network="fc00::/125"), "fc00::/125"),
        (conf(Backend="vxlan"), "Backend is 'vxlan'"),  # 2.2
        (conf(Backend={"Type": 3}), "Backend.Type is 3"),
    ],
)
def test_an_error_names_key_and_value(text: str, named: str) -> None:
    with pytest.raises(NetConfError, match=".") as caught:
        parse(text)
    assert named in str(caught.value)


def test_no_backend_means_udp_and_says_so() -> None:
    read = parse(conf())
    assert read.backend_type == "udp"
    assert any("udp" in note for note in read.notes)


@pytest.mark.parametrize("backend", [None, {}, {"VNI": 1}])
def test_a_backend_without_type_has_no_type(backend: Any) -> None:
    assert parse(conf(Backend=backend)).backend_type == ""


def test_keys_are_found_in_any_case_and_strange_ones_are_named() -> None:
    read = parse(conf(Colour="red", Backend={"type": "VXLAN", "directrouting": True, "vni": 7, "Name": "x"}))
    assert read.backend_type == "vxlan"
    assert backend_bool(read, "DirectRouting")
    assert backend_int(read, "VNI", 1, 0, 99) == 7
    assert any("'Colour'" in note for note in read.notes)
    assert unread_keys(read, ("VNI", "DirectRouting")) == ["Backend vxlan: nobody reads the key 'name'"]


@pytest.mark.parametrize("value", ["8472", 70000, -1, 1.5, True])
def test_a_backend_number_out_of_bounds_is_refused(value: Any) -> None:
    read = parse(conf(Backend={"Type": "vxlan", "Port": value}))
    with pytest.raises(NetConfError) as caught:
        backend_int(read, "Port", 0, 0, 0xFFFF)
    assert "Backend.Port" in str(caught.value)
    assert repr(value) in str(caught.value)


def test_a_backend_switch_must_be_one() -> None:
    with pytest.raises(NetConfError, match=r"Backend.GBP is 1"):
        backend_bool(parse(conf(Backend={"Type": "vxlan", "GBP": 1})), "GBP")
