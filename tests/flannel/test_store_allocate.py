"""Which subnets are free."""

from __future__ import annotations

from ipaddress import IPv4Network

from hypothesis import given, settings
from hypothesis import strategies as st

from flannel.netconf import NetConf, parse
from flannel.stores.allocate import fits, free_subnets

SMALL = parse('{"Network": "10.9.0.0/24", "SubnetLen": 28, "Backend": {"Type": "vxlan"}}')


def net(text: str) -> IPv4Network:
    return IPv4Network(text)


def test_first_subnet_is_never_used_and_the_last_one_is() -> None:
    free = free_subnets(SMALL, [])
    assert free[0] == net("10.9.0.16/28")
    assert free[-1] == net("10.9.0.240/28")
    assert len(free) == 15


def test_at_most_a_hundred_candidates() -> None:
    conf = parse('{"Network": "10.0.0.0/8", "Backend": {"Type": "vxlan"}}')
    assert len(free_subnets(conf, [net("10.0.3.0/24")])) == 100
    assert net("10.0.3.0/24") not in free_subnets(conf, [net("10.0.3.0/24")])


def test_bounds_are_kept() -> None:
    text = '{"Network": "10.9.0.0/24", "SubnetLen": 28, "SubnetMin": "10.9.0.64", "SubnetMax": "10.9.0.96"}'
    conf = parse(text)
    assert free_subnets(conf, [net("10.9.0.80/28")]) == [net("10.9.0.64/28"), net("10.9.0.96/28")]


lengths = st.integers(24, 31)
taken_lists = st.lists(
    st.builds(
        lambda base, length: IPv4Network((0x0A090000 + base, length), strict=False), st.integers(0, 255), lengths
    ),
    max_size=8,
)


@settings(max_examples=100, deadline=None)
@given(taken_lists)
def test_against_the_plain_definition(taken: list[IPv4Network]) -> None:
    plain = [
        subnet
        for subnet in IPv4Network("10.9.0.0/24").subnets(new_prefix=28)
        if int(subnet.network_address) >= int(SMALL.subnet_min) and not any(subnet.overlaps(other) for other in taken)
    ]
    assert free_subnets(SMALL, taken) == plain


def test_fits() -> None:
    conf: NetConf = SMALL
    assert fits(conf, net("10.9.0.16/28"))
    assert not fits(conf, net("10.9.0.0/28"))
    assert not fits(conf, net("10.9.0.16/29"))
    assert not fits(conf, net("10.8.0.16/28"))
